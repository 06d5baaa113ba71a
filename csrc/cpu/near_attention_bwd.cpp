// Backward of near_attention. Scores are recomputed and turned into weights through the stored log-sum-exp. One task
// per part of the tiles of a row and key/value head sums up the gradients of its keys and values; the parts, of which
// there are as many whatever the number of threads, are added in order.
#include <cmath>

#include "near_attention_tile.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// Tiles of a part at least, and parts at most: each has sums for all keys of its row.
constexpr int64_t kNearPart = 16, kNearParts = 8;

// Tiles [begin, end) of one row and group, and (T, P) sums for keys and for values.
template <class A>
struct NearPart {
  int64_t begin, end;
  std::vector<A> dk, dv;
};

template <class T>
class NearBackward : NearKeys<T, acc_t<T>> {
  using Keys = NearKeys<T, acc_t<T>>;
  using Keys::ld, Keys::N, Keys::p, Keys::tile_, Keys::W;
  using typename Keys::A;

 public:
  NearBackward(const NearAttentionBwdParams& params, const std::vector<NearTile>& tiles, int64_t most,
               std::vector<NearPart<acc_t<T>>>& parts)
      : Keys(params.forward, most), b_(params), tiles_(tiles), parts_(parts) {
    const int64_t keys = round_up(most, N);
    const int64_t elements = std::max(block(most) * keys, kNearQueries * std::min(keys, kFewKeys));
    for (int pass = 0; pass < 2; ++pass) {
      for (A** rows : {&k_, &v_, &dk_, &dv_, &kt_, &vt_}) *rows = arena_.take<A>(keys * ld);
      for (A** rows : {&q_, &do_, &dq_}) *rows = arena_.take<A>(kNearQueries * ld);
      for (A** rows : {&weights_, &ds_}) *rows = arena_.take<A>(elements);
      if (pass == 0) arena_.allocate();
    }
  }

