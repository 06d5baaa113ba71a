// The gated norm after a scan. Shapes are those of linmu_ops/gated_norm.py; channels lie side by side.
#pragma once
#include "common.h"

namespace linmu {

// Rows of channels, at their strides.
struct GatedNormTensor {
  const void* data;  // (B, L, D)
  int64_t batch_stride, token_stride;
};

struct GatedNormParams {
  int64_t batch, length, dim, group_size;
  DType dtype;  // of x, z, out
  bool norm_before_gate;
  double eps;
  GatedNormTensor x, z;
  const void* weight;  // (D,) accumulate type, or null
  void* out;           // (B, L, D) contiguous; null in the backward pass
  Threads threads;
};

struct GatedNormBwdParams {
  GatedNormParams forward;
  GatedNormTensor grad_out;
  void* dx;       // (B, L, D) contiguous
  void* dz;       // (B, L, D) contiguous
  void* dweight;  // (D,) accumulate type, or null
};

LINMU_CPU_KERNEL(gated_norm_fwd_cpu, GatedNormParams)
LINMU_CPU_KERNEL(gated_norm_bwd_cpu, GatedNormBwdParams)

}  // namespace linmu
