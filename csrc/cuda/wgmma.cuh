// The products of sm_90a: a warpgroup of four warps multiplies 64 rows by 64 columns, operands in shared memory.
//
// A tile for them is made of panels of 64 columns, whose rows of 128 bytes follow each other. Within eight rows, 1024
// aligned bytes, piece c of 16 bytes of row r is at place c ^ r: the 128-byte swizzle, which wgmma undoes and TMA
// makes. So a tile may be read K-major or MN-major, and eight rows of one piece are in different banks.
#pragma once
#include <cstdlib>

#include "tile.cuh"

namespace linmu {

constexpr int kWarpgroup = 128;  // threads

template <class T>
__host__ __device__ constexpr int64_t swizzled_size(int rows, int columns) {
  return static_cast<int64_t>(rows) * columns;
}

template <class T>
__device__ inline T* swizzled_at(T* tile, int rows, int row, int column) {
  return tile + static_cast<int64_t>(column / 64) * rows * 64 + row * 64 + (column / 8 % 8 ^ row % 8) * 8 + column % 8;
}

// As load_tile: rows a multiple of 8, columns of 64.
template <class T, class Source>
__device__ inline void load_swizzled_tile(T* tile, int rows, int columns, int64_t width, bool fast, Source&& source) {
  static_assert(sizeof(T) == 2);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, across = columns / 32;
  for (int i = threadIdx.x / kWarp; i < rows / 8 * across; i += warps) {
    const int r = i / across * 8 + lane % 8, c = i % across * 32 + lane / 8 * 8;
    const T* from = source(r);
    T* to = swizzled_at(tile, rows, r, c);
    if (fast) {
      const bool valid = from && c < width;
      copy_async(to, valid ? from + c : nullptr, valid);
    } else {
#pragma unroll
      for (int v = 0; v < 8; ++v) to[v] = from && c + v < width ? from[c + v] : T{};
    }
  }
}

// For window_attention.cuh's `gather`.
struct SwizzledPlace {
  template <class T>
  static __device__ T* at(T* tile, int rows, int, int row, int column) {
    return swizzled_at(tile, rows, row, column);
  }
};

using WarpgroupAccumulator = Accumulator<16, 64>;  // a warp's 16 of the 64 rows

}  // namespace linmu

#ifdef LINMU_EMULATE
#include "emulated_wgmma.h"
#else
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/mma_sm90_gmma.hpp>

