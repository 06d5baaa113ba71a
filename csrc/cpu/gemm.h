// Small matrix products on tiles that fit a core's cache: the accumulators stay in registers, B is read by rows,
// A is broadcast, so A may lie either way (row stride, column stride) and is never packed.
#pragma once
#include <cstdlib>
#include <new>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Uninitialised scratch of one task, aligned to a cache line.
template <class A>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) {
    if (n == 0) return;
    data_ = static_cast<A*>(std::aligned_alloc(64, round_up(n * static_cast<int64_t>(sizeof(A)), 64)));
    if (!data_) throw std::bad_alloc();
  }
  Buffer(Buffer&& o) noexcept : data_(o.data_) { o.data_ = nullptr; }
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_);
    return *this;
  }
  ~Buffer() { std::free(data_); }
  operator A*() const { return data_; }
  A* get() const { return data_; }

 private:
  A* data_ = nullptr;
};

// What a product multiplies: single values, or pairs of bfloat16 that are adjacent in the summed dimension, which one
// instruction multiplies and adds in float.
template <class U>
struct Operand {
  using Sum = U;
  using Vector = vec<U>;
  static Vector read(const U* p) { return load(p); }
  static vec<U> multiply_add(Vector b, U a, vec<U> sum) { return b * a + sum; }
};
struct bf16x2 {
  uint32_t bits;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16x2> {
  using Sum = float;
  using Vector = __m512bh;
  static Vector read(const bf16x2* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vf multiply_add(Vector b, bf16x2 a, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a.bits)), b);
  }
};
#endif
template <class U>
using sum_t = typename Operand<U>::Sum;

// What a product does with its result: out = beta * old + scale[row] * sum. beta 0 never reads old.
template <class A>
struct Epilogue {
  A beta = A(0);
  const A* scale = nullptr;  // one factor per row, or null
  const A* old = nullptr;    // laid out as out, which it is if null
};

// kRows x kVectors accumulators, the B vectors and one A value fill the register file.
#if LINMU_VECTOR_BYTES == 32
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 6, kTileVectors = 4;
#endif

template <class U, int M, int V, class A = sum_t<U>>
inline void tile(int64_t k, const U* a, int64_t row_stride, int64_t col_stride, const U* b, int64_t ldb, A* out,
                 int64_t ldo, Epilogue<A> e) {
  constexpr int W = Simd<A>::width;
  vec<A> acc[M][V] = {};
  for (int64_t l = 0; l < k; ++l, a += col_stride, b += ldb) {
    typename Operand<U>::Vector bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bv[v] = Operand<U>::read(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const U x = a[m * row_stride];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = Operand<U>::multiply_add(bv[v], x, acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const A s = e.scale ? e.scale[m] : A(1);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      A* o = out + m * ldo + v * W;
      vec<A> r = acc[m][v] * s;
      if (e.beta != A(0)) r = load(e.old ? e.old + m * ldo + v * W : o) * e.beta + r;
      store(o, r);
    }
  }
}

template <class U, int V, class A = sum_t<U>>
inline void tile_column(int64_t m, int64_t k, const U* a, int64_t row_stride, int64_t col_stride, const U* b,
                        int64_t ldb, A* out, int64_t ldo, Epilogue<A> e) {
  for (int64_t tiles = (m + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t rows = (m + tiles - 1) / tiles;  // as even as possible: a tile of one row is slow
    switch (rows) {
      case 6: tile<U, 6, V>(k, a, row_stride, col_stride, b, ldb, out, ldo, e); break;
      case 5: tile<U, 5, V>(k, a, row_stride, col_stride, b, ldb, out, ldo, e); break;
      case 4: tile<U, 4, V>(k, a, row_stride, col_stride, b, ldb, out, ldo, e); break;
      case 3: tile<U, 3, V>(k, a, row_stride, col_stride, b, ldb, out, ldo, e); break;
      case 2: tile<U, 2, V>(k, a, row_stride, col_stride, b, ldb, out, ldo, e); break;
      default: tile<U, 1, V>(k, a, row_stride, col_stride, b, ldb, out, ldo, e); break;
    }
    m -= rows, a += rows * row_stride, out += rows * ldo;
    if (e.scale) e.scale += rows;
    if (e.old) e.old += rows * ldo;
  }
}

// out[i, j] = beta out[i, j] + scale[i] sum_l a[i row_stride + l col_stride] b[l ldb + j]; n a multiple of the width, k
// in units of U.
template <class U>
inline void gemm(int64_t m, int64_t n, int64_t k, const U* a, int64_t row_stride, int64_t col_stride, const U* b,
                 int64_t ldb, sum_t<U>* out, int64_t ldo, Epilogue<sum_t<U>> e = {}) {
  constexpr int W = Simd<sum_t<U>>::width;
  int64_t j = 0;
  const auto columns = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    for (; j + V * W <= n; j += V * W) {
      tile_column<U, V>(m, k, a, row_stride, col_stride, b + j, ldb, out + j, ldo, e);
      if (e.old) e.old += V * W;
    }
  };
  columns(std::integral_constant<int, kTileVectors>{});
  if constexpr (kTileVectors == 4) columns(std::integral_constant<int, 2>{});
  columns(std::integral_constant<int, 1>{});
}

// Swaps the off-diagonal D x D blocks of every 2D x 2D block of a square of vectors; for D = 1, 2, 4, ... a transpose.
template <class A, int D>
inline void swap_blocks(vec<A>* rows) {
  constexpr int W = Simd<A>::width;
  using Mask = decltype(vec<A>{} < vec<A>{});
  Mask low{}, high{};
#pragma GCC unroll 16
  for (int w = 0; w < W; ++w) low[w] = w & D ? W + w - D : w, high[w] = w & D ? W + w : w + D;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & D) continue;
    const vec<A> a = rows[i], b = rows[i + D];
    rows[i] = __builtin_shuffle(a, b, low), rows[i + D] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * D < W) swap_blocks<A, 2 * D>(rows);
}

// dst[j, i] = src[i, j] for a (rows, cols) tile whose sides are multiples of the width.
template <class A>
inline void transpose(const A* src, int64_t lds, int64_t rows, int64_t cols, A* dst, int64_t ldd) {
  constexpr int W = Simd<A>::width;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W) {
      vec<A> block[W];
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) block[w] = load(src + (i + w) * lds + j);
      swap_blocks<A, 1>(block);
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) store(dst + (j + w) * ldd + i, block[w]);
    }
}

}  // namespace LINMU_ISA
}  // namespace linmu
