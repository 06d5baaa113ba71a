// The tensor core and copy instructions of sm_80 that the kernels use. tests/cuda/emulator.h has the same in plain C++.
//
// A fragment's place in its 16 x 16, 16 x 8 or 8 x 16 tile follows from lane = 4 g + t, as in the PTX manual:
//     a[0]: (g, 2t), (g, 2t+1)      a[1]: rows + 8      a[2]: columns + 8      a[3]: both
//     b[0]: (k = 2t, n = g), (2t+1, g)                  b[1]: k + 8
//     d[0], d[1]: (g, 2t), (g, 2t+1)                    d[2], d[3]: rows + 8
#pragma once
#include "device.cuh"

namespace linmu {

#ifndef LINMU_EMULATE

// d += a b, 16 x 8 x 16, T = bf16 or half16, sums in float.
template <class T>
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 tiles of 16-bit elements from shared memory: lane 8 i + r gives the address of row r of tile i, 16 bytes
// aligned, and r[i] becomes tile i's (g, 2t), (g, 2t+1); transposed: (2t, g), (2t+1, g).
__device__ inline void ldmatrix(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ inline void ldmatrix_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// 16 bytes from global to shared memory, both aligned, asynchronously; zeros, and no read, unless valid.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
}
// Ends a group of copies; waits until at most kPending of the thread's groups are on their way.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

#endif

}  // namespace linmu
