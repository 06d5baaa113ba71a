// Backward of window_attention. Scores are recomputed and turned into weights through the stored log-sum-exp. One task
// per (chunk of windows, key/value head) owns the gradients of its keys and values, summed over the group's query heads
// and blocks of queries in a fixed order; the bias table gets one partial sum per chunk, added in order at the end.
#include <cmath>
#include <vector>

#include "window_attention_tile.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int64_t kQueries = 64, kKeys = 1024;
// With a bias: tasks to aim for. It fixes the chunks, so it must not depend on the number of threads.
constexpr int64_t kBiasTasks = 128;

template <class T>
class Backward : Packing<T> {
  using Base = Packing<T>;
  using Base::ld, Base::N, Base::p, Base::pack, Base::units, Base::W;
  using typename Base::A;
  using typename Base::C;
  using typename Base::U;

 public:
  // bias_sums: (chunks, H, bias_size), or null.
  Backward(const WindowAttentionBwdParams& params, int64_t chunks, double* bias_sums)
      : Base(params.forward), b_(params), chunks_(chunks), bias_sums_(bias_sums) {
    const int64_t keys = round_up(p.max_tokens, N), scores = block_elements(keys);
    const bool paired = pack > 1;
    for (int pass = 0; pass < 2; ++pass) {
      k_ = arena_.take<C>(keys * ld);
      kt_ = arena_.take<U>(keys * units);
      vt_ = arena_.take<U>(keys * units);
      q_ = arena_.take<C>(kQueries * ld);
      do_ = arena_.take<C>(kQueries * ld);
      weights_ = arena_.take<A>(scores);
      ds_ = arena_.take<A>(scores);
      dq_ = arena_.take<A>(kQueries * ld);
      dk_ = arena_.take<A>(keys * ld);
      dv_ = arena_.take<A>(keys * ld);
      coords_ = arena_.take<int32_t>(keys);
      kn_ = arena_.take<U>(paired * keys / pack * ld);
      qn_ = arena_.take<U>(paired * kQueries / pack * ld);
      don_ = arena_.take<U>(paired * kQueries / pack * ld);
      weights_across_ = arena_.take<U>(paired * scores / pack);
      ds_across_ = arena_.take<U>(paired * scores / pack);
      if (pass == 0) arena_.allocate();
    }
  }

  void operator()(int64_t task) {
    const int64_t g = task % p.groups, chunk = task / p.groups, shared = p.heads / p.groups;
    double* sums = bias_sums_ ? bias_sums_ + chunk * p.heads * p.bias_size : nullptr;
    if (sums) std::fill(sums + g * shared * p.bias_size, sums + (g + 1) * shared * p.bias_size, 0.0);
    for (int64_t w = p.num_windows * chunk / chunks_; w < p.num_windows * (chunk + 1) / chunks_; ++w)
      window(p.offsets[w], p.offsets[w + 1] - p.offsets[w], g, sums);
  }

 private:
  // Queries are taken in smaller blocks where a window has many keys, so that a block of scores stays in cache.
  static int64_t row_length(int64_t n) { return std::min(kKeys, round_up(n, N)); }
  static int64_t block_size(int64_t n) { return row_length(n) <= 256 ? kQueries : kQueries / 4; }
  static int64_t block_elements(int64_t n) {
    return std::max(block_size(n) * row_length(n), kQueries * std::min<int64_t>(256, row_length(n)));
  }

