// One token of the scan, in place on the state. Shapes are those of linmu_ops/ssd_step.py; all tensors contiguous.
#pragma once
#include "common.h"

namespace linmu {

struct SsdStepParams {
  int64_t batch, heads, head_dim, state_dim;  // B, H, P, N
  int64_t groups_x, groups_b, groups_c;       // each divides heads
  DType dtype;                                // of x, B, C, y
  bool dt_softplus;                           // after adding dt_bias
  bool normalize;                             // as SsdScanParams
  void* state;                                // (B, H, P, N) accumulate type, updated in place
  const void* x;                              // (B, Gx, P)
  const void* dt;                             // (B, H) accumulate type
  const void* A;                              // (H,) accumulate type
  const void* B;                              // (B, Gb, N)
  const void* C;                              // (B, Gc, N)
  const void* D;                              // (H,) accumulate type, or null
  const void* dt_bias;                        // (H,) accumulate type, or null
  void* y;                                    // (B, H, P)
  void* log_mass;                             // (B, H) accumulate type, or null
  Threads threads;
};

LINMU_CPU_KERNEL(ssd_step_cpu, SsdStepParams)
LINMU_CUDA_KERNEL(ssd_step_cuda, SsdStepParams)

}  // namespace linmu
