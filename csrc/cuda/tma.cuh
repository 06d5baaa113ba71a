// TMA of sm_90, by which one thread loads whole tiles asynchronously, and the barriers (mbarrier) that tell when they
// are there. tests/cuda/emulated_wgmma.h has the same in plain C++.
#pragma once
#include "wgmma.cuh"

#ifndef LINMU_EMULATE
#include <cuda.h>

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

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// By one thread; for the others, and for copies, after fence_proxy_async and __syncthreads. A phase is complete when so
// many have arrived, and the bytes that were expected have come.
__device__ inline void barrier_init(Barrier* barrier, int count = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ inline void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, by the thread that then issues copies of so many bytes in all.
__device__ inline void barrier_expect_tx(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of that number is complete: 0, 1, 2, ..., of which only the last two can be told apart.
__device__ inline void barrier_wait(Barrier* barrier, int phase) {
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(phase % 2)
        : "memory");
  } while (!done);
}

// Contiguous bytes; their number and both addresses are multiples of 16.
__device__ inline void tma_load_1d(void* shared, const void* global, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// A box of a tensor, from the given place: a panel of a tile (see wgmma.cuh), whole, aligned to 1024 bytes.
__device__ inline void tma_load_box(void* shared, const TensorMap& from, int column, int row, int group, int batch,
                                    Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];\n" ::"r"(shared_address(shared)),
      "l"(&from.map), "r"(column), "r"(row), "r"(group), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

#endif

}  // namespace linmu
#endif
