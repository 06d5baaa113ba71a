// Forward of window_attention. One task per (window, key/value head): keys and values are packed once and stay in
// cache while every query head of the group attends, a block of queries at a time, over blocks of keys with a running
// maximum (Dao et al. 2022, arXiv:2205.14135). Windows up to kKeys tokens take one block: a plain softmax.
#include <cmath>
#include <limits>

#include "window_attention_tile.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int64_t kQueries = 64, kKeys = 256;

template <class T>
class Forward : Packing<T> {
  using Base = Packing<T>;
  using Base::ld, Base::N, Base::p, Base::pack, Base::units, Base::W;
  using typename Base::A;
  using typename Base::C;
  using typename Base::U;

 public:
  // The queries of a window are split into `parts` tasks where there are few windows for the threads.
  Forward(const WindowAttentionParams& params, int64_t parts) : Base(params), parts_(parts) {
    for (int pass = 0; pass < 2; ++pass) {
      const int64_t keys = round_up(p.max_tokens, N);
      kt_ = arena_.take<U>(keys * units);
      vn_ = arena_.take<U>(keys / pack * ld);
      raw_ = arena_.take<C>((pack == 1 ? std::min<int64_t>(keys, N) : keys) * ld);
      q_ = arena_.take<C>(kQueries * ld);
      scores_ = arena_.take<A>(kQueries * std::min(kKeys, keys));
      o_ = arena_.take<A>(kQueries * ld);
      coords_ = arena_.take<int32_t>(keys);
      if (pass == 0) arena_.allocate();
    }
  }

  void operator()(int64_t task) {
    const int64_t part = task % parts_, g = task / parts_ % p.groups, w = task / parts_ / p.groups;
    const int64_t first = p.offsets[w], n = p.offsets[w + 1] - first;
    const int64_t blocks = (n + kQueries - 1) / kQueries, shared = p.heads / p.groups;
    const int64_t begin = blocks * shared * part / parts_, end = blocks * shared * (part + 1) / parts_;
    if (begin == end) return;
    lds_ = std::min(kKeys, round_up(n, N));
    const int32_t* tokens = p.tokens + first;
    for (int64_t j = 0; j < n; j += N) {
      const int64_t count = std::min<int64_t>(N, n - j);
      Base::rows(raw_, p.k, tokens + j, count, g, true);
      Base::transposed(kt_ + j * units, raw_, count);
    }
    const U* values;
    if constexpr (pack == 1) {
      Base::rows(vn_, p.v, tokens, n, g, false);
      values = vn_;
    } else {
      Base::rows(raw_, p.v, tokens, n, g, false);
      values = Base::summed_over(vn_, raw_, n);
    }
    if (p.bias) {
      std::copy(p.coords + first, p.coords + first + n, coords_);
      std::fill(coords_ + n, coords_ + round_up(n, N), 0);
    }
    for (int64_t i = begin; i < end; ++i) attend(first, n, i % blocks * kQueries, g * shared + i / blocks, values);
  }

 private:
  // Queries q0.. of head h in the window of n tokens that starts at `first` of the table.
  void attend(int64_t first, int64_t n, int64_t q0, int64_t h, const U* values) {
    const int64_t nq = std::min(kQueries, n - q0);
    const int32_t* tokens = p.tokens + first + q0;
    Base::rows(q_, p.q, tokens, nq, h, true);
    for (int64_t k0 = 0; k0 < n; k0 += kKeys) {
      const int64_t nk = std::min(kKeys, n - k0);
      gemm<C>(nq, nk, units, reinterpret_cast<U*>(q_), ld / pack, kt_ + k0 * units, N, Base::panel(), scores_, lds_,
              false);
      for (int64_t i = 0; i < nq; ++i) softmax(i, q0 + i, k0, nk, h);
      gemm<C>(nq, p.head_dim, (nk + pack - 1) / pack, reinterpret_cast<U*>(scores_), lds_, values + k0 / pack * ld, ld,
              N, o_, ld, k0 > 0);
    }
    for (int64_t i = 0; i < nq; ++i) {
      T* out = static_cast<T*>(p.out) + (tokens[i] * p.heads + h) * p.head_dim;
      copy(out, o_ + i * ld, p.head_dim, A(1) / sum_[i]);
      static_cast<A*>(p.lse)[(first + q0 + i) * p.heads + h] = max_[i] + std::log(sum_[i]);
    }
  }

  // Row i of the scores becomes exp(score - maximum), in place and in the compute type; query is its index in the
  // window. Earlier blocks' sums are rescaled when the maximum moves.
  void softmax(int64_t i, int64_t query, int64_t k0, int64_t nk, int64_t h) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    A* s = scores_ + i * lds_;
    C* weights = reinterpret_cast<C*>(s);
    const vec<A> scale = splat(static_cast<A>(p.scale));
    const int64_t padded = round_up(nk, W);
    vec<A> top = splat(-infinity);
    const auto last = lanes_below<A>(nk - (padded - W));
    const A* table = static_cast<const A*>(p.bias) + (p.bias ? h * p.bias_size : 0);
    const int32_t base = p.bias ? coords_[query] + static_cast<int32_t>((p.bias_size - 1) / 2) : 0;
    for (int64_t j = 0; j < padded; j += W) {
      vec<A> t = load(s + j) * scale;
      if (p.bias) t += gather(table, base, coords_ + k0 + j);
      if (j + W == padded) t = last ? t : splat(-infinity);
      store(s + j, t);
      top = t > top ? t : top;
    }
    const A before = k0 ? max_[i] : -infinity;
    A now = before;
    for (int j = 0; j < W; ++j) now = top[j] > now ? top[j] : now;
    max_[i] = now;
    // All scores -inf so far: their weights are 0, not NaN; if it stays so, 0 / 0 at the end.
    const A from = now == -infinity ? A(0) : now;
    vec<A> sums{};
    for (int64_t j = 0; j < padded; j += W) {
      const vec<A> e = exp_below(load(s + j) - from);
      sums += e;
      store(weights + j, e);
    }
    const A sum = linmu::LINMU_ISA::sum<A>(sums);
    if (k0 == 0) {
      sum_[i] = sum;
    } else if (before == now) {
      sum_[i] += sum;
    } else {
      const A shrink = exp_below(splat(before - from))[0];
      sum_[i] = sum_[i] * shrink + sum;
      for (int64_t j = 0; j < ld; j += W) store(o_ + i * ld + j, load(o_ + i * ld + j) * shrink);
    }
  }

  const int64_t parts_;
  int64_t lds_;  // from one query's scores to the next
  Arena arena_;
  U *kt_, *vn_;
  C *raw_, *q_;
  A *scores_, *o_;
  int32_t* coords_;
  A max_[kQueries], sum_[kQueries];
};

}  // namespace

void window_attention_cpu(const WindowAttentionParams& p) {
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    zero_uncovered<T>(p, p.out, p.heads);
    const int64_t pairs = p.num_windows * p.groups;
    if (pairs == 0 || p.max_tokens == 0 || p.heads == 0) return;
    const int64_t items = (p.max_tokens + kQueries - 1) / kQueries * (p.heads / p.groups);
    const int64_t parts = std::clamp<int64_t>(4 * p.threads.count / pairs, 1, items);
    hand_out(p.threads, pairs * parts, 2 * product_flops(p), [&] { return Forward<T>(p, parts); });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
