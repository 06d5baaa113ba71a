// The scans of sm_90a by slices: what each serves, and those of one direction. See ssd_scan_slice.cuh.
#include <algorithm>

#include "ssd_scan_slice_walk.cuh"

namespace linmu {
namespace slices {
namespace {

// The fewest spans of at least 8 chunks whose blocks fill nine tenths of whole waves of 132: a fixed number, so that
// results are the same on every GPU.
int64_t choose_spans(int64_t blocks, int64_t chunks) {
  const int64_t most = std::max<int64_t>(chunks / 8, 1);
  if (blocks >= 120) return 1;
  for (int64_t n = 1; n <= most; ++n)
    if (blocks * n * 10 >= ceil_div(blocks * n, 132) * 132 * 9) return n;
  return most;
}

// Whether the two heads of any block share a group.
bool share(const SsdScanParams& p, int per_head) {
  return per_head % 2 == 0 || (p.heads / p.groups_b % 2 == 0 && p.heads / p.groups_c % 2 == 0);
}

bool encode(Plan& o, const SsdScanParams& p) {
  const auto map = [&](TensorMap& to, const SsdScanTensor& t, int64_t groups, int64_t width) {
    return encode_tensor_map(to, t.data, {width, p.length, groups, p.batch},
                             {t.token_stride, t.group_stride, t.batch_stride}, kQ);
  };
  bool all = map(o.x, p.x, p.groups_x, p.head_dim);
  for (int d = 0; d < 2; ++d) {
    const SsdScanDirection& of = d ? p.reverse : p.forward;
    if (of.on) all = all && map(o.B[d], of.B, p.groups_b, p.state_dim) && map(o.C[d], of.C, p.groups_c, p.state_dim);
  }
  return all;
}

}  // namespace
}  // namespace slices

bool ssd_scan_slices(const SsdScanParams& p, const CudaContext& context) {
  using namespace slices;
  // `_slices_why_not` of linmu_ops/ssd_scan.py says the same.
  if (p.dtype != DType::bf16 || p.length <= 32 || p.head_dim < 1 || p.state_dim < 1 || p.state_dim > 128) return false;
  if (p.head_dim % 8 || p.state_dim % 8 || !aligned(p.y, 16) || (p.chunk > 0 && p.chunk != kQ)) return false;
  if (p.batch * p.heads == 0 || architecture("ssd_scan") != 90) return false;
  if (p.batch * p.heads * ceil_div(p.length, kQ) > INT32_MAX) return false;
  Plan o{};
  if (!encode(o, p)) return false;
  const int panels = p.state_dim > 64 ? 2 : 1;
  const bool both = p.forward.on && p.reverse.on;
  o.gathered = p.token_order != nullptr;
  o.per_head = static_cast<int>(ceil_div(p.head_dim, kRows));
  o.sets = share(p, o.per_head) ? 1 : 2;
  // Two of three stages hold a pair of chunks; with only two there would be none to load meanwhile.
  const bool fused = both && p.shared_projections && Tiles::of(panels, o.sets, true).stages == 3;
  o.tiles = Tiles::of(panels, o.sets, fused);

  const ScanPlan s = plan_slices(p, context);
  const int64_t units = p.batch * ceil_div(p.heads * o.per_head, kConsumers), size = p.head_dim * p.state_dim;
  o.chunks = ceil_div(s.chunks, choose_spans(units, s.chunks));
  if (fused) o.chunks = round_to(o.chunks, 2);
  o.spans = ceil_div(s.chunks, o.chunks);
  if (o.spans > 1) {
    for (int d = 0; d < 2; ++d) {
      if (!s.direction(d).on) continue;
      o.states[d] = allocate<float>(context, p.batch * p.heads * o.spans * size);
      o.through[d] = allocate<float>(context, p.batch * p.heads * o.spans);
    }
    launch_slices<Make::kAdded, false, true>(s, o, context);
    for (int d = 0; d < 2; ++d)
      if (s.direction(d).on) enter_spans(s, d, o.states[d], o.through[d], o.spans, context);
  }
  if (both)
    scan_both(s, o, fused, context);
  else if (p.forward.on)
    launch_slices<Make::kOutput, false, true>(s, o, context);
  else
    launch_slices<Make::kOutput, true, true>(s, o, context);
  redo_spoiled(s, context);
  return true;
}

}  // namespace linmu
