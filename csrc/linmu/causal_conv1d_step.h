// One token of the causal convolution, in place on the state. Shapes are those of linmu_ops/causal_conv1d_step.py; all
// tensors contiguous.
#pragma once
#include "common.h"

namespace linmu {

struct CausalConv1dStepParams {
  int64_t batch, dim, width;  // B, D, K
  DType dtype;                // of state, x, y
  bool silu;
  void* state;         // (B, K-1, D), updated in place
  const void* x;       // (B, D)
  const void* weight;  // (D, K) accumulate type
  const void* bias;    // (D,) accumulate type, or null
  void* y;             // (B, D)
  Threads threads;
};

LINMU_CPU_KERNEL(causal_conv1d_step_cpu, CausalConv1dStepParams)
LINMU_CUDA_KERNEL(causal_conv1d_step_cuda, CausalConv1dStepParams)

}  // namespace linmu
