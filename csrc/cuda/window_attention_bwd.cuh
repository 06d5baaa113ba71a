// What the gradients of window_attention share.
#pragma once
#include "window_attention.cuh"

namespace linmu {

// A log-sum-exp as an exponent; infinity, for weights of 0, where no key answered.
template <class T>
__device__ inline float exponent(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kPerE<T>;
}

// The log-sum-exp of a lane's rows, as exponents; infinity, for weights of 0, where there is no query.
template <class T, int R>
__device__ inline void read_lse(float (&lse)[R], const WindowAttentionParams& p, const WindowSlots& window, int first,
                                int64_t head, const int* tokens) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = row_of(r);
    const int64_t at = (window.begin + first + row) * p.heads + head;
    lse[r] = tokens[row] < 0 ? INFINITY : exponent<T>(static_cast<const float*>(p.lse)[at]);
  }
}

// Exponents, rows the queries, become weight * (dp - delta).
template <class T, int M, int N>
__device__ inline void score_gradients(Accumulator<M, N>& ds, const Accumulator<M, N>& dp, const float (&lse)[M / 8],
                                       const float* deltas) {
#pragma unroll
  for (int r = 0; r < M / 8; ++r) {
    const float delta = deltas[row_of(r)];
#pragma unroll
    for (int c = 0; c < N / 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = ds.v[r / 2][c][r % 2 * 2 + e];
        x = power<T>(x - lse[r]) * (dp.v[r / 2][c][r % 2 * 2 + e] - delta);
      }
  }
}

// The rows of a stage, times factor and rotated back where asked, to a tensor (B, L, heads, P) of T.
template <class T>
__device__ inline void store_stage(const WindowAttentionParams& p, void* tensor, int64_t heads, int64_t head,
                                   const float* stage, int pitch, int rows, int columns, const int* tokens, bool rotate,
                                   bool fast) {
  constexpr int V = kVec<T>;
  const int P = static_cast<int>(p.head_dim), R = rotate && p.cos ? static_cast<int>(p.rotary_dim) : 0;
  const int per_row = columns / V;
  for (int i = threadIdx.x % kWarp; i < rows * per_row; i += kWarp) {
    const int r = i / per_row, c = i % per_row * V, token = tokens[r];
    if (token < 0 || c >= P) continue;
    const float* from = stage + r * pitch;
    Vec<T, V> values;
    if (c < R) {
      const int64_t angles = rotary_offset(p, token);
      const float *cos = static_cast<const float*>(p.cos) + angles, *sin = static_cast<const float*>(p.sin) + angles;
#pragma unroll
      for (int v = 0; v < V; ++v)
        values.v[v] = from_float<T>(c + v < R ? rotated<true>(p, from, cos, sin, c + v) : from[c + v]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) values.v[v] = from_float<T>(from[c + v]);
    }
    T* to = static_cast<T*>(tensor) + (static_cast<int64_t>(token) * heads + head) * P + c;
    if (fast) {
      piece(to) = values;
    } else {
      for (int v = 0; v < V && c + v < P; ++v) to[v] = values.v[v];
    }
  }
}

// Sums, times factor, to a stage.
template <int M, int N>
__device__ inline void to_stage(float* stage, int pitch, Accumulator<M, N>& sums, float factor) {
  sums.each_pair([&](float first, float second, int row, int column) {
    stage[row * pitch + column] = first * factor;
    stage[row * pitch + column + 1] = second * factor;
  });
}

// out . grad_out of a warp's `count` rows, the latter from row `first` of a tile of `rows`; the rows' first element is
// aligned where out's rows are fast.
template <class Place, class T, int D>
__device__ inline void out_dot_grad(const WindowPlan& s, float* sums, const int* tokens, const T* grad_tile, int rows,
                                    int first, int count, int64_t head) {
  constexpr int V = kVec<T>, kLanes = D / V < kWarp ? D / V : kWarp, kRows = kWarp / kLanes;  // of a row; at once
  const WindowAttentionParams& p = s.p;
  const int lane = threadIdx.x % kWarp, P = static_cast<int>(p.head_dim);
#pragma unroll 4
  for (int r0 = 0; r0 < count; r0 += kRows) {
    const int r = r0 + lane / kLanes, token = tokens[r];
    const T* out = static_cast<const T*>(p.out) + (static_cast<int64_t>(token) * p.heads + head) * P;
    float sum = 0.f;
#pragma unroll
    for (int c = lane % kLanes * V; c < D; c += kLanes * V) {
      if (token < 0 || c >= P) continue;
      float x[V], y[V];
      read_as_float(y, Place::at(grad_tile, rows, D, first + r, c));
      if (s.out.fast) {
        read_as_float(x, out + c);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = c + v < P ? to_float(out[c + v]) : 0.f;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum += x[v] * y[v];
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane % kLanes == 0) sums[r] = sum;
  }
}

// dbias (H, bias_size), from s.delta and the log-sum-exp.
void window_bias_gradient(const WindowPlan& s, float* dbias, const CudaContext& context);

// dq, dk, dv and s.delta by the kernels for sm_90a; false where these do not serve.
bool window_attention_bwd_sm90(const WindowPlan& s, const CudaContext& context);

}  // namespace linmu