  void operator()(int64_t task) {
    NearPart<A>& part = parts_[task];
    part.dk.resize(p.total * p.head_dim), part.dv.resize(p.total * p.head_dim);
    for (int64_t t = part.begin; t < part.end; ++t) {
      const int64_t n = Keys::enter(tiles_[t]), P = p.head_dim;
      tile(n);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = Keys::places_[j] * P;
        for (int64_t m = 0; m < P; ++m) part.dk[at + m] += dk_[j * ld + m], part.dv[at + m] += dv_[j * ld + m];
      }
    }
  }

 private:
  // Fewer queries at a time where they see many keys, so that their scores stay in cache.
  static constexpr int64_t kFewKeys = 512;
  static int64_t block(int64_t n) { return n <= kFewKeys ? kNearQueries : kNearQueries / 4; }

  void tile(int64_t n) {
    const int64_t shared = p.heads / p.groups, step = block(n);
    Keys::gather(k_, p.k, tile_.group, n, Keys::places_.data(), 0);
    Keys::gather(v_, p.v, tile_.group, n, Keys::places_.data(), 0);
    Keys::transposed(kt_, k_, n);
    Keys::transposed(vt_, v_, n);
    most_k_ = largest(k_, n * ld), most_v_ = largest(v_, n * ld);
    std::fill(dk_, dk_ + n * ld, A(0));
    std::fill(dv_, dv_ + n * ld, A(0));
    lds_ = round_up(n, N);
    for (int64_t h = tile_.group * shared; h < (tile_.group + 1) * shared; ++h)
      for (int64_t first = tile_.begin; first < tile_.end; first += step) {
        const int64_t nq = std::min(step, tile_.end - first);
        Keys::gather(q_, p.q, h, nq, nullptr, first);
        Keys::gather(do_, b_.grad_y, h, nq, nullptr, first);
        for (int64_t i = 0; i < nq; ++i) {
          const int64_t at = (tile_.row * p.length + first + i) * p.heads + h;
          lse_[i] = static_cast<const A*>(p.lse)[at];
          dlse_[i] = b_.grad_lse ? static_cast<const A*>(b_.grad_lse)[at] : A(0);
          seen_[i] = Keys::count(first + i, n);
        }
        if (stays_ordinary(n, nq))
          queries(n, first, nq);
        else
          seen_pairs(n, first, nq);
        for (int64_t i = 0; i < nq; ++i)
          copy(static_cast<T*>(b_.dq) + ((tile_.row * p.length + first + i) * p.heads + h) * p.head_dim, dq_ + i * ld,
               p.head_dim, static_cast<A>(p.scale));
      }
  }

  void queries(int64_t n, int64_t first, int64_t nq) {
    gemm<A>(nq, n, p.head_dim, q_, ld, kt_, N, Keys::panel(), weights_, lds_, false);
    gemm<A>(nq, n, p.head_dim, do_, ld, vt_, N, Keys::panel(), ds_, lds_, false);
    for (int64_t i = 0; i < nq; ++i) weigh(i, first + i, n);
    gemm<A, true>(n, p.head_dim, nq, weights_, lds_, do_, ld, N, dv_, ld, true);
    gemm<A, true>(n, p.head_dim, nq, ds_, lds_, q_, ld, N, dk_, ld, true);
    gemm<A>(nq, p.head_dim, n, ds_, lds_, k_, ld, N, dq_, ld, false);
  }

  // Scores of row i become weights, and the weights' gradients those of the scores. The row is normalised again and
  // sums up its own weight times gradient, both exact to rounding.
  void weigh(int64_t i, int64_t query, int64_t n) {
    A *s = weights_ + i * lds_, *d = ds_ + i * lds_;
    const int64_t padded = round_up(n, W);
    const auto finish = [&](A factor, A delta) {
      for (int64_t j = 0; j < padded; j += W) {
        const vec<A> e = load(s + j) * factor;
        store(s + j, e);
        store(d + j, e * (load(d + j) - delta));
      }
    };
    if (seen_[i] <= 1) {  // a weight of 1 whatever the score, whose gradient so is that of lse: exactly
      std::fill(s, s + padded, A(0));
      std::fill(d, d + padded, A(0));
      for (int64_t j = 0; j < n && seen_[i]; ++j)
        if (Keys::sees(query, j)) s[j] = A(1);
      return finish(A(1), -dlse_[i]);
    }
    const A scale = static_cast<A>(p.scale);
    for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) * scale);
    Keys::hide(s, query, 0, n);
    vec<A> total{}, products{};
    for (int64_t j = 0; j < padded; j += W) {
      const vec<A> e = power((load(s + j) - lse_[i]) * kPerE<A>);
      store(s + j, e);
      total += e;
      products += e * load(d + j);
    }
    const A factor = A(1) / linmu::LINMU_ISA::sum<A>(total);
    finish(factor, factor * linmu::LINMU_ISA::sum<A>(products) - dlse_[i]);
  }

  // Whether `queries` meets nothing but finite numbers: it multiplies what a query does not see by 0, which hides no
  // others.
  bool stays_ordinary(int64_t n, int64_t nq) const {
    double of_lse = 0;
    for (int64_t i = 0; i < nq; ++i) {
      if (seen_[i] && !std::isfinite(lse_[i])) return false;
      const double g = std::abs(dlse_[i]);
      of_lse = g <= of_lse ? of_lse : g;
    }
    const double P = static_cast<double>(p.head_dim), most_q = largest(q_, nq * ld), most_grad = largest(do_, nq * ld);
    const double score = P * most_q * most_k_ * std::max(1.0, std::abs(p.scale));
    const double change = 2 * P * most_grad * most_v_ + of_lse;
    const double sum = change * (1 + most_q + most_k_) + most_grad;
    return stays_finite<A>(score) && stays_finite<A>(sum * static_cast<double>(n * (p.heads / p.groups)));
  }

  // As `queries`, by the definition: of no pair but those that are seen.
  void seen_pairs(int64_t n, int64_t first, int64_t nq) {
    const A scale = static_cast<A>(p.scale);
    std::vector<int64_t> seen;
    for (int64_t i = 0; i < nq; ++i) {
      const A *q = q_ + i * ld, *grad = do_ + i * ld;
      A total = 0, products = 0;
      seen.clear();
      for (int64_t j = 0; j < n; ++j) {
        if (!Keys::sees(first + i, j)) continue;
        seen.push_back(j);
        weights_[j] = std::exp(product(q, k_ + j * ld) * scale - lse_[i]);
        ds_[j] = product(grad, v_ + j * ld);
        total += weights_[j], products += weights_[j] * ds_[j];
      }
      const A delta = products / total - dlse_[i];
      std::fill(dq_ + i * ld, dq_ + (i + 1) * ld, A(0));
      for (const int64_t j : seen) {
        const A weight = weights_[j] / total, change = weight * (ds_[j] - delta);
        add(dq_ + i * ld, change, k_ + j * ld);
        add(dk_ + j * ld, change, q);
        add(dv_ + j * ld, weight, grad);
      }
    }
  }
  A product(const A* a, const A* b) const {
    vec<A> total{};
    for (int64_t i = 0; i < ld; i += W) total += load(a + i) * load(b + i);
    return linmu::LINMU_ISA::sum<A>(total);
  }
  void add(A* to, A factor, const A* from) const {
    for (int64_t i = 0; i < ld; i += W) store(to + i, load(to + i) + load(from + i) * factor);
  }

  const NearAttentionBwdParams& b_;
  const std::vector<NearTile>& tiles_;
  std::vector<NearPart<acc_t<T>>>& parts_;
  int64_t lds_ = 0;
  Arena arena_;
  A *k_, *v_, *dk_, *dv_, *kt_, *vt_, *q_, *do_, *dq_, *weights_, *ds_;
  double most_k_ = 0, most_v_ = 0;
  A lse_[kNearQueries], dlse_[kNearQueries];
  int64_t seen_[kNearQueries];
};

}  // namespace

