// What the forward and the backward of window_attention share: rows gathered from where tokens lie (rotary applied on
// the way), their packed forms, the exponential, and the hand-out of tasks to threads.
#pragma once
#include <atomic>

#include "../linmu/window_attention.h"
#include "tile_gemm.h"

namespace linmu {
namespace LINMU_ISA {

// exp for x <= 0 (NaN stays), 1 ulp; exactly 0 far below, so a bias of -inf is a mask.
inline vf exp_below(vf x) {
  x *= 1.44269504f;
  x = x > splat(-160.0f) ? x : (x == x ? splat(-160.0f) : x);
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x + magic) - magic;
#endif
  const vf r = x - n;
  vf p = splat(1.534581198e-4f);  // 2^r, minimax on [-1/2, 1/2], 2e-9
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
inline vd exp_below(vd x) { return exp(x); }

template <class V>
inline V lower(V a, V b) {
  return a < b ? a : b;
}

// Lanes 0, 1, 2, ... below n.
template <class A>
inline auto lanes_below(int64_t n) {
  vec<A> lane;
  for (int i = 0; i < Simd<A>::width; ++i) lane[i] = static_cast<A>(i);
  return lane < splat(static_cast<A>(n));
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
  using Index = std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>;
  typedef Index vindex __attribute__((vector_size(LINMU_VECTOR_BYTES)));
  vindex partner;
  vec<A> sign;
  for (int i = 0; i < W; ++i) partner[i] = i ^ 1, sign[i] = (i & 1) == kAdjoint ? A(-1) : A(1);
  const auto step = [&](int64_t i, auto get, auto put) {
    const vec<A> x = get(src + i) * factor, c = get(cos + i), s = get(sin + i);
    const vec<A> turned = kAdjoint ? __builtin_shuffle(x * s, partner) : __builtin_shuffle(x, partner) * s;
    put(dst + i, x * c + turned * sign);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, [](auto* p) { return load(p); }, [](D* p, auto v) { store(p, v); });
  const int rest = static_cast<int>(n - i);
  if (rest) step(i, [&](auto* p) { return load_n(p, rest); }, [&](D* p, auto v) { store_n(p, v, rest); });
}

// One row of P elements on its way in (kAdjoint false) or a gradient on its way out (kAdjoint true).
template <bool kAdjoint, class D, class S>
inline void turn_row(const WindowAttentionParams& p, D* dst, const S* src, int64_t token, acc_t<D> factor) {
  const int64_t R = p.cos ? p.rotary_dim : 0;
  if (R) {
    const int64_t at = token / p.length * p.rotary_batch + token % p.length * R;
    const auto* cos = static_cast<const acc_t<D>*>(p.cos) + at;
    const auto* sin = static_cast<const acc_t<D>*>(p.sin) + at;
    if (p.interleaved)
      rotate_pairs<kAdjoint>(dst, src, cos, sin, R, factor);
    else
      rotate_halves<kAdjoint>(dst, src, cos, sin, R, factor);
  }
  if constexpr (std::is_same_v<D, S> && !kAdjoint)
    std::memcpy(static_cast<void*>(dst + R), src + R, (p.head_dim - R) * sizeof(D));
  else
    copy(dst + R, src + R, p.head_dim - R, factor);
}

template <class T>
inline const T* row(const WindowAttentionParams& p, const TokenRows<const void*>& rows, int64_t token, int64_t head) {
  return static_cast<const T*>(rows.data) + token / p.length * rows.batch + token % p.length * rows.token +
         head * rows.head;
}

// (a[0], b[0]), (a[1], b[1]), ...: two rows as one row of units.
inline void interleave(uint32_t* dst, const bf16* a, const bf16* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<uint32_t>(a[i].bits) | static_cast<uint32_t>(b[i].bits) << 16;
}

// Sizes and packed forms for one element type. Rows are padded with zeros to `ld` elements, `units` of them hold P.
template <class T>
struct Packing {
  using C = compute_t<T>;
  using A = acc_t<T>;
  using U = typename Compute<C>::Unit;
  static constexpr int pack = Compute<C>::pack, W = Simd<A>::width, N = kTileN<A>;

  const WindowAttentionParams& p;
  const int64_t ld, units;

  explicit Packing(const WindowAttentionParams& params)
      : p(params), ld(round_up(p.head_dim, N)), units((p.head_dim + pack - 1) / pack) {}

  // `count` rows of one head, one after another.
  void rows(C* dst, const TokenRows<const void*>& from, const int32_t* tokens, int64_t count, int64_t head,
            bool rotate) const {
    for (int64_t i = 0; i < count; ++i, dst += ld) {
      const T* src = row<T>(p, from, tokens[i], head);
      if (rotate && p.cos)
        turn_row<false>(p, dst, src, tokens[i], A(1));
      else if constexpr (std::is_same_v<C, T>)
        std::memcpy(static_cast<void*>(dst), src, p.head_dim * sizeof(T));
      else
        copy(dst, src, p.head_dim, A(1));
      std::memset(static_cast<void*>(dst + p.head_dim), 0, (ld - p.head_dim) * sizeof(C));
    }
  }

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

  // Rows as the B operand of a product that sums over P: panels of N columns.
  void transposed(U* dst, const C* src, int64_t count) const {
    for (int64_t i = 0; i < count; i += N, dst += panel(), src += N * ld)
      transpose(dst, N, reinterpret_cast<const U*>(src), ld / pack, std::min<int64_t>(N, count - i), units, N);
  }
};

// Runs make()(task) for every task; each thread makes one worker and takes the next task when it is done with one.
// Tasks write disjoint memory, so who runs which does not show in the result.
template <class Make>
void hand_out(const Threads& threads, int64_t tasks, double flops, Make make) {
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