  void window(int64_t first, int64_t n, int64_t g, double* sums) {
    lds_ = row_length(n);
    const int32_t* tokens = p.tokens + first;
    Base::rows(k_, p.v, tokens, n, g, false);
    Base::transposed(vt_, k_, n);
    Base::rows(k_, p.k, tokens, n, g, true);
    Base::transposed(kt_, k_, n);
    const U* keys = Base::summed_over(kn_, k_, n);
    std::fill(dk_, dk_ + n * ld, A(0));
    std::fill(dv_, dv_ + n * ld, A(0));
    if (p.bias) {
      std::copy(p.coords + first, p.coords + first + n, coords_);
      std::fill(coords_ + n, coords_ + round_up(n, N), 0);
    }
    const int64_t shared = p.heads / p.groups;
    for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
      for (int64_t q0 = 0; q0 < n; q0 += block_size(n))
        queries(first, n, q0, h, keys, sums ? sums + h * p.bias_size : nullptr);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = (tokens[j] * p.groups + g) * p.head_dim;
      turn_row<true>(p, static_cast<T*>(b_.dk) + at, dk_ + j * ld, tokens[j], static_cast<A>(p.scale));
      copy(static_cast<T*>(b_.dv) + at, dv_ + j * ld, p.head_dim, A(1));
    }
  }

  void queries(int64_t first, int64_t n, int64_t q0, int64_t h, const U* keys, double* sums) {
    const int64_t nq = std::min(block_size(n), n - q0), pairs = (nq + pack - 1) / pack, P = p.head_dim;
    const int32_t* tokens = p.tokens + first + q0;
    Base::rows(q_, p.q, tokens, nq, h, true);
    Base::rows(do_, b_.grad_out, tokens, nq, h, false);
    const U* q = Base::summed_over(qn_, q_, nq);
    const U* grad_out = Base::summed_over(don_, do_, nq);
    for (int64_t i = 0; i < nq; ++i) {
      if (n > kKeys)
        delta_[i] =
            dot(row<T>(p, b_.grad_out, tokens[i], h), static_cast<const T*>(p.out) + (tokens[i] * p.heads + h) * P);
      lse_[i] = static_cast<const A*>(p.lse)[(first + q0 + i) * p.heads + h];
    }
    for (int64_t k0 = 0; k0 < n; k0 += kKeys) {
      const int64_t nk = std::min(kKeys, n - k0);
      gemm<C>(nq, nk, units, reinterpret_cast<U*>(q_), ld / pack, kt_ + k0 * units, N, Base::panel(), weights_, lds_,
              false);
      gemm<C>(nq, nk, units, reinterpret_cast<U*>(do_), ld / pack, vt_ + k0 * units, N, Base::panel(), ds_, lds_,
              false);
      for (int64_t i = 0; i < nq; ++i) weigh(i, q0 + i, k0, nk, h, sums, n <= kKeys);
      if constexpr (pack > 1) narrow_pairs(nq, nk);
      const U* weights_across = pack == 1 ? reinterpret_cast<U*>(weights_) : weights_across_;
      const U* ds_across = pack == 1 ? reinterpret_cast<U*>(ds_) : ds_across_;
      gemm<C, true>(nk, P, pairs, weights_across, lds_, grad_out, ld, N, dv_ + k0 * ld, ld, true);
      gemm<C, true>(nk, P, pairs, ds_across, lds_, q, ld, N, dk_ + k0 * ld, ld, true);
      gemm<C>(nq, P, (nk + pack - 1) / pack, reinterpret_cast<U*>(ds_), lds_, keys + k0 / pack * ld, ld, N, dq_, ld,
              k0 > 0);
    }
    for (int64_t i = 0; i < nq; ++i)
      turn_row<true>(p, static_cast<T*>(b_.dq) + (tokens[i] * p.heads + h) * P, dq_ + i * ld, tokens[i],
                     static_cast<A>(p.scale));
  }

  A dot(const T* a, const T* b) const {
    vec<A> total{};
    int64_t i = 0;
    for (; i + W <= p.head_dim; i += W) total += load(a + i) * load(b + i);
    const int rest = static_cast<int>(p.head_dim - i);
    if (rest) total += load_n(a + i, rest) * load_n(b + i, rest);
    return sum<A>(total);
  }

  // Row i: scores become weights, and the weights' gradients those of the scores. A row that is `whole` is normalised
  // again and gives its own sum of weight times gradient, both exact to rounding; parts of one rely on the rounded
  // log-sum-exp and output.
  void weigh(int64_t i, int64_t query, int64_t k0, int64_t nk, int64_t h, double* sums, bool whole) {
    A *s = weights_ + i * lds_, *d = ds_ + i * lds_;
    const vec<A> scale = splat(static_cast<A>(p.scale)), lse = splat(lse_[i]);
    const int64_t padded = round_up(nk, W);
    const auto last = lanes_below<A>(nk - (padded - W));
    const A* table = static_cast<const A*>(p.bias) + (p.bias ? h * p.bias_size : 0);
    const int32_t base = p.bias ? coords_[query] + static_cast<int32_t>((p.bias_size - 1) / 2) : 0;
    if (whole && nk == 1) {  // weight 1 whatever the score, which so has no gradient: exactly
      s[0] = A(1);
      std::fill(s + 1, s + W, A(0));
      std::fill(d, d + W, A(0));
      return;
    }
    vec<A> total{}, products{};
    for (int64_t j = 0; j < padded; j += W) {
      vec<A> t = load(s + j) * scale;
      if (p.bias) t += gather(table, base, coords_ + k0 + j);
      // Rounding may leave a score a little above the sum of all.
      vec<A> e = exp_below(lower(t - lse, vec<A>{}));
      if (j + W == padded) e = last ? e : vec<A>{};
      store(s + j, e);
      total += e;
      products += e * load(d + j);
    }
    const A factor = whole ? A(1) / sum<A>(total) : A(1);
    const A delta = whole ? factor * sum<A>(products) : delta_[i];
    for (int64_t j = 0; j < padded; j += W) {
      const vec<A> e = load(s + j) * factor;
      store(s + j, e);
      store(d + j, e * (load(d + j) - delta));
    }
    if (sums) {
      double* at = sums + base;
      for (int64_t j = 0; j < nk; ++j) at[-coords_[k0 + j]] += d[j];
    }
  }

  // Weights and score gradients, for sums over queries: units of two rows; score gradients also, in place, for sums
  // over keys.
  void narrow_pairs(int64_t nq, int64_t nk) {
    const int64_t padded = round_up(nk, W);
    alignas(64) bf16 even[kKeys], odd[kKeys];
    const auto narrow_row = [&](bf16* dst, const A* src) {
      for (int64_t j = 0; j < padded; j += W) store(dst + j, load(src + j));
    };
    for (const bool is_ds : {false, true}) {
      for (int64_t i = 0; i < nq; i += 2) {
        A* src = (is_ds ? ds_ : weights_) + i * lds_;
        narrow_row(even, src);
        if (i + 1 < nq)
          narrow_row(odd, src + lds_);
        else
          std::memset(odd, 0, padded * sizeof(bf16));
        interleave(reinterpret_cast<uint32_t*>((is_ds ? ds_across_ : weights_across_) + i / 2 * lds_), even, odd,
                   padded);
        if (is_ds) {
          std::memcpy(static_cast<void*>(src), even, padded * sizeof(bf16));
          if (i + 1 < nq) std::memcpy(static_cast<void*>(src + lds_), odd, padded * sizeof(bf16));
        }
      }
    }
  }

  const WindowAttentionBwdParams& b_;
  const int64_t chunks_;
  double* bias_sums_;
  int64_t lds_;  // from one query's scores to the next
  Arena arena_;
  C *k_, *q_, *do_;
  U *kt_, *vt_, *kn_, *qn_, *don_, *weights_across_, *ds_across_;
  A *weights_, *ds_, *dq_, *dk_, *dv_;
  int32_t* coords_;
  A delta_[kQueries], lse_[kQueries];
};

