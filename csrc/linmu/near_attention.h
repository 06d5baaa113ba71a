// Softmax attention of each token to a range of earlier ones and to a list. Shapes are those of
// linmu_ops/near_attention.py.
#pragma once
#include "window_attention.h"

namespace linmu {

struct NearAttentionParams {
  int64_t batch, length, total, heads, groups, head_dim;  // B, L, T, H, G, P; G divides H; the last L of T are q's
  DType dtype;                                            // of q, k, v, y and their gradients
  double scale;
  // The caller has checked every value.
  const int32_t *low, *high;  // (B, L) in [0, T]: a token sees [low, high), and not beyond itself
  const int32_t* which;       // (B, G, L), the list that it sees besides, or -1
  const int32_t* listed;      // (n, m) in [-1, T); -1: none
  int64_t list_size;          // m
  TokenRows<const void*> q, k, v;
  void* y;    // (B, L, H, P)
  void* lse;  // (B, L, H) accumulate type
  Threads threads;
};

struct NearAttentionBwdParams {
  NearAttentionParams forward;  // y is not read
  TokenRows<const void*> grad_y;
  const void* grad_lse;  // (B, L, H) accumulate type, or null
  void* dq;              // (B, L, H, P)
  void* dk;              // (B, T, G, P)
  void* dv;              // (B, T, G, P)
};

LINMU_CPU_KERNEL(near_attention_cpu, NearAttentionParams)
LINMU_CPU_KERNEL(near_attention_bwd_cpu, NearAttentionBwdParams)

}  // namespace linmu
