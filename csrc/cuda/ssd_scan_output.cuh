// What the two kernels of the scan's output share.
#pragma once
#include "ssd_scan.cuh"

namespace linmu {

struct Output {
  const void* entering[2];  // (B, H, chunks, P, N) in the inputs' type
  const float* scale[2];    // (B, H, chunks) by which entering's halves are to be multiplied; null for other types
  int head_dim, state_dim;  // rounded up to the tiles
  int columns;              // of P at a time
  bool separate;            // both directions run, and with different B or C
  bool fast_x, fast_b[2], fast_c[2], fast_state;
};

// By what a direction's part of the output that comes from the state is to be multiplied.
template <class T>
__device__ inline float state_scale(const Output& o, int d, int64_t state) {
  if constexpr (std::is_same_v<T, half16>)
    return o.scale[d][state];
  else
    return 1.f;
}

// On sm_90a: all of a scan by slices; false where that does not serve.
bool ssd_scan_slices(const SsdScanParams& p, const CudaContext& context);
// Makes anew what the plan's `redo` names, of a scan in bfloat16.
void redo_spoiled(const ScanPlan& s, const CudaContext& context);

// On sm_90a: whether that architecture's own kernel serves, and with which chunk and tiles; and its launch.
bool plan_output_sm90(const SsdScanParams& p, int& chunk, Output& o);
void output_sm90(const ScanPlan& s, const Output& o, const CudaContext& context);

}  // namespace linmu
