// Softmax attention within windows of tokens that lie anywhere. Shapes are those of linmu_ops/window_attention.py.
#pragma once
#include "common.h"

namespace linmu {

// Rows of `head_dim` adjacent elements, one per (batch row, position, head).
template <class Pointer>
struct TokenRows {
  Pointer data;
  int64_t batch, token, head;  // strides in elements
};

struct WindowAttentionParams {
  int64_t batch, length, heads, groups, head_dim;  // B, L, H, G, P; G divides H
  DType dtype;                                     // of q, k, v, out and their gradients
  double scale;
  // Window table. On the CPU the caller has checked every value; on CUDA the kernels do.
  int64_t num_windows, num_visual;
  int64_t max_tokens;      // of the largest window; on CUDA as many as the window's sizes say
  const int32_t* tokens;   // (num_visual,) row * L + position, in window order
  const int32_t* offsets;  // (num_windows + 1,)
  const int32_t* coords;   // (num_visual,) in [0, (bias_size - 1) / 2], or null without bias
  const uint8_t* covered;  // (B * L,) tokens that some window holds, or null when all are; CPU only
  TokenRows<const void*> q, k, v;
  const void* bias;  // (H, bias_size) accumulate type, or null
  int64_t bias_size;
  const void* cos;  // (B or 1, L, R) accumulate type, or null
  const void* sin;
  int64_t rotary_dim;  // R
  bool rotary_batch;   // cos has a row per batch row

  bool interleaved;
  bool causal;
  void* out;  // (B, L, H, P)
  void* lse;  // (num_visual, H) accumulate type, in window order
  Threads threads;
};

struct WindowAttentionBwdParams {
  WindowAttentionParams forward;  // out and lse are read
  TokenRows<const void*> grad_out;
  const void* grad_lse;  // (num_visual, H) accumulate type, or null
  void* dq;              // (B, L, H, P)
  void* dk;              // (B, L, G, P)
  void* dv;              // (B, L, G, P)
  void* dbias;           // (H, bias_size) accumulate type, or null
};

LINMU_CPU_KERNEL(window_attention_cpu, WindowAttentionParams)
LINMU_CPU_KERNEL(window_attention_bwd_cpu, WindowAttentionBwdParams)
LINMU_CUDA_KERNEL(window_attention_cuda, WindowAttentionParams)
LINMU_CUDA_KERNEL(window_attention_bwd_cuda, WindowAttentionBwdParams)

}  // namespace linmu
