// What the scan and its gradient share: how heads are split into tasks, how a chunk is gathered, and its decays.
//
// A chunk is Q visits. Within it, direction d weighs visit j in visit i's output by exp(S_i - S_j), S the cumulative
// log-decay from the side where the direction enters (for the reverse scan: from the right). Differences are taken
// beyond A's precision, and exps are factored over blocks of W visits with anchors at their edges,
//     exp(S_i - S_j) = row_i * block_IJ * col_j,
// each factor an exp of something <= 0; blocks on the diagonal take their exps one by one. A restart between i and j
// makes one of the three factors an exact 0, so segments cost nothing further.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../linmu/ssd_scan.h"
#include "gemm.h"

namespace linmu {
namespace LINMU_ISA {

// A type in which a chunk's worth of A sums exactly enough that what cancels, cancels.
template <class A>
using wide_t = std::conditional_t<std::is_same_v<A, double>, long double, double>;

// Heads [first, last) that share a B and a C group, so also C B^T.
constexpr int64_t kBundle = 4;
constexpr int64_t kTasks = 4;  // that bundles leave at least; of shapes alone, so that threads don't change a bit

struct ScanSizes {
  int64_t chunk, chunks;        // visits per chunk, a multiple of the vector width
  int64_t head_dim, state_dim;  // rounded up to it
  int64_t per_x, per_b, per_c;  // heads per group
  int64_t bundle;               // heads per bundle, divides heads
  int64_t state;                // elements of one padded state
};

// In bundles of at most `most` heads.
template <class A>
inline ScanSizes scan_sizes(const SsdScanParams& p, int64_t most = kBundle) {
  constexpr int64_t W = Simd<A>::width;
  ScanSizes s;
  const int64_t wanted = p.chunk > 0 ? std::min<int64_t>(p.chunk, 256) : 64;
  s.chunk = round_up(std::max<int64_t>(std::min(wanted, p.length), 1), W);
  s.chunks = (p.length + s.chunk - 1) / s.chunk;
  s.head_dim = round_up(p.head_dim, W), s.state_dim = round_up(p.state_dim, W);
  s.per_x = p.heads / p.groups_x, s.per_b = p.heads / p.groups_b, s.per_c = p.heads / p.groups_c;
  s.state = std::max(s.head_dim * round_up(p.state_dim, W), s.state_dim * round_up(p.head_dim, W));
  s.bundle = 1;
  for (int64_t n = 2; n <= most && p.batch * p.heads >= n * kTasks; ++n)
    if (s.per_b % n == 0 && s.per_c % n == 0 && (s.per_x % n == 0 || n % s.per_x == 0)) s.bundle = n;
  return s;
}

// One chunk of one batch row: which tokens its visits are, and their segments in both directions.
struct Chunk {
  explicit Chunk(int64_t size)
      : tokens(size), keep(size), segment{std::vector<int32_t>(size), std::vector<int32_t>(size)} {}

  void move_to(const SsdScanParams& p, const ScanSizes& s, int64_t b, int64_t index) {
    batch = b;
    const int64_t t0 = index * s.chunk, L = p.length;
    visits = std::min(s.chunk, L - t0);
    const auto token_at = [&](int64_t t) { return b * L + (p.token_order ? p.token_order[b * L + t] : t); };
    for (int64_t i = 0; i < visits; ++i) {
      tokens[i] = token_at(t0 + i) - b * L;
      keep[i] = !p.reverse.mask || p.reverse.mask[b * L + tokens[i]];
    }
    for (int64_t i = visits; i < s.chunk; ++i) tokens[i] = 0, keep[i] = 0;
    const int32_t* seq = p.forward.seq_idx;
    for (int64_t i = 0, n = 0; i < s.chunk; ++i) {
      if (seq && i < visits && t0 + i > 0) n += seq[token_at(t0 + i)] != seq[token_at(t0 + i - 1)];
      segment[0][i] = static_cast<int32_t>(n);
    }
    seq = p.reverse.seq_idx;
    for (int64_t i = s.chunk - 1, n = 0; i >= 0; --i) {
      if (seq && t0 + i + 1 < L) n += seq[token_at(t0 + i)] != seq[token_at(t0 + i + 1)];
      segment[1][i] = static_cast<int32_t>(n);
    }
  }