void near_attention_bwd_cpu(const NearAttentionBwdParams& b) {
  const NearAttentionParams& p = b.forward;
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using A = acc_t<T>;
    const std::vector<NearTile> tiles = near_tiles(p);
    const int64_t most = most_keys(p, tiles), count = static_cast<int64_t>(tiles.size());
    std::vector<NearPart<A>> parts;
    std::vector<int64_t> first(p.batch * p.groups + 1);
    for (int64_t begin = 0, end = 0, owner = 0; owner < p.batch * p.groups;
         begin = end, first[++owner] = parts.size()) {
      while (end < count && tiles[end].row * p.groups + tiles[end].group == owner) ++end;
      const int64_t many = std::clamp<int64_t>((end - begin) / kNearPart, 1, kNearParts);
      for (int64_t i = 0; i < many; ++i)
        parts.push_back({begin + (end - begin) * i / many, begin + (end - begin) * (i + 1) / many, {}, {}});
    }
    run_dynamic(p.threads, static_cast<int64_t>(parts.size()), 5 * near_flops(p, tiles),
                [&] { return NearBackward<T>(b, tiles, most, parts); });
    const int64_t P = p.head_dim;
    p.threads.run(p.batch * p.groups * p.total, 1 + 65536 / (P + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t owner = i / p.total, place = i % p.total, row = owner / p.groups, group = owner % p.groups;
        const int64_t to = ((row * p.total + place) * p.groups + group) * P;
        for (int64_t m = 0; m < P; ++m) {
          A dk = 0, dv = 0;
          for (int64_t part = first[owner]; part < first[owner + 1]; ++part)
            dk += parts[part].dk[place * P + m], dv += parts[part].dv[place * P + m];
          static_cast<T*>(b.dk)[to + m] = narrow<T>(dk * static_cast<A>(p.scale));
          static_cast<T*>(b.dv)[to + m] = narrow<T>(dv);
        }
      }
    });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
