// One token of the gated delta rule, in place on the state. Shapes are those of linmu_ops/gated_delta_step.py; all
// tensors contiguous.
#pragma once
#include "common.h"

namespace linmu {

struct GatedDeltaStepParams {
  int64_t batch, heads, key_dim, value_dim;  // B, H, K, V
  int64_t groups_q, groups_k, groups_v;      // each divides heads
  DType dtype;                               // of q, k, v, y
  double scale;                              // of the query
  bool normalize;                            // q and k to length 1 first
  void* state;                               // (B, H, K, V) accumulate type, updated in place
  const void* q;                             // (B, Gq, K)
  const void* k;                             // (B, Gk, K)
  const void* v;                             // (B, Gv, V)
  const void* g;                             // (B, H) accumulate type
  const void* beta;                          // (B, H) accumulate type
  void* y;                                   // (B, H, V)
  Threads threads;
};

LINMU_CPU_KERNEL(gated_delta_step_cpu, GatedDeltaStepParams)

}  // namespace linmu