  int64_t batch = 0, visits = 0;
  std::vector<int64_t> tokens;
  std::vector<uint8_t> keep;  // takes part in the reverse scan
  std::vector<int32_t> segment[2];
};

// The decays of one head, one direction and one chunk.
template <class A>
class Decays {
 public:
  static constexpr int W = Simd<A>::width;

  explicit Decays(int64_t size)
      : raw(size),
        step(size),
        weight(size),
        row(size),
        col(size),
        carry(size),
        leave(size),
        block(round_up((size / W) * (size / W), W)),
        sum_(size),
        sum_high_(size),
        sum_low_(size),
        segment_(size),
        block_low_(round_up((size / W) * (size / W), W)),
        size_(size),
        blocks_(size / W) {}

  void move_to(const SsdScanParams& p, const Chunk& c, int64_t h, bool reverse) {
    reverse_ = reverse;
    read(p, c, h);
    accumulate(p, h);
    const int64_t enter = reverse ? W - 1 : 0, exit = W - 1 - enter;  // anchors of a block's rows and columns
    const int64_t last = reverse ? 0 : size_ - 1;
    for (int64_t i = 0; i < size_; i += W) {
      const Place here = at(i), start = spread(i + enter), end = spread(i + exit);
      store(row + i, between(here, start));
      store(col + i, between(end, here));
      store(carry + i, between(here, Place{}));
      store(leave + i, between(spread(last), here));
    }
    total = between(spread(last), Place{})[0];
    for (int64_t i = 0; i < blocks_; ++i)
      for (int64_t j = 0; j < blocks_; ++j) {
        const int64_t to = i * W + enter, from = j * W + exit, k = i * blocks_ + j;
        const bool on = (reverse ? j > i : j < i) && segment_[to] == segment_[from];
        const wide_t<A> x = on ? sum_[to] - sum_[from] : kNever;
        block[k] = static_cast<A>(x), block_low_[k] = static_cast<A>(x - block[k]);
      }
    for (int64_t k = 0; k < blocks_ * blocks_; k += W) {
      const vec<A> e = exp(load(block + k));
      store(block + k, e * load(block_low_ + k) + e);
    }
  }

  // exp(S_i - S_j) for the W visits j of i's own block, 0 where j is not before i in this direction.
  vec<A> diagonal(int64_t i) const {
    const int64_t j0 = i / W * W;
    const vec<A> mine = splat(static_cast<A>(i - j0)), index = iota();
    const vec<A> e = between(spread(i), at(j0));
    return (reverse_ ? index >= mine : index <= mine) ? e : vec<A>{};
  }

  A at_block(int64_t i, int64_t j) const { return block[i * blocks_ + j]; }

  Buffer<A> raw;                     // dt + bias, before softplus
  Buffer<A> step;                    // dt as used; 0 where the visit is skipped
  Buffer<A> weight;                  // of this direction in the output
  Buffer<A> row, col, carry, leave;  // carry_i: from the chunk's entry to i; leave_j: from j to its exit
  Buffer<A> block;
  A total = A(0);      // from entry to exit
  double steps = 0;    // sum of |step|
  double weights = 1;  // no weight of a visit exceeds it
  double growth = 1;   // no product of decays exceeds it: 1, unless a step is negative

 private:
  static constexpr A kNothing = A(-1024);                             // so is exp of this
  static constexpr A kNever = A(-1267650600228229401496703205376.0);  // -2^100: exp of it is 0

  // Log-decays summed up to a visit, in two parts, and its segment; of W visits.
  struct Place {
    vec<A> high{}, low{}, segment{};
  };
  Place at(int64_t i) const { return {load(sum_high_ + i), load(sum_low_ + i), load(segment_ + i)}; }
  Place spread(int64_t i) const { return {splat(sum_high_[i]), splat(sum_low_[i]), splat(segment_[i])}; }

