// Fixed-width vectors through the compiler's vector extension: one source for AVX2, AVX-512 and NEON.
// A + * and comparisons work on them as on scalars; a * b + c becomes a fused multiply-add.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../linmu/common.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LINMU_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LINMU_VECTOR_BYTES 32
#else
#define LINMU_VECTOR_BYTES 16
#endif

namespace linmu {
namespace LINMU_ISA {

template <class A>
struct Simd {
  typedef A V __attribute__((vector_size(LINMU_VECTOR_BYTES)));
  static constexpr int width = LINMU_VECTOR_BYTES / sizeof(A);
};
template <class A>
using vec = typename Simd<A>::V;

using vf = vec<float>;
using vd = vec<double>;
typedef int32_t vi __attribute__((vector_size(LINMU_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(LINMU_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(LINMU_VECTOR_BYTES / 2)));

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(f16 x) { return static_cast<float>(x); }
inline float widen(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
template <class T>
inline T narrow(acc_t<T> x) {
  return static_cast<T>(x);
}
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // round to nearest even
}

template <class A>
inline vec<A> splat(A x) {
  return x - vec<A>{};  // x - 0 is x for every x, so no instruction is spent
}

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vd load(const double* p) {
  vd v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < Simd<float>::width; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, vd v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof(h));
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu nan = (u >> 16) | 0x40;
  vh h = __builtin_convertvector(v == v ? rounded : nan, vh);
  std::memcpy(p, &h, sizeof(h));
#endif
}
inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Simd<float>::width; ++i) p[i] = static_cast<f16>(v[i]);
#endif
}

// Past the caches: of what is written once and is larger than they are, a store would first fetch every line. The
// address is a multiple of the vector's size; `finish_streams` before another thread reads.
template <class T>
inline void stream(T* p, vec<acc_t<T>> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(p, (__m512)v);
  if constexpr (std::is_same_v<T, bf16> || std::is_same_v<T, f16>) {
    alignas(32) T narrowed[Simd<float>::width];
    store(narrowed, v);
    __m256i bits;
    std::memcpy(&bits, narrowed, sizeof(bits));
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
  }
#endif
  store(p, v);
}
inline void finish_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
// Whether `rows` of `dim` that start at p can be streamed, and are larger than caches are.
template <class T>
inline bool worth_streaming(const T* p, int64_t rows, int64_t dim) {
  constexpr int64_t kCaches = 16 << 20;
  return reinterpret_cast<uintptr_t>(p) % 64 == 0 && dim % Simd<acc_t<T>>::width == 0 &&
         rows * dim * static_cast<int64_t>(sizeof(T)) > kCaches;
}

// The first n < width lanes; the others read as zero and are not written.
template <class T>
inline vec<acc_t<T>> load_n(const T* p, int n) {
  alignas(64) T buffer[Simd<acc_t<T>>::width] = {};
  std::memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_n(T* p, vec<acc_t<T>> v, int n) {
  alignas(64) T buffer[Simd<acc_t<T>>::width];
  store(buffer, v);
  std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
}

// Whole vectors, then what is left: for_each_vector<A>(n, [&](int64_t i, auto lanes) { lanes.store(y + i, ...); }).
struct AllLanes {
  template <class T>
  vec<acc_t<T>> load(const T* p) const {
    return LINMU_ISA::load(p);
  }
  template <class T>
  void store(T* p, vec<acc_t<T>> v) const {
    LINMU_ISA::store(p, v);
  }
  template <class T>
  void stream(T* p, vec<acc_t<T>> v) const {
    LINMU_ISA::stream(p, v);
  }
  template <class V>
  V only(V v) const {
    return v;
  }
};
struct SomeLanes {
  int n;
  template <class T>
  vec<acc_t<T>> load(const T* p) const {
    return load_n(p, n);
  }
  template <class T>
  void store(T* p, vec<acc_t<T>> v) const {
    store_n(p, v, n);
  }
  template <class T>
  void stream(T* p, vec<acc_t<T>> v) const {
    store_n(p, v, n);
  }
  template <class V>
  V only(V v) const {  // 0 in the lanes that are not there
    for (int i = n; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) v[i] = 0;
    return v;
  }
};
template <class A, class F>
inline void for_each_vector(int64_t n, F&& f) {
  constexpr int W = Simd<A>::width;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, AllLanes{});
  if (i < n) f(i, SomeLanes{static_cast<int>(n - i)});
}

template <class A>
inline A sum(typename Simd<A>::V v) {
  A s = 0;
  for (int i = 0; i < Simd<A>::width; ++i) s += v[i];
  return s;
}
#if defined(__AVX512F__)
template <>
inline float sum<float>(vf v) {
  return _mm512_reduce_add_ps((__m512)v);
}
#endif

inline vf exp_polynomial(vf r) {
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp to 1-2 ulp in float; below -87.3 it is 0, which is what a decay that small means.
inline vf exp(vf x) {
  const vf low = splat(-87.336f), high = splat(88.376f);
#if defined(__AVX512F__)
  // In this order a NaN stays one; scalef multiplies by 2^n.
  const __m512 clamped = _mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
  const vf n =
      (vf)_mm512_roundscale_ps((__m512)((vf)clamped * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = (vf)clamped - n * 0.693145752f;
  return (vf)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ),
                                    (__m512)exp_polynomial(r - n * 1.42860677e-6f), (__m512)n);
#else
  vf clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  vf n = clamped * 1.44269504f;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  n = (n + magic) - magic;
  vf r = clamped - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  const vf p = exp_polynomial(r);
  vi e = __builtin_convertvector(n, vi);
  vf scaled = (vf)((vi)p + (e << 23));
  scaled = x < low ? vf{} : scaled;
  return x == x ? scaled : x;
#endif
}
inline vd exp(vd x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
inline V reciprocal(V x) {
  return 1 / x;
}
#if defined(__AVX512F__)
// An estimate to 14 bits and one step of Newton's: 1 ulp, in a third of the time of a division. Of numbers above 0.
inline vf reciprocal(vf x) {
  const vf estimate = (vf)_mm512_rcp14_ps((__m512)x);
  return estimate * (2.0f - x * estimate);
}
#endif

// 1 / (1 + exp(-x)), through exp(-|x|) alone.
template <class V>
inline V sigmoid(V x) {
  const V e = exp((V)((decltype(x < 0))x | (decltype(x < 0))(-V{})));  // the sign bit set: -|x|
  const V s = reciprocal(V(1 + e));
  return x < 0 ? e * s : s;
}

// log(1 + exp(x)), x above 20 as in PyTorch; log1p(u) = 2 atanh(u / (2 + u)), whose argument is at most 1/3.
inline vf softplus(vf x) {
  const vf zero{}, u = exp(x > zero ? -x : x), s = u / (u + 2.0f), z = s * s;
  vf p = splat(1.0f / 15);
  p = p * z + 1.0f / 13;
  p = p * z + 1.0f / 11;
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  p = p * z + 1.0f;
  const vf y = (x > zero ? x : zero) + 2.0f * s * p;
  return x > splat(20.0f) ? x : y;
}

template <class A>
inline A softplus(A x) {
  return x > A(20) ? x : std::log1p(std::exp(x));
}

inline vd softplus(vd x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = softplus(x[i]);
  return x;
}

}  // namespace LINMU_ISA
}  // namespace linmu
