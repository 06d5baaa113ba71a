// Short causal convolution along the tokens, and its gradients. Shapes are those of
// linmu_ops/causal_conv1d.py; all tensors contiguous.
#pragma once
#include "common.h"

namespace linmu {

struct CausalConv1dParams {
  int64_t batch, length, dim, width;  // B, L, D, K
  DType dtype;                        // of x, y and the states
  bool silu;
  const void* x;               // (B, L, D)
  const void* weight;          // (D, K) accumulate type
  const void* bias;            // (D,) accumulate type, or null
  const int32_t* seq_idx;      // (B, L) or null
  const int32_t* token_order;  // (B, L) permutation per row, or null
  const void* initial_state;   // (B, K-1, D) or null
  void* y;                     // (B, L, D); null in the backward pass
  void* final_state;           // (B, K-1, D) or null
  Threads threads;
};

struct CausalConv1dBwdParams {
  CausalConv1dParams forward;
  const void* grad_y;            // (B, L, D)
  const void* grad_final_state;  // (B, K-1, D) or null
  void* dx;                      // (B, L, D)
  void* dweight;                 // (D, K) accumulate type
  void* dbias;                   // (D,) accumulate type, or null
  void* dinitial_state;          // (B, K-1, D) or null
};

LINMU_CPU_KERNEL(causal_conv1d_fwd_cpu, CausalConv1dParams)
LINMU_CPU_KERNEL(causal_conv1d_bwd_cpu, CausalConv1dBwdParams)
LINMU_CUDA_KERNEL(causal_conv1d_fwd_cuda, CausalConv1dParams)
LINMU_CUDA_KERNEL(causal_conv1d_bwd_cuda, CausalConv1dBwdParams)

}  // namespace linmu
