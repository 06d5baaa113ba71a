// Backward of window_attention. Scores are recomputed and turned into weights through the stored log-sum-exp. One task
// per (chunk of windows, key/value head) owns the gradients of its keys and values, summed over the group's query heads
// and blocks of queries in a fixed order; the bias table gets one partial sum per chunk, added in order at the end.
#include <cmath>
#include <limits>
#include <vector>

#include "finite.h"
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
  // A task is `span` key/value heads of one of the `chunks`. bias_sums: (chunks, H, bias_size), or null.
  Backward(const WindowAttentionBwdParams& params, int64_t chunks, int64_t span, double* bias_sums)
      : Base(params.forward),
        b_(params),
        shared_(p.heads / p.groups),
        chunks_(chunks),
        span_(span),
        bias_sums_(bias_sums) {
    const int64_t keys = round_up(p.max_tokens, N), scores = block_elements(keys);
    const bool paired = pack > 1;
    for (int pass = 0; pass < 2; ++pass) {
      k_ = arena_.take<C>(span_ * keys * ld);
      v_ = arena_.take<C>(span_ * keys * ld);
      q_ = arena_.take<C>((span_ > 1 ? span_ * shared_ * keys : kQueries) * ld);
      do_ = arena_.take<C>((span_ > 1 ? span_ * shared_ * keys : kQueries) * ld);
      kt_ = arena_.take<U>(keys * units);
      vt_ = arena_.take<U>(keys * units);
      weights_ = arena_.take<A>(scores);
      ds_ = arena_.take<A>(scores);
      dq_ = arena_.take<A>(kQueries * ld);
      dk_ = arena_.take<A>(keys * ld);
      dv_ = arena_.take<A>(keys * ld);
      coords_ = arena_.take<int32_t>(keys);
      positions_ = arena_.take<Position<A>>(p.causal * keys);
      kn_ = arena_.take<U>(paired * keys / pack * ld);
      qn_ = arena_.take<U>(paired * kQueries / pack * ld);
      don_ = arena_.take<U>(paired * kQueries / pack * ld);
      weights_across_ = arena_.take<U>(paired * scores / pack);
      ds_across_ = arena_.take<U>(paired * scores / pack);
      if (pass == 0) arena_.allocate();
    }
  }

  void operator()(int64_t task) {
    const int64_t spans = (p.groups + span_ - 1) / span_, chunk = task / spans;
    const int64_t g = task % spans * span_, groups = std::min(span_, p.groups - g);
    double* sums = bias_sums_ ? bias_sums_ + chunk * p.heads * p.bias_size : nullptr;
    if (sums) std::fill(sums + g * shared_ * p.bias_size, sums + (g + groups) * shared_ * p.bias_size, 0.0);
    for (int64_t w = p.num_windows * chunk / chunks_; w < p.num_windows * (chunk + 1) / chunks_; ++w)
      window(p.offsets[w], p.offsets[w + 1] - p.offsets[w], g, groups, sums);
  }

 private:
  // Queries are taken in smaller blocks where a window has many keys, so that a block of scores stays in cache.
  static int64_t row_length(int64_t n) { return std::min(kKeys, round_up(n, N)); }
  static int64_t block_size(int64_t n) { return row_length(n) <= 256 ? kQueries : kQueries / 4; }
  static int64_t block_elements(int64_t n) {
    return std::max(block_size(n) * row_length(n), kQueries * std::min<int64_t>(256, row_length(n)));
  }

  void window(int64_t first, int64_t n, int64_t g, int64_t groups, double* sums) {
    const int32_t* tokens = p.tokens + first;
    const int64_t apart = n * ld, step = block_size(n);
    lds_ = row_length(n);
    Base::rows(k_, p.k, tokens, n, g, groups, apart, true);
    Base::rows(v_, p.v, tokens, n, g, groups, apart, false);
    if (span_ > 1) {
      Base::rows(q_, p.q, tokens, n, g * shared_, groups * shared_, apart, true);
      Base::rows(do_, b_.grad_out, tokens, n, g * shared_, groups * shared_, apart, false);
    }
    if (p.bias) {
      std::copy(p.coords + first, p.coords + first + n, coords_);
      std::fill(coords_ + n, coords_ + round_up(n, N), 0);
    }
    if (p.causal) Base::positions(positions_, tokens, n);
    for (int64_t r = 0; r < groups; ++r) {
      Base::transposed(kt_, k_ + r * apart, n);
      Base::transposed(vt_, v_ + r * apart, n);
      const U* keys = Base::summed_over(kn_, k_ + r * apart, n);
      most_k_ = p.causal ? largest(k_ + r * apart, apart) : 0, most_v_ = p.causal ? largest(v_ + r * apart, apart) : 0;
      std::fill(dk_, dk_ + n * ld, A(0));
      std::fill(dv_, dv_ + n * ld, A(0));
      for (int64_t head = r * shared_; head < (r + 1) * shared_; ++head)
        for (int64_t q0 = 0; q0 < n; q0 += step) {
          const int64_t h = g * shared_ + head, nq = std::min(step, n - q0),
                        at = span_ > 1 ? head * apart + q0 * ld : 0;
          if (span_ == 1) {
            Base::rows(q_, p.q, tokens + q0, nq, h, 1, 0, true);
            Base::rows(do_, b_.grad_out, tokens + q0, nq, h, 1, 0, false);
          }
          double* of_head = sums ? sums + h * p.bias_size : nullptr;
          if (p.causal && n > 1 && !stays_ordinary(first, n, q0, nq, h, q_ + at, do_ + at))
            seen_pairs(first, n, q0, nq, h, q_ + at, do_ + at, k_ + r * apart, v_ + r * apart, of_head);
          else
            queries(first, n, q0, nq, h, q_ + at, do_ + at, keys, of_head);
        }
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = (tokens[j] * p.groups + g + r) * p.head_dim;
        rotate_row<true>(p, static_cast<T*>(b_.dk) + at, dk_ + j * ld, tokens[j], static_cast<A>(p.scale));
        copy(static_cast<T*>(b_.dv) + at, dv_ + j * ld, p.head_dim, A(1));
      }
    }
  }

  // The nq queries from q0 of head h, rows q_rows and gradients do_rows.
  void queries(int64_t first, int64_t n, int64_t q0, int64_t nq, int64_t h, const C* q_rows, const C* do_rows,
               const U* keys, double* sums) {
    const int64_t pairs = (nq + pack - 1) / pack, P = p.head_dim;
    const int32_t* tokens = p.tokens + first + q0;
    const U* q = Base::summed_over(qn_, q_rows, nq);
    const U* grad_out = Base::summed_over(don_, do_rows, nq);
    for (int64_t i = 0; i < nq; ++i) {
      const int64_t at = (first + q0 + i) * p.heads + h;
      delta_[i] = b_.grad_lse ? -static_cast<const A*>(b_.grad_lse)[at] : A(0);
      if (n > kKeys)
        delta_[i] +=
            dot(row<T>(p, b_.grad_out, tokens[i], h), static_cast<const T*>(p.out) + (tokens[i] * p.heads + h) * P);
      lse_[i] = static_cast<const A*>(p.lse)[at];
    }
    for (int64_t k0 = 0; k0 < n; k0 += kKeys) {
      const int64_t nk = std::min(kKeys, n - k0);
      gemm<C>(nq, nk, units, reinterpret_cast<const U*>(q_rows), ld / pack, kt_ + k0 * units, N, Base::panel(),
              weights_, lds_, false);
      gemm<C>(nq, nk, units, reinterpret_cast<const U*>(do_rows), ld / pack, vt_ + k0 * units, N, Base::panel(), ds_,
              lds_, false);
      for (int64_t i = 0; i < nq; i += pack) {
        weigh(i, std::min<int64_t>(pack, nq - i), q0, k0, nk, h, sums, n <= kKeys);
        for (int64_t r = i; r < std::min(i + pack, nq); ++r)
          if (k0 + nk == n) Base::prefetch_output(b_.dq, tokens[r], h, p.heads);
      }
      const U* weights_across = pack == 1 ? reinterpret_cast<U*>(weights_) : weights_across_;
      const U* ds_across = pack == 1 ? reinterpret_cast<U*>(ds_) : ds_across_;
      gemm<C, true>(nk, P, pairs, weights_across, lds_, grad_out, ld, N, dv_ + k0 * ld, ld, true);
      gemm<C, true>(nk, P, pairs, ds_across, lds_, q, ld, N, dk_ + k0 * ld, ld, true);
      gemm<C>(nq, P, (nk + pack - 1) / pack, reinterpret_cast<U*>(ds_), lds_, keys + k0 / pack * ld, ld, N, dq_, ld,
              k0 > 0);
    }
    for (int64_t i = 0; i < nq; ++i)
      rotate_row<true>(p, static_cast<T*>(b_.dq) + (tokens[i] * p.heads + h) * P, dq_ + i * ld, tokens[i],
                       static_cast<A>(p.scale));
  }

  // Whether `queries` meets nothing but finite numbers: it multiplies what a query does not see by 0, which hides no
  // others.
  bool stays_ordinary(int64_t first, int64_t n, int64_t q0, int64_t nq, int64_t h, const C* q, const C* grad) const {
    double of_lse = 0;
    for (int64_t i = 0; i < nq; ++i) {
      const int64_t at = (first + q0 + i) * p.heads + h;
      if (!std::isfinite(static_cast<const A*>(p.lse)[at])) return false;
      const double g = b_.grad_lse ? std::abs(static_cast<const A*>(b_.grad_lse)[at]) : 0;
      of_lse = g <= of_lse ? of_lse : g;
    }
    const double P = static_cast<double>(p.head_dim), most_q = largest(q, nq * ld), most_grad = largest(grad, nq * ld);
    const double score = P * most_q * most_k_ * std::max(1.0, std::abs(p.scale));
    const double change = 2 * P * most_grad * most_v_ + of_lse;
    const double sum = change * (1 + most_q + most_k_) + most_grad;
    return stays_finite<A>(score) && stays_finite<A>(sum * static_cast<double>(n * shared_));
  }

  // As `queries`, by the definition: of no pair but those that are seen.
  void seen_pairs(int64_t first, int64_t n, int64_t q0, int64_t nq, int64_t h, const C* q, const C* grad, const C* k,
                  const C* v, double* sums) {
    const int32_t* tokens = p.tokens + first + q0;
    const A scale = static_cast<A>(p.scale);
    std::vector<A> weights(n), changes(n);
    std::vector<int64_t> seen;
    for (int64_t i = 0; i < nq; ++i, q += ld, grad += ld) {
      const int64_t at = (first + q0 + i) * p.heads + h;
      A total = 0, products = 0;
      seen.clear();
      for (int64_t j = 0; j < n; ++j) {
        if (positions_[j] > positions_[q0 + i]) continue;
        seen.push_back(j);
        A score = product(q, k + j * ld) * scale;
        if (p.bias) score += static_cast<const A*>(p.bias)[h * p.bias_size + relative(q0 + i, j)];
        weights[j] = std::exp(score - static_cast<const A*>(p.lse)[at]);
        changes[j] = product(grad, v + j * ld);
        total += weights[j], products += weights[j] * changes[j];
      }
      const A delta = products / total - (b_.grad_lse ? static_cast<const A*>(b_.grad_lse)[at] : A(0));
      std::fill(dq_, dq_ + ld, A(0));
      for (const int64_t j : seen) {
        const A weight = weights[j] / total, change = weight * (changes[j] - delta);
        add(dq_, change, k + j * ld);
        add(dk_ + j * ld, change, q);
        add(dv_ + j * ld, weight, grad);
        if (sums) sums[relative(q0 + i, j)] += change;
      }
      rotate_row<true>(p, static_cast<T*>(b_.dq) + (tokens[i] * p.heads + h) * p.head_dim, dq_, tokens[i], scale);
    }
  }
  int64_t relative(int64_t query, int64_t key) const { return coords_[query] - coords_[key] + (p.bias_size - 1) / 2; }
  A product(const C* a, const C* b) const {
    vec<A> total{};
    for (int64_t i = 0; i < ld; i += W) total += load(a + i) * load(b + i);
    return sum<A>(total);
  }
  void add(A* to, A factor, const C* from) const {
    for (int64_t i = 0; i < ld; i += W) store(to + i, load(to + i) + load(from + i) * factor);
  }

  A dot(const T* a, const T* b) const {
    vec<A> total{};
    int64_t i = 0;
    for (; i + W <= p.head_dim; i += W) total += load(a + i) * load(b + i);
    const int rest = static_cast<int>(p.head_dim - i);
    if (rest) total += load_n(a + i, rest) * load_n(b + i, rest);
    return sum<A>(total);
  }

  // Scores of rows i.. (as many as a unit holds; `rows` of them exist) become weights, and the weights' gradients those
  // of the scores. A `whole` row is normalised again and adds its own sum of weight times gradient to delta, both exact
  // to rounding; parts of one rely on the rounded log-sum-exp and output.
  void weigh(int64_t i, int64_t rows, int64_t q0, int64_t k0, int64_t nk, int64_t h, double* sums, bool whole) {
    A *s[pack], *d[pack], factor[pack], delta[pack];
    const int64_t padded = round_up(nk, W);
    for (int r = 0; r < pack; ++r) {
      s[r] = weights_ + (i + r) * lds_, d[r] = ds_ + (i + r) * lds_;
      factor[r] = A(1), delta[r] = delta_[i + r];
      if (r >= rows) {
        std::fill(s[r], s[r] + padded, A(0));
        std::fill(d[r], d[r] + padded, A(0));
        delta[r] = A(0);
      } else if (whole && nk == 1) {  // weight 1 whatever the score, whose gradient so is that of lse: exactly
        store(s[r], first_lanes<A>(splat(A(1)), 1, A(0)));
        store(d[r], vec<A>{});
      } else {
        exponentials(s[r], d[r], i + r, q0 + i + r, k0, nk, h, whole, factor[r], delta[r]);
      }
    }
    if constexpr (pack == 1) {
      for (int64_t j = 0; j < padded; j += W) {
        const vec<A> e = load(s[0] + j) * factor[0];
        store(s[0] + j, e);
        store(d[0] + j, e * (load(d[0] + j) - delta[0]));
      }
      if (sums) add_bias_gradients(sums, d[0], q0 + i, k0, nk);
    } else {
      U *weights = weights_across_ + i / pack * lds_, *ds = ds_across_ + i / pack * lds_;
      for (int64_t j = 0; j < padded; j += W) {
        alignas(64) bf16 e_narrow[2][W], d_narrow[2][W];
        for (int r = 0; r < pack; ++r) {
          const vec<A> e = load(s[r] + j) * factor[r], g = e * (load(d[r] + j) - delta[r]);
          store(e_narrow[r], e);
          store(d_narrow[r], g);
          if (sums) store(bias_row_[r] + j, g);
          std::memcpy(static_cast<void*>(reinterpret_cast<bf16*>(d[r]) + j), d_narrow[r], sizeof(d_narrow[r]));
        }
        interleave(weights + j, e_narrow[0], e_narrow[1], W);
        interleave(ds + j, d_narrow[0], d_narrow[1], W);
      }
      for (int r = 0; sums && r < rows; ++r) add_bias_gradients(sums, bias_row_[r], q0 + i + r, k0, nk);
    }
  }

  // s: scores -> unnormalised weights.
  void exponentials(A* s, const A* d, int64_t i, int64_t query, int64_t k0, int64_t nk, int64_t h, bool whole,
                    A& factor, A& delta) const {
    const int64_t padded = round_up(nk, W);
    A scale = static_cast<A>(p.scale);
    if (p.bias) {
      const A* table = static_cast<const A*>(p.bias) + h * p.bias_size;
      const int32_t base = coords_[query] + static_cast<int32_t>((p.bias_size - 1) / 2);
      for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) * scale + gather(table, base, coords_ + k0 + j));
      scale = A(1);
    } else if (!(scale > 0)) {
      for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) * scale);
      scale = A(1);
    }
    if (p.causal) mask_later<A>(s, positions_ + k0, positions_[query], padded);
    if (nk < padded) {
      constexpr A infinity = std::numeric_limits<A>::infinity();
      A* tail = s + padded - W;
      store(tail, first_lanes<A>(load(tail), nk - (padded - W), -infinity));
    }
    vec<A> total{}, products{};
    for (int64_t j = 0; j < padded; j += W) {
      const vec<A> e = power((load(s + j) * scale - lse_[i]) * kPerE<A>);
      store(s + j, e);
      total += e;
      products += e * load(d + j);
    }
    if (whole) {
      factor = A(1) / sum<A>(total);
      delta += factor * sum<A>(products);
    }
  }

  void add_bias_gradients(double* sums, const A* d, int64_t query, int64_t k0, int64_t nk) const {
    double* at = sums + coords_[query] + (p.bias_size - 1) / 2;
    for (int64_t j = 0; j < nk; ++j) at[-coords_[k0 + j]] += d[j];
  }

  const WindowAttentionBwdParams& b_;
  const int64_t shared_, chunks_, span_;
  double* bias_sums_;
  int64_t lds_;  // from one query's scores to the next
  Arena arena_;
  C *k_, *v_, *q_, *do_;
  U *kt_, *vt_, *kn_, *qn_, *don_, *weights_across_, *ds_across_;
  A *weights_, *ds_, *dq_, *dk_, *dv_;
  int32_t* coords_;
  Position<A>* positions_;
  double most_k_ = 0, most_v_ = 0;                      // of a head's rows, where that is asked
  A delta_[kQueries], lse_[kQueries];                   // delta: of a row's products less its gradient of lse
  alignas(64) A bias_row_[pack][pack > 1 ? kKeys : 1];  // score gradients before they are rounded
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
    if (!empty) {
      const int64_t span = b.dbias ? 1 : Packing<T>(p).heads_together(2 + 2 * p.heads / p.groups);
      run_dynamic(p.threads, chunks * ((p.groups + span - 1) / span), 5 * product_flops(p),
                  [&] { return Backward<T>(b, chunks, span, b.dbias ? sums.data() : nullptr); });
    }
    if (b.dbias) add_up<acc_t<T>>(b, sums, chunks);
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
