// The gated delta rule and its gradient. Shapes are those of linmu_ops/gated_delta_scan.py; acc is the accumulate type
// (float, or double for double). Everything is contiguous except the SsdScanTensors, whose last dimension is.
#pragma once
#include "ssd_scan.h"

namespace linmu {

// What one direction scans with. What the caller's `DeltaReverse` leaves out is the forward direction's.
struct GatedDeltaDirection {
  bool on;                 // whether this direction runs at all
  SsdScanTensor q, k;      // (B, L, Gq, K), (B, L, Gk, K)
  const void* g;           // (B, L, H) acc
  const void* beta;        // (B, L, H) acc
  const uint8_t* mask;     // (B, L) bool, or null; always null of the forward direction
  const int32_t* seq_idx;  // (B, L), or null
};

struct GatedDeltaScanParams {
  int64_t batch, length, heads, key_dim, value_dim;  // B, L, H, K, V
  int64_t groups_q, groups_k, groups_v;              // each divides heads
  DType dtype;                                       // of q, k, v, y
  double scale;                                      // of the queries
  bool normalize;                                    // q and k to length 1 first
  GatedDeltaDirection forward, reverse;
  SsdScanTensor v;             // (B, L, Gv, V)
  const void* gate;            // (B, L, H) or (H,) acc, or null
  bool gate_per_token;         // which of the two
  const int32_t* token_order;  // (B, L) a checked permutation, or null
  const void* initial_state;   // (B, H, K, V) acc, or null
  void* y;                     // (B, L, H, V)
  void* final_state;           // (B, H, K, V) acc, or null
  int64_t chunk;               // visits per chunk; 0: the kernel's choice
  Threads threads;
};

// Gradients of one direction; those of what the reverse direction shares with the forward one are null there.
struct GatedDeltaDirectionGrads {
  void* q;     // (B, L, Gq, K)
  void* k;     // (B, L, Gk, K)
  void* g;     // (B, L, H) acc
  void* beta;  // (B, L, H) acc
};

struct GatedDeltaScanBwdParams {
  GatedDeltaScanParams scan;     // y and final_state are not read
  SsdScanTensor grad_y;          // (B, L, H, V)
  const void* grad_final_state;  // (B, H, K, V) acc, or null
  GatedDeltaDirectionGrads forward, reverse;
  void* v;              // (B, L, Gv, V)
  void* gate;           // as gate, or null
  void* initial_state;  // (B, H, K, V) acc, or null
};

LINMU_CPU_KERNEL(gated_delta_scan_cpu, GatedDeltaScanParams)
LINMU_CPU_KERNEL(gated_delta_scan_bwd_cpu, GatedDeltaScanBwdParams)

}  // namespace linmu
