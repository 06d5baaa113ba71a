// The scan and its gradient. Shapes are those of linmu_ops/ssd_scan.py; acc is the accumulate type (float, or double
// for double). Everything is contiguous except the SsdScanTensors, whose last dimension is.
#pragma once
#include "common.h"

namespace linmu {

// A mass below it is no mass: as LEAST_MASS of linmu_ops/reference/_visits.py.
constexpr double kLeastMass = 0x1p-100;

struct SsdScanTensor {
  const void* data;
  int64_t batch_stride, token_stride, group_stride;  // in elements
};

// What one direction scans with. What the caller's `Reverse` leaves out is the forward direction's.
struct SsdScanDirection {
  bool on;                 // whether this direction runs at all
  const void* dt;          // (B, L, H) acc
  const void* A;           // (H,) acc
  SsdScanTensor B, C;      // (B, L, Gb, N), (B, L, Gc, N)
  const void* dt_bias;     // (H,) acc, or null
  const uint8_t* mask;     // (B, L) bool, or null; always null of the forward direction
  const int32_t* seq_idx;  // (B, L), or null
};

struct SsdScanParams {
  int64_t batch, length, heads, head_dim, state_dim;  // B, L, H, P, N
  int64_t groups_x, groups_b, groups_c;               // each divides heads
  DType dtype;                                        // of x, B, C, y
  bool dt_softplus;                                   // after adding dt_bias, in both directions
  bool shared_projections;                            // the reverse B and C are the forward ones
  SsdScanDirection forward, reverse;
  SsdScanTensor x;             // (B, L, Gx, P)
  const void* D;               // (H,) acc, or null
  const void* gate;            // (B, L, H) or (H,) acc, or null
  bool gate_per_token;         // which of the two
  const int32_t* token_order;  // (B, L) a checked permutation, or null
  bool normalize;              // y is divided by its mass, and states have a row more, (B, H, P+1, N)
  const void* initial_state;   // (B, H, P, N) acc, or null
  bool wide_y;                 // y is of the accumulate type, for the gradient of a mean
  void* y;                     // (B, L, H, P), acc if wide_y
  void* mass;                  // (B, L, H) acc, 0 where there is no mean; null unless it normalizes
  void* final_state;           // (B, H, P, N) acc, or null
  int64_t chunk;               // visits per chunk; 0: the kernel's choice
  Threads threads;
};

// Gradients of one direction; those of what the reverse direction shares with the forward one are null there.
struct SsdScanDirectionGrads {
  void* dt;       // (B, L, H) acc
  void* A;        // (H,) acc
  void* B;        // (B, L, Gb, N)
  void* C;        // (B, L, Gc, N)
  void* dt_bias;  // (H,) acc, or null
};

struct SsdScanBwdParams {
  SsdScanParams scan;            // y (acc) and mass are the outputs where it normalizes; final_state is not read
  SsdScanTensor grad_y;          // (B, L, H, P), acc where it normalizes
  const void* grad_mass;         // (B, L, H) acc, or null
  const void* grad_final_state;  // (B, H, P, N) acc, or null
  SsdScanDirectionGrads forward, reverse;
  void* x;              // (B, L, Gx, P)
  void* D;              // (H,) acc, or null
  void* gate;           // as gate, or null
  void* initial_state;  // (B, H, P, N) acc, or null
};

LINMU_CPU_KERNEL(ssd_scan_cpu, SsdScanParams)
LINMU_CPU_KERNEL(ssd_scan_bwd_cpu, SsdScanBwdParams)
LINMU_CUDA_KERNEL(ssd_scan_cuda, SsdScanParams)
LINMU_CUDA_KERNEL(ssd_scan_bwd_cuda, SsdScanBwdParams)

}  // namespace linmu
