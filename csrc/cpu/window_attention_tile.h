// What the forward and the backward of window_attention share: rows gathered from where tokens lie (rotary applied on
// the way), their packed forms, the exponential, and dynamic scheduling of tasks.
#pragma once
#include <atomic>
#include <limits>

#include "../linmu/window_attention.h"
#include "tile_gemm.h"

namespace linmu {
namespace LINMU_ISA {

// Weights are powers of 2 in float, where those are cheap, and of e in double: exp(x) = power(x * kPerE).
template <class A>
constexpr A kPerE = std::is_same_v<A, float> ? A(1.4426950408889634) : A(1);

// x is 0 or less but for rounding (NaN stays); exactly 0 far below, so a bias of -inf is a mask. To 1 ulp, for weights
// that are then rounded to bfloat16 too: their sum is not.
inline vf power(vf x) {
#if defined(__AVX512F__)
  // Of a NaN and a number this returns the second. Of -inf the polynomial is a NaN, and 2^-inf of that is 0.
  x = (vf)_mm512_min_ps(_mm512_setzero_ps(), (__m512)x);
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < splat(-160.0f) ? splat(-160.0f) : x;
  x = x > vf{} ? vf{} : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x + magic) - magic;
#endif
  const vf r = x - n;
  vf p = splat(1.534581198e-4f);  // 2^r, minimax on [-1/2, 1/2]
  p = p * r + 1.339993139e-3f;
  p = p * r + 9.618488959e-3f;
  p = p * r + 5.550328777e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.931472057e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vf scaled = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
  return n < splat(-126.0f) ? vf{} : scaled;
#endif
}
inline vd power(vd x) { return exp(x > vd{} ? vd{} : x); }

// The largest lane; NaN lanes do not count.
template <class A>
inline A largest(typename Simd<A>::V v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_max_ps((__m512)v);
#endif
  A most = v[0];
  for (int i = 1; i < Simd<A>::width; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// The first n lanes of v, `fill` in the others.
template <class A>
inline vec<A> first_lanes(vec<A> v, int64_t n, A fill) {
  vec<A> lane;
  for (int i = 0; i < Simd<A>::width; ++i) lane[i] = static_cast<A>(i);
  return lane < splat(static_cast<A>(n)) ? v : splat(fill);
}

// table[base - c[0]], table[base - c[1]], ...
template <class A>
inline vec<A> gather(const A* table, int32_t base, const int32_t* c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return (vf)_mm512_i32gather_ps(_mm512_sub_epi32(_mm512_set1_epi32(base), _mm512_loadu_si512(c)), table, 4);
#endif
  vec<A> v;
  for (int i = 0; i < Simd<A>::width; ++i) v[i] = table[base - c[i]];
  return v;
}

// Integers as wide as A, so that comparing them selects lanes of A.
template <class A>
using Position = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;

// scores[j] = -inf where positions[j] is after `own`; n is a multiple of the vector's width.
template <class A>
inline void mask_later(A* scores, const Position<A>* positions, Position<A> own, int64_t n) {
  typedef Position<A> V __attribute__((vector_size(LINMU_VECTOR_BYTES)));
  for (int64_t j = 0; j < n; j += Simd<A>::width) {
    V at;
    std::memcpy(&at, positions + j, sizeof(at));
    store(scores + j, at > V{} + own ? splat(-std::numeric_limits<A>::infinity()) : load(scores + j));
  }
}

// dst = factor * src for n elements.
template <class D, class S>
inline void copy(D* dst, const S* src, int64_t n, acc_t<D> factor) {
  constexpr int W = Simd<acc_t<D>>::width;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i) * factor);
  if (i < n) store_n(dst + i, load_n(src + i, static_cast<int>(n - i)) * factor, static_cast<int>(n - i));
}

// dst = factor * (src rotated by (cos, sin)), or by the adjoint of that rotation; n elements, pairs (i, i + n / 2).
template <bool kAdjoint, class D, class S>
inline void rotate_halves(D* dst, const S* src, const acc_t<D>* cos, const acc_t<D>* sin, int64_t n, acc_t<D> factor) {
  constexpr int W = Simd<acc_t<D>>::width;
  const int64_t h = n / 2;
  const auto step = [&](int64_t i, auto get, auto put) {
    const auto a = get(src + i) * factor, b = get(src + h + i) * factor;
    const auto c = get(cos + i), d = get(cos + h + i), s = get(sin + i), t = get(sin + h + i);
    put(dst + i, kAdjoint ? a * c + b * t : a * c - b * s);
    put(dst + h + i, kAdjoint ? b * d - a * s : b * d + a * t);
  };
  int64_t i = 0;
  for (; i + W <= h; i += W) step(i, [](auto* p) { return load(p); }, [](D* p, auto v) { store(p, v); });
  const int rest = static_cast<int>(h - i);
  if (rest) step(i, [&](auto* p) { return load_n(p, rest); }, [&](D* p, auto v) { store_n(p, v, rest); });
}

// The same with pairs (2 i, 2 i + 1).
template <bool kAdjoint, class D, class S>
inline void rotate_pairs(D* dst, const S* src, const acc_t<D>* cos, const acc_t<D>* sin, int64_t n, acc_t<D> factor) {
  using A = acc_t<D>;
  constexpr int W = Simd<A>::width;
  typedef Position<A> vindex __attribute__((vector_size(LINMU_VECTOR_BYTES)));
  vindex partner;
  vec<A> sign;
  for (int i = 0; i < W; ++i) partner[i] = i ^ 1, sign[i] = (i & 1) == kAdjoint ? A(-1) : A(1);
  const auto step = [&](int64_t i, auto get, auto put) {
    const vec<A> x = get(src + i) * factor, c = get(cos + i), s = get(sin + i);
    const vec<A> rotated = kAdjoint ? __builtin_shuffle(x * s, partner) : __builtin_shuffle(x, partner) * s;
    put(dst + i, x * c + rotated * sign);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, [](auto* p) { return load(p); }, [](D* p, auto v) { store(p, v); });
  const int rest = static_cast<int>(n - i);
  if (rest) step(i, [&](auto* p) { return load_n(p, rest); }, [&](D* p, auto v) { store_n(p, v, rest); });
}

// n elements as they are.
template <class C>
inline void move(C* dst, const C* src, int64_t n) {
  constexpr int64_t step = LINMU_VECTOR_BYTES / sizeof(C);
  int64_t i = 0;
  for (; i + step <= n; i += step) std::memcpy(static_cast<void*>(dst + i), src + i, LINMU_VECTOR_BYTES);
  if (i < n) std::memcpy(static_cast<void*>(dst + i), src + i, (n - i) * sizeof(C));
}

// One row of P elements on its way in (kAdjoint false) or a gradient on its way out (kAdjoint true).
template <bool kAdjoint, class D, class S>
inline void rotate_row(const WindowAttentionParams& p, D* dst, const S* src, int64_t token, acc_t<D> factor) {
  const int64_t R = p.cos ? p.rotary_dim : 0;
  if (R) {
    const int64_t at = (p.rotary_batch ? token : token % p.length) * R;
    const auto* cos = static_cast<const acc_t<D>*>(p.cos) + at;
    const auto* sin = static_cast<const acc_t<D>*>(p.sin) + at;
    if (p.interleaved)
      rotate_pairs<kAdjoint>(dst, src, cos, sin, R, factor);
    else
      rotate_halves<kAdjoint>(dst, src, cos, sin, R, factor);
  }
  if constexpr (std::is_same_v<D, S> && !kAdjoint)
    move(dst + R, src + R, p.head_dim - R);
  else
    copy(dst + R, src + R, p.head_dim - R, factor);
}

template <class T>
inline const T* row(const WindowAttentionParams& p, const TokenRows<const void*>& rows, int64_t token, int64_t head) {
  const T* data = static_cast<const T*>(rows.data) + head * rows.head;
  if (rows.batch == p.length * rows.token) return data + token * rows.token;  // no division
  return data + token / p.length * rows.batch + token % p.length * rows.token;
}

// (a[0], b[0]), (a[1], b[1]), ...: two rows as one row of units.
inline void interleave(uint32_t* dst, const bf16* a, const bf16* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<uint32_t>(a[i].bits) | static_cast<uint32_t>(b[i].bits) << 16;
}

// Half of a common second-level cache; the rest is for packed operands and scores.
constexpr int64_t kCacheBytes = 512 << 10;

// Packed forms of rows of `size` elements: padded with zeros to `ld` elements, of which `units` hold them.
template <class Element>
struct Panels {
  using C = Element;
  using A = typename Compute<C>::Acc;
  using U = typename Compute<C>::Unit;
  static constexpr int pack = Compute<C>::pack, W = Simd<A>::width, N = kTileN<A>;