namespace linmu {

// 10 times the compute capability of the current device, among those with kernels of their own; LINMU_CUDA_ARCH lowers
// it (tests, measurements).
inline int architecture(const char* op) {
  int device = 0, major = 0, minor = 0;
  check_cuda(op, cudaGetDevice(&device));
  check_cuda(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_cuda(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
#ifdef LINMU_CUDA_SM90A
  const bool own = major == 9 && minor == 0;
#else
  const bool own = false;
#endif
  const char* lowered = std::getenv("LINMU_CUDA_ARCH");
  return own && !(lowered && std::atoi(lowered) < 90) ? 90 : 80;
}

// PTX's matrix descriptor: the operand's first element before swizzling, and 1024 bytes from eight rows to the next.
// (The second field is between panels, of which no operand has two.)
using Descriptor = uint64_t;
// The operand so many bytes, a multiple of 16, further on.
__device__ inline Descriptor advance(Descriptor from, int bytes) { return from + bytes / 16; }
__device__ inline Descriptor make_descriptor(const void* first) {
  const uint64_t at = __cvta_generic_to_shared(first), swizzle = 1;
  return (at & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | swizzle << 62;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LINMU_SM90A 1

#define LINMU_FOUR(each, d, j) each(d.v[0][j][0]), each(d.v[0][j][1]), each(d.v[0][j][2]), each(d.v[0][j][3])
#define LINMU_ACCUMULATOR(each, d)                                                                \
  LINMU_FOUR(each, d, 0), LINMU_FOUR(each, d, 1), LINMU_FOUR(each, d, 2), LINMU_FOUR(each, d, 3), \
      LINMU_FOUR(each, d, 4), LINMU_FOUR(each, d, 5), LINMU_FOUR(each, d, 6), LINMU_FOUR(each, d, 7)
#define LINMU_ITSELF(x) x
#define LINMU_IN_PLACE(x) "+f"(x)

// CUTLASS's names for them.
constexpr cute::SM90::GMMA::Major major_of(Major major) {
  return major == Major::K ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN;
}
template <class T, Major kMajorB>
struct Wgmma {
  static constexpr auto kA = cute::SM90::GMMA::Major::K, kB = major_of(kMajorB);
  static constexpr bool kBf16 = std::is_same_v<T, bf16>;
  using Shared = std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<kA, kB>,
                                    cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<kA, kB> >;
  using Registers = std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<kA, kB>,
                                       cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<kA, kB> >;
};

// d += a b over 16 of K, or, unless `add`, d = a b. a is K-major in shared memory, or in registers as for mma.
template <class T, Major kMajorB>
__device__ inline void wgmma(WarpgroupAccumulator& d, Descriptor a, Descriptor b, bool add = true) {
  using cute::SM90::GMMA::ScaleOut;
  Wgmma<T, kMajorB>::Shared::fma(a, b, LINMU_ACCUMULATOR(LINMU_ITSELF, d), add ? ScaleOut::One : ScaleOut::Zero);
}
template <class T, Major kMajorB>
__device__ inline void wgmma(WarpgroupAccumulator& d, const unsigned (&a)[4], Descriptor b, bool add = true) {
  using cute::SM90::GMMA::ScaleOut;
  Wgmma<T, kMajorB>::Registers::fma(a[0], a[1], a[2], a[3], b, LINMU_ACCUMULATOR(LINMU_ITSELF, d),
                                    add ? ScaleOut::One : ScaleOut::Zero);
}

// Around wgmma: before the first, once its registers are written; after the last, until the results are there.
__device__ inline void warpgroup_arrive() { cute::warpgroup_arrive(); }
__device__ inline void warpgroup_commit() { cute::warpgroup_commit_batch(); }
// Until at most kPending of the groups of products are on their way.
template <int kPending>
__device__ inline void warpgroup_wait() {
  cute::warpgroup_wait<kPending>();
}
__device__ inline void warpgroup_commit_and_wait() {
  warpgroup_commit();
  warpgroup_wait<0>();
}
// Keeps the compiler from reading the accumulator before, or writing it after.
__device__ inline void warpgroup_fence_operand(WarpgroupAccumulator& d) {
  asm volatile("" : LINMU_ACCUMULATOR(LINMU_IN_PLACE, d)::"memory");
}

// Of the registers that the block was launched with: a whole warpgroup gives what another then takes.
template <int kRegisters>
__device__ inline void warpgroup_give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
__device__ inline void warpgroup_take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

#endif

// A barrier of the warpgroup alone, of at most kMost in a block. (A barrier by a number that is not constant takes all
// 16.)
template <int kMost = 4>
__device__ inline void warpgroup_sync(int warpgroup = threadIdx.x / kWarpgroup) {
  if (warpgroup == 0)
    asm volatile("bar.sync 1, 128;\n" ::: "memory");
  else if (kMost == 2 || warpgroup == 1)
    asm volatile("bar.sync 2, 128;\n" ::: "memory");
  else if (warpgroup == 2)
    asm volatile("bar.sync 3, 128;\n" ::: "memory");
  else
    asm volatile("bar.sync 4, 128;\n" ::: "memory");
}

// What this thread wrote to shared memory, copies included, is there for wgmma and TMA after a barrier.
__device__ inline void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

}  // namespace linmu
#endif

namespace linmu {

#if defined(LINMU_SM90A) || defined(LINMU_EMULATE)
#define LINMU_WGMMA_CODE 1

// The operand from row `row`, a multiple of 8, and column `column` of a tile of `rows` rows: a multiple of 16 if the
// operand is K-major, of 64 if it is MN-major.
template <class T>
__device__ inline Descriptor descriptor_at(T* tile, int rows, int row, int column) {
  return make_descriptor(tile + static_cast<int64_t>(column / 64) * rows * 64 + row * 64 + column % 64);
}

#endif

}  // namespace linmu
