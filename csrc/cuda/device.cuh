// What device code of this folder is written against. Everything that is CUDA's and not C++'s is here and in mma.cuh:
// with LINMU_EMULATE, tests/cuda/emulator.h gives the same names in plain C++, and the kernels run on a CPU.
#pragma once
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../linmu/common.h"

namespace linmu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Memory that the backward of a scan may take besides its results, unless a single range of chunks needs more.
constexpr int64_t kWorkspace = int64_t{8} << 30;
// Shared memory that one block may use. (sm_86 and sm_89 have 99 KiB.)
constexpr int64_t kSharedSm80 = 163 * 1024, kSharedSm90 = 227 * 1024;

inline void check_shared(const char* op, int64_t bytes, int64_t limit) {
  if (bytes > limit)
    throw std::invalid_argument(std::string(op) + ": needs " + std::to_string(bytes) +
                                " bytes of shared memory per block on CUDA, got " + std::to_string(limit));
}

// IEEE half precision as it lies in memory; linmu::f16 is the host compiler's type.
struct half16 {
  uint16_t bits;
};

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

}  // namespace linmu

#ifdef LINMU_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace linmu {

// Dynamic shared memory, aligned for the swizzled tiles of sm_90.
#define LINMU_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(half16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline half16 from_float<half16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Two values side by side, the first in the low half.
template <class T>
__device__ inline unsigned pack(float first, float second) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const unsigned*>(&both);
  }
}

__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(kAllLanes, x, mask); }
__device__ inline float shuffle(float x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ inline bool warp_any(bool x) { return __any_sync(kAllLanes, x); }
// Whether no two lanes of a warp have the same.
__device__ inline bool all_differ(int64_t x) {
  return __all_sync(kAllLanes, __match_any_sync(kAllLanes, x) == 1u << threadIdx.x % kWarp);
}
// Each lane of a warp adds to a place of its own, or, if null, to none.
__device__ inline void add_apart(float* to, float x) {
  if (to) *to += x;
}
// What all lanes of a warp have the same, so that the compiler knows.
__device__ inline int warp_uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }
// 2^x to 2 units in the last place; 0 for what float holds only as a subnormal.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The same number, of which the compiler knows nothing.
template <class T>
__device__ inline T opaque(T x) {
  asm volatile("" : "+r"(x));
  return x;
}
// What the lanes of a warp wrote before it, all of them see after it.
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline double shuffle_xor(double x, int mask) { return __shfl_xor_sync(kAllLanes, x, mask); }
__device__ inline double shuffle(double x, int lane) { return __shfl_sync(kAllLanes, x, lane); }

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

// What a block may have on the current device.
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  check_cuda("shared memory", cudaGetDevice(&device));
  check_cuda("shared memory", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

inline int64_t workspace_limit() { return kWorkspace; }

// Multiprocessors of the current device.
inline int64_t multiprocessors() {
  int device = 0, count = 0;
  check_cuda("multiprocessors", cudaGetDevice(&device));
  check_cuda("multiprocessors", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Launches on the context's stream. No blocks is no launch.
template <class... Formal, class... Actual>
void launch(const char* op, void (*kernel)(Formal...), dim3 blocks, int threads, int64_t shared,
            const CudaContext& context, Actual&&... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  if (shared > 48 * 1024) {
    check_shared(op, shared, shared_limit());
    check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(context.stream);
  check_cuda(op, cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(arguments)...));
}

}  // namespace linmu
#endif

namespace linmu {

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// Not finite, or so large that products of it may not be.
__device__ inline bool odd(float x) { return !(fabsf(x) < 1e18f); }

// V values of any type, in one piece of memory.
template <int V, class T>
__device__ inline void read_as_float(float (&x)[V], const T* from) {
  const Vec<T, V> values = *reinterpret_cast<const Vec<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = to_float(values.v[i]);
}
template <int V, class T>
__device__ inline void write_rounded(T* to, const float (&x)[V]) {
  Vec<T, V> values;
#pragma unroll
  for (int i = 0; i < V; ++i) values.v[i] = from_float<T>(x[i]);
  *reinterpret_cast<Vec<T, V>*>(to) = values;
}

// log(1 + exp(x)) as torch has it: x itself where that is exact in float.
__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
// Its derivative.
__device__ inline float softplus_slope(float x) { return x > 20.f ? 1.f : 1.f / (1.f + expf(-x)); }

// Calls f with a null pointer of the element type, of two bytes.
template <class F>
auto dispatch_16_bit(const char* op, DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(static_cast<bf16*>(nullptr));
#ifndef LINMU_CUDA_NO_FLOAT16  // a test's build, which takes two thirds of the time
  if (dtype == DType::f16) return f(static_cast<half16*>(nullptr));
#endif
  throw std::invalid_argument(std::string(op) + ": the CUDA kernels take no " +
                              (dtype == DType::f64 ? "float64" : "float16"));
}

// The same, of all types that CUDA kernels take.
template <class F>
void dispatch_cuda(const char* op, DType dtype, F&& f) {
  if (dtype == DType::f32) return f(static_cast<float*>(nullptr));
  dispatch_16_bit(op, dtype, f);
}

// Of the types that CUDA kernels take.
inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid of n blocks in x; n beyond its limit is refused by the launch.
inline dim3 blocks_of(int64_t n) { return dim3(static_cast<unsigned>(n > INT32_MAX ? UINT32_MAX : n)); }

}  // namespace linmu
