// Weighted sum of two branches and the norm after it. Shapes are those of linmu_ops/branch_mix_norm.py; all tensors
// contiguous.
#pragma once
#include "common.h"

namespace linmu {

enum class MixBy : int { scalar, channel, token };
enum class Norm : int { layer, rms, none };

struct BranchMixNormParams {
  int64_t rows, dim;  // B * L, D
  DType dtype;        // of a, b, out
  MixBy mix_by;
  Norm norm;
  double eps;
  const void* a;       // (rows, D)
  const void* b;       // (rows, D)
  const void* mix;     // (1,), (D,) or (rows,) accumulate type
  const bool* mask;    // (rows,) or null
  const void* weight;  // (D,) accumulate type, or null
  const void* bias;    // (D,) accumulate type, or null
  void* out;           // (rows, D); null in the backward pass
  Threads threads;
};

struct BranchMixNormBwdParams {
  BranchMixNormParams forward;
  const void* grad_out;  // (rows, D)
  void* da;              // (rows, D)
  void* db;              // (rows, D)
  void* dmix;            // shape of mix, accumulate type
  void* dweight;         // (D,) accumulate type, or null
  void* dbias;           // (D,) accumulate type, or null
};

LINMU_CPU_KERNEL(branch_mix_norm_fwd_cpu, BranchMixNormParams)
LINMU_CPU_KERNEL(branch_mix_norm_bwd_cpu, BranchMixNormBwdParams)
LINMU_CUDA_KERNEL(branch_mix_norm_fwd_cuda, BranchMixNormParams)
LINMU_CUDA_KERNEL(branch_mix_norm_bwd_cuda, BranchMixNormBwdParams)

}  // namespace linmu
