// Forward of window_attention. One task per (window, key/value head): keys and values are packed once and stay in
// cache while every query head of the group attends, a block of queries at a time, over blocks of keys with a running
// maximum (Dao et al. 2022, arXiv:2205.14135). Windows up to kKeys tokens take one block: a plain softmax.
#include <cmath>
#include <limits>
#include <vector>

#include "finite.h"
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
  // A task is `span` key/value heads of one window, or, where there are few for the threads, one of the `parts` that
  // the queries of one are split into.
  Forward(const WindowAttentionParams& params, int64_t span, int64_t parts)
      : Base(params),
        shared_(p.heads / p.groups),
        span_(span),
        parts_(parts),
        unit_(p.bias || !(p.scale > 0) ? A(1) : static_cast<A>(p.scale)) {
    const int64_t keys = round_up(p.max_tokens, N);
    for (int pass = 0; pass < 2; ++pass) {
      k_ = arena_.take<C>(span_ * keys * ld);
      v_ = arena_.take<C>(span_ * keys * ld);
      q_ = arena_.take<C>((span_ > 1 ? span_ * shared_ * keys : kQueries) * ld);
      kt_ = arena_.take<U>(keys * units);
      vn_ = arena_.take<U>(pack > 1 ? keys / pack * ld : 0);
      scores_ = arena_.take<A>(kQueries * std::min(kKeys, keys));
      o_ = arena_.take<A>(kQueries * ld);
      coords_ = arena_.take<int32_t>(keys);
      positions_ = arena_.take<Position<A>>(p.causal * keys);
      if (pass == 0) arena_.allocate();
    }
  }

  void operator()(int64_t task) {
    const int64_t part = task % parts_, spans = (p.groups + span_ - 1) / span_, w = task / parts_ / spans;
    const int64_t g = task / parts_ % spans * span_, groups = std::min(span_, p.groups - g);
    const int64_t first = p.offsets[w], n = p.offsets[w + 1] - first, apart = n * ld;
    const int64_t blocks = (n + kQueries - 1) / kQueries;
    const int64_t begin = blocks * shared_ * part / parts_, end = blocks * shared_ * (part + 1) / parts_;
    if (begin == end) return;
    const int32_t* tokens = p.tokens + first;
    Base::rows(k_, p.k, tokens, n, g, groups, apart, true);
    Base::rows(v_, p.v, tokens, n, g, groups, apart, false);
    if (span_ > 1) Base::rows(q_, p.q, tokens, n, g * shared_, groups * shared_, apart, true);
    if (p.bias) {
      std::copy(p.coords + first, p.coords + first + n, coords_);
      std::fill(coords_ + n, coords_ + round_up(n, N), 0);
    }
    if (p.causal) Base::positions(positions_, tokens, n);
    lds_ = std::min(kKeys, round_up(n, N));
    for (int64_t r = 0; r < groups; ++r) {
      if (p.causal) take_out(v_ + r * apart, n);
      Base::transposed(kt_, k_ + r * apart, n);
      const U* values = Base::summed_over(vn_, v_ + r * apart, n);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = r * shared_ + i / blocks, q0 = i % blocks * kQueries, nq = std::min(kQueries, n - q0);
        const C* q = q_ + (span_ > 1 ? head * apart + q0 * ld : 0);
        if (span_ == 1) Base::rows(q_, p.q, tokens + q0, nq, g * shared_ + head, 1, 0, true);
        attend(first, n, q0, nq, g * shared_ + head, q, values);
      }
    }
  }

 private:
  // What a query does not see has a weight of 0, which hides only what is finite: the rest is taken out of the rows of
  // values, and added to the sums of the queries that see it.
  void take_out(C* rows, int64_t n) {
    broken_.clear();
    if (std::isfinite(largest(rows, n * ld))) return;
    for (int64_t j = 0; j < n; ++j) {
      C* row = rows + j * ld;
      if (std::isfinite(largest(row, ld))) continue;
      Broken b{positions_[j], std::vector<A>(ld)};
      for (int64_t m = 0; m < ld; m += W) {
        const vec<A> all = load(row + m), kept = all - all == vec<A>{} ? all : vec<A>{};
        store(b.values.data() + m, all - all == vec<A>{} ? vec<A>{} : all);
        store(row + m, kept);
      }
      broken_.push_back(std::move(b));
    }
  }

  // The nq queries from q0 of head h, rows q, in the window of n tokens that starts at `first` of the table.
  void attend(int64_t first, int64_t n, int64_t q0, int64_t nq, int64_t h, const C* q, const U* values) {
    const int32_t* tokens = p.tokens + first + q0;
    for (int64_t k0 = 0; k0 < n; k0 += kKeys) {
      const int64_t nk = std::min(kKeys, n - k0);
      gemm<C>(nq, nk, units, reinterpret_cast<const U*>(q), ld / pack, kt_ + k0 * units, N, Base::panel(), scores_,
              lds_, false);
      for (int64_t i = 0; i < nq; ++i) {
        softmax(i, q0 + i, k0, nk, h);
        if (k0 + nk == n) Base::prefetch_output(p.out, tokens[i], h, p.heads);
      }
      gemm<C>(nq, p.head_dim, (nk + pack - 1) / pack, reinterpret_cast<U*>(scores_), lds_, values + k0 / pack * ld, ld,
              N, o_, ld, k0 > 0);
    }
    for (int64_t i = 0; i < nq; ++i) {
      for (const Broken& b : broken_)
        for (int64_t m = 0; b.position <= positions_[q0 + i] && m < ld; m += W)
          store(o_ + i * ld + m, load(o_ + i * ld + m) + load(b.values.data() + m));
      T* out = static_cast<T*>(p.out) + (tokens[i] * p.heads + h) * p.head_dim;
      copy(out, o_ + i * ld, p.head_dim, A(1) / sum_[i]);
      static_cast<A*>(p.lse)[(first + q0 + i) * p.heads + h] = max_[i] * unit_ + std::log(sum_[i]);
    }
  }

  // Row i of the scores becomes weights, in place and in the compute type; query is its index in the window.
  void softmax(int64_t i, int64_t query, int64_t k0, int64_t nk, int64_t h) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    A* s = scores_ + i * lds_;
    C* weights = reinterpret_cast<C*>(s);
    const A scale = static_cast<A>(p.scale), per_score = unit_ * kPerE<A>;
    const int64_t padded = round_up(nk, W);
    if (p.bias) {
      const A* table = static_cast<const A*>(p.bias) + h * p.bias_size;
      const int32_t base = coords_[query] + static_cast<int32_t>((p.bias_size - 1) / 2);
      for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) * scale + gather(table, base, coords_ + k0 + j));
    } else if (!(scale > 0)) {
      for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) * scale);
    }
    if (p.causal) mask_later<A>(s, positions_ + k0, positions_[query], padded);
    if (nk < padded) {
      A* tail = s + padded - W;
      store(tail, first_lanes<A>(load(tail), nk - (padded - W), -infinity));
    }
    Base::weigh(s, weights, padded, per_score, k0 == 0, max_[i], sum_[i], o_ + i * ld);
  }

  const int64_t shared_, span_, parts_;
  const A
      unit_;     // of the maxima: the scale, where it can wait until after the subtraction of a maximum, which is exact
  int64_t lds_;  // from one query's scores to the next
  Arena arena_;
  C *k_, *v_, *q_;
  U *kt_, *vn_;
  A *scores_, *o_;
  int32_t* coords_;
  Position<A>* positions_;
  struct Broken {
    Position<A> position;
    std::vector<A> values;  // 0 where they are finite
  };
  std::vector<Broken> broken_;
  A max_[kQueries], sum_[kQueries];
};

}  // namespace

void window_attention_cpu(const WindowAttentionParams& p) {
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    zero_uncovered<T>(p, p.out, p.heads);
    const int64_t pairs = p.num_windows * p.groups, threads = p.threads.count;
    if (pairs == 0 || p.max_tokens == 0 || p.heads == 0) return;
    const int64_t items = (p.max_tokens + kQueries - 1) / kQueries * (p.heads / p.groups);
    const int64_t parts = std::clamp<int64_t>(4 * threads / pairs, 1, items);
    const int64_t span = parts > 1 ? 1 : Packing<T>(p).heads_together(2 + p.heads / p.groups);
    const int64_t tasks = p.num_windows * ((p.groups + span - 1) / span) * parts;
    run_dynamic(p.threads, tasks, 2 * product_flops(p), [&] { return Forward<T>(p, span, parts); });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
