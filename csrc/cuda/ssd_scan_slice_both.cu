// Both directions of a scan by slices. See ssd_scan_slice.cuh.
//
// Where they share B and C, and three stages fit: a walk from right to left leaves the reverse state that enters each
// pair of chunks, and one from left to right makes y of both. Elsewhere the reverse direction leaves its part of y, in
// float, and the forward one adds its own.
#include "ssd_scan_slice_walk.cuh"

namespace linmu {
namespace slices {

void scan_both(const ScanPlan& s, Plan o, bool fused, const CudaContext& context) {
  const SsdScanParams& p = s.p;
  const int64_t slices = p.batch * p.heads * o.per_head;
  if (fused) {
    const int64_t panels = p.state_dim > 64 ? 2 : 1;
    o.entering = allocate<unsigned char>(context, slices * ceil_div(s.chunks, 2) * panels * kPanel);
    launch_slices<Make::kEntering, true, false>(s, o, context);
    launch_slices<Make::kBoth, false, true>(s, o, context);
  } else {
    o.part = allocate<float>(context, slices * s.chunks * kQ * kRows);
    launch_slices<Make::kPart, true, false>(s, o, context);
    launch_slices<Make::kRest, false, true>(s, o, context);
  }
}

}  // namespace slices
}  // namespace linmu
