// Rows of a causal window by the definition, of no pair but those that are seen. The kernels multiply what a query does
// not see by 0, which hides only what is finite; then nothing comes out finite, and one warp does the row again, here.
#pragma once
#include "window_attention_bwd.cuh"

namespace linmu {

__device__ inline bool not_finite(float x) { return !(x - x == 0.f); }

// Whether any of a warp's sums is not finite.
template <class S>
__device__ inline bool any_broken(S& sums) {
  bool broken = false;
  sums.each_pair([&](float x, float y, int, int) { broken |= not_finite(x) || not_finite(y); });
  return warp_any(broken);
}

// Element i of a token's row, as the tiles hold it.
template <class T>
__device__ inline float row_value(const WindowPlan& s, const GatheredRows& from, int64_t token, int64_t head, bool turn,
                                  int i) {
  const WindowAttentionParams& p = s.p;
  const T* row = static_cast<const T*>(from.at.data) + row_offset(from.at, p.length, token, head);
  if (!turn || !p.cos || i >= p.rotary_dim) return to_float(row[i]);
  const int64_t at = rotary_offset(p, token);
  const float *cos = static_cast<const float*>(p.cos) + at, *sin = static_cast<const float*>(p.sin) + at;
  return to_float(from_float<T>(rotated<false>(p, row, cos, sin, i)));
}

// A query and a key of one window, by their entries; all lanes of a warp have the same.
template <class T>
struct SeenPair {
  static constexpr int kParts = 256 / kWarp;  // a lane's elements of a row: lane, lane + kWarp, ...

  const WindowPlan& s;
  const WindowSlots& window;
  int64_t head, group;
  int lane;
  int query = 0, key = 0;

  __device__ SeenPair(const WindowPlan& plan, const WindowSlots& slots, int64_t h)
      : s(plan), window(slots), head(h), group(h / (plan.p.heads / plan.p.groups)), lane(threadIdx.x % kWarp) {}

  // Sets the pair; false if the query does not see the key.
  __device__ bool choose(int q, int k) {
    const int mine = window_token(s.p, window.begin + q), other = window_token(s.p, window.begin + k);
    query = mine, key = other, query_slot_ = window.begin + q, key_slot_ = window.begin + k;
    return mine >= 0 && other >= 0 && other <= mine;
  }
  __device__ int64_t at() const { return query_slot_ * s.p.heads + head; }

  __device__ float weight() const {
    const WindowAttentionParams& p = s.p;
    float sum = 0.f;
    for (int c = lane; c < p.head_dim; c += kWarp)
      sum += row_value<T>(s, s.q, query, head, true, c) * row_value<T>(s, s.k, key, group, true, c);
    float x = warp_sum(sum) * (static_cast<float>(p.scale) * kPerE<T>);
    const int64_t relative = p.bias ? bias_index(p, p.coords[query_slot_], p.coords[key_slot_]) : -1;
    if (relative >= 0) x += static_cast<const float*>(p.bias)[head * p.bias_size + relative] * kPerE<T>;
    return power<T>(x - exponent<T>(static_cast<const float*>(p.lse)[at()]));
  }
  // The weight's gradient.
  __device__ float change() const {
    float sum = 0.f;
    for (int c = lane; c < s.p.head_dim; c += kWarp)
      sum += row_value<T>(s, s.grad_out, query, head, false, c) * row_value<T>(s, s.v, key, group, false, c);
    return warp_sum(sum);
  }
  // sums += factor * the row of a token.
  __device__ void add(float (&sums)[kParts], float factor, const GatheredRows& rows, int token, int64_t of,
                      bool turn) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      if (const int c = lane + i * kWarp; c < s.p.head_dim)
        sums[i] += factor * row_value<T>(s, rows, token, of, turn, c);
  }
  template <class F>
  __device__ void each(const float (&sums)[kParts], F&& f) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      if (const int c = lane + i * kWarp; c < s.p.head_dim) f(c, sums[i]);
  }

 private:
  int64_t query_slot_ = 0, key_slot_ = 0;
};

// out of `rows` queries from entry `first`; their log-sum-exps are written.
template <class T>
__device__ inline void redo_out(const WindowPlan& s, const WindowSlots& window, int first, int rows, int64_t head) {
  SeenPair<T> pair(s, window, head);
  sync_warp();
  for (int q = first; q < first + rows && q < window.count; ++q) {
    const int token = window_token(s.p, window.begin + q);
    float out[SeenPair<T>::kParts] = {};
    for (int k = 0; k < window.count; ++k)
      if (pair.choose(q, k)) pair.add(out, pair.weight(), s.v, pair.key, pair.group, false);
    if (token < 0) continue;
    T* to = static_cast<T*>(s.p.out) + (static_cast<int64_t>(token) * s.p.heads + head) * s.p.head_dim;
    pair.each(out, [&](int c, float x) { to[c] = from_float<T>(x); });
  }
}

// Rows of a stage of dq.
template <class T>
__device__ inline void redo_dq(const WindowPlan& s, const WindowSlots& window, int first, int rows, int64_t head,
                               float* stage, int pitch) {
  SeenPair<T> pair(s, window, head);
  sync_warp();
  for (int q = first; q < first + rows && q < window.count; ++q) {
    float dq[SeenPair<T>::kParts] = {};
    for (int k = 0; k < window.count; ++k)
      if (pair.choose(q, k))
        pair.add(dq, pair.weight() * (pair.change() - s.delta[pair.at()]), s.k, pair.key, pair.group, true);
    pair.each(dq, [&](int c, float x) { stage[(q - first) * pitch + c] = x * static_cast<float>(s.p.scale); });
  }
  sync_warp();
}

// Rows of dv, and of a stage of dk if there is one.
template <class T>
__device__ inline void redo_dkv(const WindowPlan& s, const WindowSlots& window, int first, int rows, int64_t group,
                                float* stage, int pitch) {
  const int share = static_cast<int>(s.p.heads / s.p.groups);
  sync_warp();
  for (int k = first; k < first + rows && k < window.count; ++k) {
    const int token = window_token(s.p, window.begin + k);
    float dk[SeenPair<T>::kParts] = {}, dv[SeenPair<T>::kParts] = {};
    SeenPair<T> pair(s, window, group * share);
    for (pair.head = group * share; pair.head < (group + 1) * share; ++pair.head)
      for (int q = 0; q < window.count; ++q)
        if (pair.choose(q, k)) {
          const float weight = pair.weight();
          pair.add(dk, weight * (pair.change() - s.delta[pair.at()]), s.q, pair.query, pair.head, true);
          pair.add(dv, weight, s.grad_out, pair.query, pair.head, false);
        }
    if (token < 0) continue;
    T* to = static_cast<T*>(s.dv) + (static_cast<int64_t>(token) * s.p.groups + group) * s.p.head_dim;
    pair.each(dv, [&](int c, float x) { to[c] = from_float<T>(x); });
    if (stage)
      pair.each(dk, [&](int c, float x) { stage[(k - first) * pitch + c] = x * static_cast<float>(s.p.scale); });
  }
  sync_warp();
}

}  // namespace linmu
