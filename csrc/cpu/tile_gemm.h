// Small matrix products on packed operands: C (+)= A B, C in registers, any M, N, K.
// An operand's element is a *unit*: one float or double, or two adjacent-in-K bfloat16 that one instruction multiplies
// and adds in float32. The order of a sum over K depends on K alone, not on M or N.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {

template <class C>
struct Compute {
  using Acc = C;
  using Unit = C;
  static constexpr int pack = 1;  // elements of K in a unit
  static vec<C> mac(vec<C> c, Unit a, const Unit* b) { return splat(a) * load(b) + c; }
};
#if defined(__AVX512BF16__)
template <>
struct Compute<bf16> {
  using Acc = float;
  using Unit = uint32_t;
  static constexpr int pack = 2;
  static vf mac(vf c, Unit a, const Unit* b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                (__m512bh)_mm512_loadu_si512(b));
  }
};
#endif

// What products of a stored type are computed in.
template <class T>
struct ComputeOf {
  using type = acc_t<T>;
};
#if defined(__AVX512BF16__)
template <>
struct ComputeOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using compute_t = typename ComputeOf<T>::type;

// Registers of C: 8 x 2 vectors of 32 with AVX-512, 4 x 2 of 16 elsewhere.
constexpr int kTileM = LINMU_VECTOR_BYTES == 64 ? 8 : 4;
template <class A>
constexpr int kTileN = 2 * Simd<A>::width;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// kAcross: A is stored as K rows of M units (its transpose), otherwise as M rows of K units.
template <class C, int M, int NV, bool kAcross>
inline void tile(int64_t K, const typename Compute<C>::Unit* a, int64_t lda, const typename Compute<C>::Unit* b,
                 int64_t ldb, typename Compute<C>::Acc* c, int64_t ldc, bool add) {
  using A = typename Compute<C>::Acc;
  constexpr int W = Simd<A>::width;
  vec<A> sum[M][NV];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = vec<A>{};
  for (int64_t k = 0; k < K; ++k, b += ldb) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const auto x = kAcross ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) sum[i][j] = Compute<C>::mac(sum[i][j], x, b + j * W);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < NV; ++j) {
      // Added at the end: a sum of short sums loses less than one long chain.
      if (add) sum[i][j] += load(c + i * ldc + j * W);
      store(c + i * ldc + j * W, sum[i][j]);
    }
}

template <class C, int NV, bool kAcross>
inline void column(int64_t M, int64_t K, const typename Compute<C>::Unit* a, int64_t lda,
                   const typename Compute<C>::Unit* b, int64_t ldb, typename Compute<C>::Acc* c, int64_t ldc,
                   bool add) {
  int64_t i = 0;
  const auto at = [&](int64_t r) { return a + (kAcross ? r : r * lda); };
  for (; i + kTileM <= M; i += kTileM) tile<C, kTileM, NV, kAcross>(K, at(i), lda, b, ldb, c + i * ldc, ldc, add);
  if constexpr (kTileM == 8)
    if (i + 4 <= M) tile<C, 4, NV, kAcross>(K, at(i), lda, b, ldb, c + i * ldc, ldc, add), i += 4;
  if (i + 2 <= M) tile<C, 2, NV, kAcross>(K, at(i), lda, b, ldb, c + i * ldc, ldc, add), i += 2;
  if (i < M) tile<C, 1, NV, kAcross>(K, at(i), lda, b, ldb, c + i * ldc, ldc, add);
}

// C (M x N, row stride ldc) (+)= A B. B's columns come in panels of kTileN: unit (k, n) at
// b[n / kTileN * panel + k * ldb + n % kTileN]. K counts units. C and B are readable up to N rounded up to a vector.
template <class C, bool kAcross = false>
inline void gemm(int64_t M, int64_t N, int64_t K, const typename Compute<C>::Unit* a, int64_t lda,
                 const typename Compute<C>::Unit* b, int64_t ldb, int64_t panel, typename Compute<C>::Acc* c,
                 int64_t ldc, bool add) {
  using A = typename Compute<C>::Acc;
  constexpr int W = Simd<A>::width;
  constexpr int64_t step = std::is_same_v<C, double> ? 32 : INT64_MAX;  // doubles are for accuracy, not for speed
  for (int64_t n = 0; n < N; n += kTileN<A>, b += panel)
    for (int64_t k = 0; k < std::max<int64_t>(K, 1); k += std::min(step, std::max<int64_t>(K, 1))) {
      const int64_t part = std::min(step, K - k);
      const auto* from = a + (kAcross ? k * lda : k);
      if (N - n > W)
        column<C, 2, kAcross>(M, part, from, lda, b + k * ldb, ldb, c + n, ldc, add || k);
      else
        column<C, 1, kAcross>(M, part, from, lda, b + k * ldb, ldb, c + n, ldc, add || k);
    }
}

#if defined(__AVX512F__)
// Sixteen rows of sixteen 4-byte units, of which `columns` are stored.
inline void transpose16(float* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t columns) {
  __m512 r[16], t[16];
  const __mmask16 mask = static_cast<__mmask16>(columns < 16 ? (1u << columns) - 1 : 0xffffu);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_maskz_loadu_ps(mask, src + i * lds) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  // r[4 i + j] then holds, in its quarter l, column 4 l + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even0 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88),
                 even1 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd),
                 odd1 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i < columns) _mm512_storeu_ps(dst + i * ldd, t[i]);
}
#endif

// dst[c * ldd + r] = src[r * lds + c] for r < rows and c < columns; zero for r from rows to width, whole vectors.
template <class U>
inline void transpose(U* dst, int64_t ldd, const U* src, int64_t lds, int64_t rows, int64_t columns, int64_t width) {
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 4) {
    for (int64_t r = 0; r < width; r += 16)
      for (int64_t c = 0; c < columns; c += 16)
        transpose16(reinterpret_cast<float*>(dst + c * ldd + r), ldd, reinterpret_cast<const float*>(src + r * lds + c),
                    lds, rows - r, columns - c);
    return;
  }
#endif
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) dst[c * ldd + r] = src[r * lds + c];
    for (int64_t r = rows; r < width; ++r) dst[c * ldd + r] = U(0);
  }
}

// One allocation, cut into aligned pieces: size it with a null Arena first.
class Arena {
 public:
  template <class X>
  X* take(int64_t n) {
    const int64_t at = used_;
    used_ += round_up(n * static_cast<int64_t>(sizeof(X)), 64);
    return reinterpret_cast<X*>(data_.get() + at);
  }
  void allocate() {
    data_.reset(static_cast<char*>(std::aligned_alloc(64, round_up(used_ + 1, 64))));
    if (!data_) throw std::bad_alloc();
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t used_ = 0;
};

}  // namespace LINMU_ISA
}  // namespace linmu