  // exp(S_to - S_from), 0 across a restart. The difference is kept in two parts as well: rounding it to one would cost
  // as many units in the last place as it is long.
  static vec<A> between(const Place& to, const Place& from) {
    const vec<A> x = to.high - from.high, back = x - to.high;
    const vec<A> rest = (to.high - (x - back)) - (from.high + back) + (to.low - from.low);
    const vec<A> high = x + rest, low = x - high + rest;
    const vec<A> e = exp(high);
    return to.segment == from.segment ? e * low + e : vec<A>{};
  }

  static vec<A> iota() {
    vec<A> v{};
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) v[w] = A(w);
    return v;
  }

  void read(const SsdScanParams& p, const Chunk& c, int64_t h) {
    const SsdScanDirection& d = reverse_ ? p.reverse : p.forward;
    const A* dt = static_cast<const A*>(d.dt) + c.batch * p.length * p.heads + h;
    const A bias = d.dt_bias ? static_cast<const A*>(d.dt_bias)[h] : A(0);
    const A* gate = static_cast<const A*>(p.gate);
    if (gate) gate += p.gate_per_token ? c.batch * p.length * p.heads + h : h;
    for (int64_t i = 0; i < c.visits; ++i) step[i] = raw[i] = dt[c.tokens[i] * p.heads] + bias;
    for (int64_t i = c.visits; i < size_; ++i) step[i] = raw[i] = A(0);
    if (p.dt_softplus)
      for (int64_t i = 0; i < size_; i += W) store(step + i, softplus(load(raw + i)));
    for (int64_t i = 0; i < size_; ++i) {
      const bool on = i < c.visits && (!reverse_ || c.keep[i]);
      weight[i] = on ? A(1) : A(0);
      step[i] = on ? step[i] : A(0);
      segment_[i] = static_cast<A>(c.segment[reverse_][i]);
    }
    weights = 1;
    if (!gate) return;
    for (int64_t i = 0; i < c.visits; ++i) {
      const A g = gate[p.gate_per_token ? c.tokens[i] * p.heads : 0];
      if (!c.keep[i]) continue;
      weight[i] = reverse_ ? 1 - g : g;
      weights += std::abs(static_cast<double>(weight[i]));
    }
  }

  void accumulate(const SsdScanParams& p, int64_t h) {
    const wide_t<A> rate = static_cast<const A*>((reverse_ ? p.reverse : p.forward).A)[h];
    wide_t<A> s = 0, up = 0, length = 0, last = segment_[reverse_ ? size_ - 1 : 0];
    bool numbers = true;
    for (int64_t k = 0; k < size_; ++k) {
      const int64_t i = reverse_ ? size_ - 1 - k : k;
      // Sums are compared within a segment only, and so see nothing of another.
      if (segment_[i] != last) s = 0;
      last = segment_[i];
      // A step longer than this leaves nothing either, and would drown the steps after it in the sum.
      const wide_t<A> x = step[i] * rate, change = x < kNothing ? kNothing : x;
      length += std::abs(step[i]), up += change > 0 ? change : 0;
      sum_[i] = s += change, numbers = numbers && s == s;
      sum_high_[i] = static_cast<A>(s), sum_low_[i] = static_cast<A>(s - sum_high_[i]);
    }
    steps = numbers ? static_cast<double>(length) : std::numeric_limits<double>::quiet_NaN(),
    growth = std::exp(static_cast<double>(up));
  }

