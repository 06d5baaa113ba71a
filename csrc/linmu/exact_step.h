// One token of text of ExactMMATE, in place on its state. Shapes are those of linmu_ops/exact_step.py; all tensors
// contiguous.
#pragma once
#include "common.h"

namespace linmu {

constexpr int64_t kLeave = 64;           // tokens that leave at a time, at most
constexpr double kLeastLogTotal = -100;  // stands for the log of no weights
constexpr int64_t kMostSeen = int64_t(1) << 62;

struct ExactStepParams {
  int64_t batch, heads, groups, head_dim, state_dim;  // B, H, G, P, N
  int64_t sinks, window, kept;                        // s, w, and the places for kept tokens
  int64_t rotary, rotary_rows;                        // R, and 1 or B
  int64_t far_limit;                                  // far tokens beyond which their weight does not grow, >= 1
  double softmax_scale;
  bool interleaved, nothing_beyond;
  bool wide_map;        // c_map is of the accumulate type
  DType dtype;          // of keys, values, q, k, v, z_gate, y, and of c_map where it is not wide
  void* keys;           // (B, G, n, P), n = s + w + min(w, kLeave) + kept; updated in place
  void* values;         // (B, G, n, P), updated in place
  void* steps;          // (B, G, n - s, H / G) accumulate type, updated in place
  uint8_t* there;       // (B, s) bool, updated in place; null where s is 0
  int64_t* seen;        // (B,), from 0 to kMostSeen - 1, updated in place
  const void* ssm;      // (B, H, P + 1, N) accumulate type
  const void* q;        // (B, H, P)
  const void* k;        // (B, G, P)
  const void* v;        // (B, G, P)
  const void* dt;       // (B, H) accumulate type
  const void* dt_bias;  // (H,) accumulate type
  const void* rest;     // (B, H) accumulate type
  const void* c_map;    // (H, P, N)
  const void* scale;    // (H,) accumulate type
  const void* cos;      // (B or 1, R) accumulate type, or null
  const void* sin;      // (B or 1, R) accumulate type, or null
  const void* z_gate;   // (B, H P), or null
  const uint8_t* real;  // (B,) bool, or null
  void* y;              // (B, H P)
  uint8_t* due;         // (B,) bool
  Threads threads;

  int64_t leave() const { return window < kLeave ? window : kLeave; }
  int64_t ring() const { return window + leave(); }
  int64_t places() const { return sinks + ring() + kept; }
  // How many steps of leaving are over for a token before which so many have come.
  int64_t over(int64_t before) const { return before < window ? 0 : (before + 1 - window) / leave(); }
};

LINMU_CPU_KERNEL(exact_step_cpu, ExactStepParams)

}  // namespace linmu
