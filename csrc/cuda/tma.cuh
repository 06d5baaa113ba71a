// TMA of sm_90, by which one thread loads whole tiles asynchronously, and the barriers (mbarrier) that tell when they
// are there. tests/cuda/emulated_wgmma.h has the same in plain C++.
#pragma once
#include "wgmma.cuh"

#ifndef LINMU_EMULATE
#include <cuda.h>

#include <cute/arch/copy_sm90.hpp>

namespace linmu {

// A tensor of 16-bit elements, of (batch, group, row, column), that is read in boxes of 64 columns.
struct TensorMap {
  CUtensorMap map;
};

// Whether the tensor can be read so; then `to` describes it. Sizes and strides are in elements, from the columns on
// outwards; the columns' own stride is 1. What a box has beyond the sizes is 0.
inline bool encode_tensor_map(TensorMap& to, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                              int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const bool known = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                                        &result) == cudaSuccess &&
                       result == cudaDriverEntryPointSuccess;
    return known ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  if (!encode) return false;
  cuuint64_t dims[4], bytes[3];
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 0; i < 3; ++i) {
    if (strides[i] <= 0 || strides[i] * 2 % 16) return false;
    bytes[i] = static_cast<cuuint64_t>(strides[i]) * 2;
  }
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode(&to.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), dims, bytes, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Counts the bytes of the copies that it expects; in shared memory, ready for the next load when one is complete.
struct Barrier {
  uint64_t state;
};

#ifdef LINMU_SM90A

// CUTLASS's barriers, and its stmatrix, do not tell the compiler that memory changes.
__device__ inline void compiler_fence() { asm volatile("" ::: "memory"); }

// By one thread; for the others, and for copies, after fence_proxy_async and __syncthreads. A phase is complete when so
// many have arrived, and the bytes that were expected have come.
__device__ inline void barrier_init(Barrier* barrier, int count = 1) {
  cute::initialize_barrier(barrier->state, count);
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ inline void barrier_arrive(Barrier* barrier) {
  compiler_fence();
  cute::arrive_barrier(barrier->state);
}
// Arrives, by the thread that then issues copies of so many bytes in all.
__device__ inline void barrier_expect_tx(Barrier* barrier, int bytes) {
  compiler_fence();
  cute::set_barrier_transaction_bytes(barrier->state, static_cast<unsigned>(bytes));
}
// Until the phase of that number is complete: 0, 1, 2, ..., of which only the last two can be told apart.
__device__ inline void barrier_wait(Barrier* barrier, int phase) {
  cute::wait_barrier(barrier->state, phase % 2);
  compiler_fence();
}

// Contiguous bytes; their number and both addresses are multiples of 16.
__device__ inline void tma_load_1d(void* shared, const void* global, int bytes, Barrier* barrier) {
  cute::SM90_BULK_COPY_G2S::copy(global, &barrier->state, shared, bytes);
}
// A box of a tensor, from the given place: a panel of a tile (see wgmma.cuh), whole, aligned to 1024 bytes.
__device__ inline void tma_load_box(void* shared, const TensorMap& from, int column, int row, int group, int batch,
                                    Barrier* barrier) {
  cute::SM90_TMA_LOAD_4D::copy(&from.map, &barrier->state,
                               static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), shared, column, row,
                               group, batch);
}

// The inverse of ldmatrix: lane 8 i + r gives the address of row r of tile i.
__device__ inline void stmatrix(void* row, unsigned a, unsigned b, unsigned c, unsigned d) {
  compiler_fence();
  cute::SM90_U32x4_STSM_N::copy(a, b, c, d, *static_cast<cute::uint128_t*>(row));
  compiler_fence();
}

#endif

}  // namespace linmu
#endif