  Buffer<wide_t<A>> sum_;
  Buffer<A> sum_high_, sum_low_, segment_, block_low_;
  int64_t size_, blocks_;
  bool reverse_ = false;
};

// The chunk's rows of one group, widened, zeros beyond its visits and, to the vector's end, beyond dim.
template <class T>
inline void gather(const SsdScanTensor& t, const Chunk& c, int64_t group, int64_t dim, int64_t size, acc_t<T>* out,
                   int64_t ld = 0) {
  using A = acc_t<T>;
  constexpr int64_t W = Simd<A>::width;
  if (!ld) ld = round_up(dim, W);
  const T* data = static_cast<const T*>(t.data) + c.batch * t.batch_stride + group * t.group_stride;
  for (int64_t i = 0; i < c.visits; ++i, out += ld) {
    const T* src = data + c.tokens[i] * t.token_stride;
    int64_t n = 0;
    for (; n + W <= dim; n += W) store(out + n, load(src + n));
    if (n < dim) store(out + n, load_n(src + n, static_cast<int>(dim - n)));
  }
  std::fill(out, out + (size - c.visits) * ld, A(0));
}

// The rows of one group that visits [t0, t0 + size) read: they are far apart, and no hardware prefetcher guesses them.
template <class T>
inline void prefetch(const SsdScanTensor& t, const SsdScanParams& p, int64_t b, int64_t t0, int64_t size, int64_t group,
                     int64_t dim) {
  const T* data = static_cast<const T*>(t.data) + b * t.batch_stride + group * t.group_stride;
  for (int64_t i = std::max<int64_t>(t0, 0); i < std::min(t0 + size, p.length); ++i) {
    const T* row = data + (p.token_order ? p.token_order[b * p.length + i] : i) * t.token_stride;
    for (int64_t n = 0; n < dim; n += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + n, 0, 3);
  }
}

#if defined(__AVX512BF16__)
// Two rows of float to one of pairs, rounded to bfloat16, each row times a factor if there are factors.
inline void pair_rows(const float* rows, int64_t n, int64_t ld, bf16x2* out, const float* factor = nullptr,
                      const float* second = nullptr) {
  for (int64_t i = 0; i < n; i += 2, rows += 2 * ld, out += ld) {
    const float f0 = factor ? factor[i] * second[i] : 1.0f, f1 = factor ? factor[i + 1] * second[i + 1] : 1.0f;
    for (int64_t j = 0; j < ld; j += Simd<float>::width) {
      const vf even = load(rows + j) * f0, odd = load(rows + ld + j) * f1;
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
      _mm512_storeu_si512(out + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// gather, and two rows to one of pairs; n rows, zeros beyond the chunk's visits and beyond dim.
inline void gather_pairs(const SsdScanTensor& t, const Chunk& c, int64_t group, int64_t dim, int64_t n, bf16x2* out) {
  constexpr int64_t W = Simd<float>::width;
  const int64_t ld = round_up(dim, W);
  const uint16_t* data = static_cast<const uint16_t*>(t.data) + c.batch * t.batch_stride + group * t.group_stride;
  for (int64_t i = 0; i < n; i += 2, out += ld) {
    const uint16_t *even = data + c.tokens[i] * t.token_stride, *odd = data + c.tokens[i + 1] * t.token_stride;
    for (int64_t j = 0; j < ld; j += W) {
      const unsigned mask = (1u << std::min(dim - j, W)) - 1;
      const auto read = [&](const uint16_t* row, int64_t visit) {
        const __mmask16 lanes = static_cast<__mmask16>(visit < c.visits ? mask : 0u);
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row + j));
      };
      _mm512_storeu_si512(out + j, _mm512_or_si512(read(even, i), _mm512_slli_epi32(read(odd, i + 1), 16)));
    }
  }
}
#endif

// out[i, :] = factor[i] * rows[i, :], or scaled by a second factor too.
template <class A>
inline void scale_rows(const A* rows, int64_t n, int64_t ld, const A* factor, const A* second, A* out) {
  for (int64_t i = 0; i < n; ++i, rows += ld, out += ld) {
    const A f = factor[i] * second[i];
    for (int64_t j = 0; j < ld; j += Simd<A>::width) store(out + j, load(rows + j) * f);
  }
}

// A state as the caller keeps it, (P, N), to or from a padded tile that is (P, N) or (N, P).
template <class A>
inline void load_state(const A* state, int64_t P, int64_t N, bool transposed, int64_t ld, int64_t size, A* out) {
  std::fill(out, out + size, A(0));
  if (!state) return;
  for (int64_t p = 0; p < P; ++p)
    for (int64_t n = 0; n < N; ++n) out[transposed ? n * ld + p : p * ld + n] = state[p * N + n];
}
template <class A>
inline void save_state(const A* tile, int64_t P, int64_t N, bool transposed, int64_t ld, A* state) {
  for (int64_t p = 0; p < P; ++p)
    for (int64_t n = 0; n < N; ++n) state[p * N + n] = tile[transposed ? n * ld + p : p * ld + n];
}

}  // namespace LINMU_ISA
}  // namespace linmu