  const int64_t ld, units;

  explicit Panels(int64_t size) : ld(round_up(size, N)), units((size + pack - 1) / pack) {}

  // Rows as the B operand of a product that sums over them: row pairs interleaved where a unit holds two.
  const U* summed_over(U* buffer, const C* src, int64_t count) const {
    if constexpr (pack == 1) {
      return reinterpret_cast<const U*>(src);
    } else {
      for (int64_t i = 0; i < count; i += 2, buffer += ld) {
        if (i + 1 < count) {
          interleave(buffer, src + i * ld, src + (i + 1) * ld, ld);
        } else {
          for (int64_t j = 0; j < ld; ++j) buffer[j] = src[i * ld + j].bits;
        }
      }
      return buffer - (count + 1) / 2 * ld;
    }
  }

  int64_t panel() const { return units * N; }

  // Rows as the B operand of a product that sums over their elements: panels of N columns.
  void transposed(U* dst, const C* src, int64_t count) const {
    for (int64_t i = 0; i < count; i += N, dst += panel(), src += N * ld)
      transpose(dst, N, reinterpret_cast<const U*>(src), ld / pack, std::min<int64_t>(N, count - i), units, N);
  }

  // A query's scores against a block of keys become weights, exp(score - maximum), which may lie in the same memory.
  // `max` and `sum` are of all blocks so far; earlier blocks' sums, and `out`, are rescaled when the maximum moves.
  void weigh(const A* scores, C* weights, int64_t padded, A per_score, bool first, A& max, A& sum, A* out) const {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    vec<A> top = splat(-infinity);
    for (int64_t j = 0; j < padded; j += W) {
      const vec<A> t = load(scores + j);
      top = t > top ? t : top;
    }
    const A before = first ? -infinity : max, most = largest<A>(top), now = most > before ? most : before;
    max = now;
    // All scores -inf so far (a bias, or a block of later keys): their weights are 0, not NaN; if it stays so, 0 / 0
    // at the end.
    const A from = now == -infinity ? A(0) : now;
    vec<A> sums{};
    for (int64_t j = 0; j < padded; j += W) {
      const vec<A> e = power((load(scores + j) - from) * per_score);
      sums += e;
      store(weights + j, e);
    }
    const A total = linmu::LINMU_ISA::sum<A>(sums);
    if (first) {
      sum = total;
    } else if (before == now) {
      sum += total;
    } else {
      const A shrink = power(splat((before - now) * per_score))[0];
      sum = sum * shrink + total;
      for (int64_t j = 0; j < ld; j += W) store(out + j, load(out + j) * shrink);
    }
  }
};

// Those of one element type, of the rows of windows.
template <class T>
struct Packing : Panels<compute_t<T>> {
  using Base = Panels<compute_t<T>>;
  using Base::ld, Base::N, Base::pack, Base::units, Base::W;
  using typename Base::A, typename Base::C, typename Base::U;

