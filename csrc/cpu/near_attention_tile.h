// What the forward and the backward of near_attention share: tiles of queries that see almost the same keys, those keys
// in a row, and which of them each query sees.
#pragma once
#include <limits>
#include <vector>

#include "../linmu/near_attention.h"
#include "finite.h"
#include "window_attention_tile.h"

namespace linmu {
namespace LINMU_ISA {

constexpr int64_t kNearQueries = 64;

// Queries [begin, end) of a row and group, which see one list, and keys of [low, high).
struct NearTile {
  int64_t row, group, begin, end, low, high, list;
  int64_t most_keys(const NearAttentionParams& p) const { return high - low + (list < 0 ? 0 : p.list_size); }
};

// In order of rows, groups and queries.
inline std::vector<NearTile> near_tiles(const NearAttentionParams& p) {
  std::vector<NearTile> tiles;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < p.groups; ++g) {
      const int32_t *which = p.which + (b * p.groups + g) * p.length, *low = p.low + b * p.length,
                    *high = p.high + b * p.length;
      for (int64_t i = 0; i < p.length;) {
        NearTile t{b, g, i, i, 0, 0, which[i]};
        int64_t widest = 0;
        for (; i < p.length && i - t.begin < kNearQueries && which[i] == t.list; ++i) {
          const int64_t first = low[i], last = std::min<int64_t>(high[i], p.total - p.length + i + 1);
          if (first >= last) continue;
          const bool none = t.low == t.high;
          const int64_t from = none ? first : std::min(t.low, first), to = none ? last : std::max(t.high, last);
          const int64_t wide = std::max(widest, last - first);
          // Apart: most of what lies between would be of no query.
          if (to - from > wide + kNearQueries) break;
          t.low = from, t.high = to, widest = wide;
        }
        t.end = i;
        tiles.push_back(t);
      }
    }
  return tiles;
}

// The keys of one tile at a time: those of its list, then its range. T: of what is stored; C: of what is multiplied.
template <class T, class C>
class NearKeys : public Panels<C> {
 public:
  using Base = Panels<C>;
  using Base::ld, Base::N, Base::W;
  using typename Base::A;

  NearKeys(const NearAttentionParams& params, int64_t most_keys)
      : Base(params.head_dim), p(params), places_(round_up(most_keys, N)), positions_(round_up(most_keys, N)) {}

 protected:
  // How many there are.
  int64_t enter(const NearTile& tile) {
    tile_ = tile, listed_ = 0;
    int64_t last = -1;
    for (int64_t j = 0; tile.list >= 0 && j < p.list_size; ++j) {
      const int32_t place = p.listed[tile.list * p.list_size + j];
      if (place < 0 || place > own(tile.end - 1)) continue;
      places_[listed_++] = place;
      last = std::max<int64_t>(last, place);
    }
    later_ = last > own(tile.begin);
    int64_t n = listed_;
    for (int64_t j = tile.low; j < tile.high; ++j) places_[n++] = static_cast<int32_t>(j);
    std::copy(places_.begin(), places_.begin() + n, positions_.begin());
    return n;
  }

  int64_t own(int64_t query) const { return p.total - p.length + query; }

  // The columns of its range that a query sees.
  std::pair<int64_t, int64_t> range(int64_t query) const {
    const int64_t at = tile_.row * p.length + query;
    const int64_t low = p.low[at], high = std::min<int64_t>(p.high[at], own(query) + 1);
    if (low >= high) return {listed_, listed_};
    return {listed_ + low - tile_.low, listed_ + high - tile_.low};
  }

  bool sees(int64_t query, int64_t column) const {
    if (column < listed_) return places_[column] <= own(query);
    const auto [low, high] = range(query);
    return column >= low && column < high;
  }

  // How many of the n columns a query sees.
  int64_t count(int64_t query, int64_t n) const {
    const auto [low, high] = range(query);
    if (!later_) return listed_ + high - low;
    int64_t seen = 0;
    for (int64_t j = 0; j < n; ++j) seen += sees(query, j);
    return seen;
  }

  // Scores of the n columns from k0, of a query: -inf where it does not see them, and up to whole vectors.
  void hide(A* scores, int64_t query, int64_t k0, int64_t n) const {
    constexpr A nothing = -std::numeric_limits<A>::infinity();
    const int64_t padded = round_up(n, W);
    if (later_) mask_later<A>(scores, positions_.data() + k0, static_cast<Position<A>>(own(query)), padded);
    const auto [low, high] = range(query);
    const auto fill = [&](int64_t from, int64_t to) {
      from = std::max<int64_t>(from - k0, 0), to = std::min(to - k0, padded);
      if (from < to) std::fill(scores + from, scores + to, nothing);
    };
    fill(listed_, low);
    fill(high, k0 + padded);
  }

  // Rows of a head at these places of the tile's row.
  void gather(C* dst, const TokenRows<const void*>& from, int64_t head, int64_t count, const int32_t* places,
              int64_t first) const {
    const T* data = static_cast<const T*>(from.data) + tile_.row * from.batch + head * from.head;
    for (int64_t i = 0; i < count; ++i, dst += ld) {
      const T* src = data + (places ? places[i] : first + i) * from.token;
      if constexpr (std::is_same_v<C, T>)
        move(dst, src, p.head_dim);
      else
        copy(dst, src, p.head_dim, A(1));
      if (ld > p.head_dim) std::memset(static_cast<void*>(dst + p.head_dim), 0, (ld - p.head_dim) * sizeof(C));
    }
  }

  const NearAttentionParams& p;
  NearTile tile_;
  int64_t listed_ = 0;  // columns of its list
  bool later_ = false;  // whether one of them is after a query
  std::vector<int32_t> places_;
  std::vector<Position<A>> positions_;
};

inline int64_t most_keys(const NearAttentionParams& p, const std::vector<NearTile>& tiles) {
  int64_t most = 1;
  for (const NearTile& t : tiles) most = std::max(most, t.most_keys(p));
  return most;
}

// Multiply-adds of one product of queries and keys, over all heads, times two.
inline double near_flops(const NearAttentionParams& p, const std::vector<NearTile>& tiles) {
  double pairs = 0;
  for (const NearTile& t : tiles) pairs += static_cast<double>((t.end - t.begin) * t.most_keys(p));
  return 2 * pairs * static_cast<double>(p.heads / p.groups * p.head_dim);
}

}  // namespace LINMU_ISA
}  // namespace linmu
