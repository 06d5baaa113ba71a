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

// The gradients of dt, dt_bias, A, D and the gate. through: per chunk, the state that enters times the gradient of the
// one that leaves.
void small_gradients(const SsdScanBwdParams& g, const ScanPlan& plan, VisitSums* const* sums, double* const* through,
                     const CudaContext& context);

}  // namespace linmu