  const WindowAttentionParams& p;

  explicit Packing(const WindowAttentionParams& params) : Base(params.head_dim), p(params) {}

  // `count` rows of each of `heads` heads from `head`; a head's rows one after another, the heads `apart` elements.
  // All heads of a token are read before the next: its row is one stretch of memory, tokens lie far apart.
  void rows(C* dst, const TokenRows<const void*>& from, const int32_t* tokens, int64_t count, int64_t head,
            int64_t heads, int64_t apart, bool rotate) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        C* to = dst + h * apart + i * ld;
        const T* src = row<T>(p, from, tokens[i], head + h);
        if (rotate && p.cos)
          rotate_row<false>(p, to, src, tokens[i], A(1));
        else if constexpr (std::is_same_v<C, T>)
          move(to, src, p.head_dim);
        else
          copy(to, src, p.head_dim, A(1));
        if (ld > p.head_dim) std::memset(static_cast<void*>(to + p.head_dim), 0, (ld - p.head_dim) * sizeof(C));
      }
  }

  // Key/value heads that are read together: as many as leave every thread enough tasks and fit in cache, `tensors`
  // rows each.
  int64_t heads_together(int64_t tensors) const {
    const int64_t bytes = tensors * p.max_tokens * ld * static_cast<int64_t>(sizeof(C));
    const int64_t enough = p.num_windows * p.groups / (16 * p.threads.count);
    return std::clamp<int64_t>(std::min(enough, kCacheBytes / std::max<int64_t>(bytes, 1)), 1, p.groups);
  }

  // Positions of n tokens for `mask_later`, padded to whole tiles. A window lies in one row of the batch, so flat
  // positions are in the order of those within it.
  void positions(Position<A>* dst, const int32_t* tokens, int64_t n) const {
    std::copy(tokens, tokens + n, dst);
    std::fill(dst + n, dst + round_up(n, N), Position<A>(0));
  }

  // The memory of a row that will be written soon.
  void prefetch_output(const void* data, int64_t token, int64_t head, int64_t heads) const {
    const T* at = static_cast<const T*>(data) + (token * heads + head) * p.head_dim;
    for (int64_t i = 0; i < p.head_dim; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(at + i, 1, 2);
  }
};

