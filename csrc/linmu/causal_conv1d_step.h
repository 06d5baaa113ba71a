// One token of the causal convolution, in place on the state. Shapes are those of linmu_ops/causal_conv1d_step.py; all
// tensors contiguous, the state as it lies.
#pragma once
#include "common.h"

namespace linmu {

struct CausalConv1dStepParams {
  int64_t batch, dim, width;  // B, D, K
  DType dtype;                // of state, x, y
  bool silu;
  int64_t older;       // inputs in the state before the K-1 that are used
  bool by_channel;     // the inputs of a channel lie side by side: (B, D, n)
  void* state;         // (B, n, D), n = older + K-1, updated in place
  const void* x;       // (B, D)
  const void* weight;  // (D, K) accumulate type
  const void* bias;    // (D,) accumulate type, or null
  void* y;             // (B, D)
  Threads threads;
};

LINMU_CPU_KERNEL(causal_conv1d_step_cpu, CausalConv1dStepParams)
LINMU_CUDA_KERNEL(causal_conv1d_step_cuda, CausalConv1dStepParams)

}  // namespace linmu
