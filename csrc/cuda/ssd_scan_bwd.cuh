// What the two halves of the scan's gradient share.
#pragma once
#include "ssd_scan.cuh"

namespace linmu {

// Of one head, direction and visit, with E as in ssd_scan_bwd.cu and without E's diagonal:
struct VisitSums {
  double flow;       // what begins at the visit, less what ends there, of F_ij = weight_i E_ij step_j
  float row;         // sum_j E_ij step_j
  float column;      // sum_i weight_i E_ij
  float diagonal;    // E_ii
  float gram;        // dy_i . x_i
  float from_state;  // what the state that enters gives to the output, times its gradient, without the weight
  float to_state;    // what the input gives to the state that leaves, times its gradient, without the step
};

// Of one head, over the visits of a chunk.
struct Totals {
  double A[2], dt_bias[2], D, gate;

  __device__ void add(const Totals& t) {
    for (int d = 0; d < 2; ++d) A[d] += t.A[d], dt_bias[d] += t.dt_bias[d];
    D += t.D, gate += t.gate;
  }
};

// The gradients of dt and of a gate per token, of the plan's chunks, and those chunks' totals (B, chunks of all, H).
// through: per chunk, the state that enters times the gradient of the one that leaves.
void visit_gradients(const SsdScanBwdParams& g, const ScanPlan& plan, VisitSums* const* sums, double* const* through,
                     Totals* totals, int64_t all_chunks, const CudaContext& context);
// The gradients of dt_bias, A, D and a gate per head.
void head_gradients(const SsdScanBwdParams& g, const Totals* totals, int64_t all_chunks, const CudaContext& context);

}  // namespace linmu