template <class A>
void add_up(const WindowAttentionBwdParams& b, const std::vector<double>& sums, int64_t chunks) {
  const int64_t size = b.forward.heads * b.forward.bias_size;
  for (int64_t i = 0; i < size; ++i) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += sums[c * size + i];
    static_cast<A*>(b.dbias)[i] = static_cast<A>(total);
  }
}

}  // namespace

void window_attention_bwd_cpu(const WindowAttentionBwdParams& b) {
  const WindowAttentionParams& p = b.forward;
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    zero_uncovered<T>(p, b.dq, p.heads);
    zero_uncovered<T>(p, b.dk, p.groups);
    zero_uncovered<T>(p, b.dv, p.groups);
    const bool empty = p.max_tokens == 0 || p.heads == 0;
    int64_t chunks = empty ? 0 : p.num_windows;
    std::vector<double> sums;
    if (b.dbias) {
      chunks = std::min(chunks, (kBiasTasks + p.groups - 1) / p.groups);
      sums.resize(chunks * p.heads * p.bias_size);
    }
    if (!empty)
      hand_out(p.threads, chunks * p.groups, 5 * product_flops(p),
               [&] { return Backward<T>(b, chunks, b.dbias ? sums.data() : nullptr); });
    if (b.dbias) add_up<acc_t<T>>(b, sums, chunks);
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