// Runs make()(task) for every task; each thread makes one worker and takes the next task when it is done with one.
// Tasks write disjoint memory, so who runs which does not show in the result.
template <class Make>
void run_dynamic(const Threads& threads, int64_t tasks, double flops, Make make) {
  const int64_t useful = std::min<int64_t>(tasks, 1 + static_cast<int64_t>(flops / 1e6));
  std::atomic<int64_t> next{0};
  threads.run(std::min<int64_t>(threads.count, useful), 1, [&](int64_t, int64_t) {
    auto worker = make();
    for (int64_t task; (task = next++) < tasks;) worker(task);
  });
}

// Zero rows of (B, L, heads, P) at tokens outside every window.
template <class T>
void zero_uncovered(const WindowAttentionParams& p, void* data, int64_t heads) {
  if (!p.covered) return;
  const int64_t size = heads * p.head_dim;
  p.threads.run(p.batch * p.length, 1 + 65536 / (size + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (!p.covered[t]) std::memset(static_cast<void*>(static_cast<T*>(data) + t * size), 0, size * sizeof(T));
  });
}

// Multiply-adds of one product of every window's queries and keys, over all heads, times two.
inline double product_flops(const WindowAttentionParams& p) {
  double pairs = 0;
  for (int64_t w = 0; w < p.num_windows; ++w) {
    const double n = p.offsets[w + 1] - p.offsets[w];
    pairs += n * n;
  }
  return 2 * pairs * static_cast<double>(p.heads * p.head_dim);
}

}  // namespace LINMU_ISA
}  // namespace linmu
