// Forward of near_attention. One task per tile of queries: the keys and values that they see are gathered once, and
// every query head of the group attends to them, over blocks of keys with a running maximum (Dao et al. 2022,
// arXiv:2205.14135).
#include <cmath>

#include "near_attention_tile.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int64_t kNearKeys = 256;

template <class T>
class NearForward : NearKeys<T, compute_t<T>> {
  using Keys = NearKeys<T, compute_t<T>>;
  using Keys::ld, Keys::N, Keys::p, Keys::pack, Keys::tile_, Keys::units, Keys::W;
  using typename Keys::A, typename Keys::C, typename Keys::U;

 public:
  NearForward(const NearAttentionParams& params, const std::vector<NearTile>& tiles, int64_t most)
      : Keys(params, most), tiles_(tiles), unit_(p.scale > 0 ? static_cast<A>(p.scale) : A(1)) {
    const int64_t keys = round_up(most, N);
    for (int pass = 0; pass < 2; ++pass) {
      k_ = arena_.take<C>(keys * ld);
      v_ = arena_.take<C>(keys * ld);
      q_ = arena_.take<C>(kNearQueries * ld);
      kt_ = arena_.take<U>(keys * units);
      vn_ = arena_.take<U>(pack > 1 ? keys / pack * ld : 0);
      scores_ = arena_.take<A>(kNearQueries * std::min(kNearKeys, keys));
      o_ = arena_.take<A>(kNearQueries * ld);
      if (pass == 0) arena_.allocate();
    }
  }

  void operator()(int64_t task) {
    const int64_t n = Keys::enter(tiles_[task]), shared = p.heads / p.groups;
    Keys::gather(k_, p.k, tile_.group, n, Keys::places_.data(), 0);
    Keys::gather(v_, p.v, tile_.group, n, Keys::places_.data(), 0);
    take_out(n);
    Keys::transposed(kt_, k_, n);
    const U* values = Keys::summed_over(vn_, v_, n);
    lds_ = std::min(kNearKeys, round_up(n, N));
    for (int64_t h = tile_.group * shared; h < (tile_.group + 1) * shared; ++h) attend(n, h, values);
  }

 private:
  // What a query does not see has a weight of 0, which hides only what is finite: the rest is taken out of the rows of
  // values, and added to the sums of the queries that see it.
  void take_out(int64_t n) {
    broken_.clear();
    if (std::isfinite(largest(v_, n * ld))) return;
    for (int64_t j = 0; j < n; ++j) {
      C* row = v_ + j * ld;
      if (std::isfinite(largest(row, ld))) continue;
      Broken b{j, std::vector<A>(ld)};
      for (int64_t m = 0; m < ld; m += W) {
        const vec<A> all = load(row + m), kept = all - all == vec<A>{} ? all : vec<A>{};
        store(b.values.data() + m, all - all == vec<A>{} ? vec<A>{} : all);
        store(row + m, kept);
      }
      broken_.push_back(std::move(b));
    }
  }

  void attend(int64_t n, int64_t h, const U* values) {
    const int64_t nq = tile_.end - tile_.begin;
    Keys::gather(q_, p.q, h, nq, nullptr, tile_.begin);
    for (int64_t k0 = 0; k0 < std::max<int64_t>(n, 1); k0 += kNearKeys) {
      const int64_t nk = std::min(kNearKeys, n - k0);
      gemm<C>(nq, nk, units, reinterpret_cast<const U*>(q_), ld / pack, kt_ + k0 * units, N, Keys::panel(), scores_,
              lds_, false);
      for (int64_t i = 0; i < nq; ++i) softmax(i, k0, nk);
      gemm<C>(nq, p.head_dim, (nk + pack - 1) / pack, reinterpret_cast<U*>(scores_), lds_, values + k0 / pack * ld, ld,
              N, o_, ld, k0 > 0);
    }
    for (int64_t i = 0; i < nq; ++i) {
      const int64_t query = tile_.begin + i, at = (tile_.row * p.length + query) * p.heads + h;
      for (const Broken& b : broken_)
        for (int64_t m = 0; m < ld && Keys::sees(query, b.column); m += W)
          store(o_ + i * ld + m, load(o_ + i * ld + m) + load(b.values.data() + m));
      // Of a token that sees nothing all weights are 0, and y is.
      const bool nothing = sum_[i] == A(0) && !Keys::count(query, n);
      copy(static_cast<T*>(p.y) + at * p.head_dim, o_ + i * ld, p.head_dim, nothing ? A(0) : A(1) / sum_[i]);
      static_cast<A*>(p.lse)[at] = nothing ? -std::numeric_limits<A>::infinity() : max_[i] * unit_ + std::log(sum_[i]);
    }
  }

  // Row i of the scores becomes weights, in place and in the compute type.
  void softmax(int64_t i, int64_t k0, int64_t nk) {
    A* s = scores_ + i * lds_;
    C* weights = reinterpret_cast<C*>(s);
    const A scale = static_cast<A>(p.scale), per_score = unit_ * kPerE<A>;
    const int64_t padded = round_up(nk, W);
    if (!(scale > 0))
      for (int64_t j = 0; j < padded; j += W) store(s + j, load(s + j) * scale);
    Keys::hide(s, tile_.begin + i, k0, nk);
    Keys::weigh(s, weights, padded, per_score, k0 == 0, max_[i], sum_[i], o_ + i * ld);
  }

  const std::vector<NearTile>& tiles_;
  const A unit_;  // of the maxima: the scale, where it can wait until after the subtraction of a maximum
  int64_t lds_ = 0;
  Arena arena_;
  C *k_, *v_, *q_;
  U *kt_, *vn_;
  A *scores_, *o_;
  struct Broken {
    int64_t column;
    std::vector<A> values;  // 0 where they are finite
  };
  std::vector<Broken> broken_;
  A max_[kNearQueries], sum_[kNearQueries];
};

}  // namespace

void near_attention_cpu(const NearAttentionParams& p) {
  if (!p.heads) return;
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const std::vector<NearTile> tiles = near_tiles(p);
    const int64_t most = most_keys(p, tiles), count = static_cast<int64_t>(tiles.size());
    run_dynamic(p.threads, count, 2 * near_flops(p, tiles), [&] { return NearForward<T>(p, tiles, most); });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
