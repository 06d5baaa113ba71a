// What is far from each token of ExactMMATE, mixed into what is near. Shapes are those of linmu_ops/far_attention.py;
// all but q, k and v is contiguous.
#pragma once
#include "exact_step.h"
#include "ssd_scan.h"
#include "window_attention.h"

namespace linmu {

struct FarAttentionParams {
  int64_t batch, length, total, heads, groups, head_dim, state_dim;  // B, L, T, H, G, P, N; G divides H
  DType dtype;                                                       // of y, q, k, v, z_gate
  double softmax_scale;
  // The caller has checked every value.
  const int32_t* entered;  // (B, G, T) in [-1, T], the step at which a token enters; -1: never
  const int32_t* when;     // (B, L) in [-1, T], after how many steps a token reads; -1: not at all
  const int32_t* last;     // (B,) in [0, T], after how many the state is handed out; null where it is not
  TokenRows<const void*> q, k, v;
  const void* lse;            // (B, L, H) accumulate type
  const void* rest;           // (B, L, H) accumulate type
  const void* steps;          // (B, T, G, H / G) accumulate type
  const void* b_map;          // (G, P, N) accumulate type
  const void* c_map;          // (H, P, N) accumulate type
  const void* scale;          // (H,) accumulate type
  const void* rates;          // (H,) accumulate type
  const void* z_gate;         // (B, L, H P), or null
  const void* initial_state;  // (B, H, P + 1, N) accumulate type, or null
  void* y;                    // (B, L, H, P), updated in place
  void* final_state;          // (B, H, P + 1, N) accumulate type, or null
  Threads threads;
};

LINMU_CPU_KERNEL(far_attention_cpu, FarAttentionParams)

}  // namespace linmu
