// The gradients of the scan that are one number per visit and head, or per head.
//
// The log-decay of a visit weighs every pair on either side of it. Their sum changes from visit to visit by what ends
// there and what begins, so one walk along the chunk finds it; in double, and from the same numbers at both ends, for
// most of it cancels.
#include "ssd_scan_bwd.cuh"

namespace linmu {
namespace {

constexpr int kThreads = 128;

struct Small {
  const VisitSums* sums[2];
  const double* through[2];
  Totals* totals;  // (B, all_chunks, H)
  int64_t all_chunks;
};

__global__ void __launch_bounds__(kThreads)
    per_visit_kernel(const __grid_constant__ SsdScanBwdParams g, const __grid_constant__ ScanPlan s,
                     const __grid_constant__ Small small) {
  const SsdScanParams& p = s.p;
  const int64_t c = blockIdx.x, b = blockIdx.y, L = p.length, H = p.heads;
  const int32_t* tokens = s.tokens + s.rows(b, c);
  for (int64_t h = threadIdx.x; h < H; h += kThreads) {
    Totals totals{};
    for (int d = 0; d < 2; ++d) {
      const SsdScanDirection& of = s.direction(d);
      if (!of.on) continue;
      const Visit* visits = s.visits[d] + s.rows(b, h, c);
      const VisitSums* sums = small.sums[d] + s.rows(b, h, c);
      const int64_t chunk = (b * H + h) * s.chunks + c;
      const int32_t* segments = s.segments[d] + s.rows(b, c);
      const double passing = s.through[d][chunk] == 0.f ? 0 : s.through[d][chunk] * small.through[d][chunk];
      const auto weighed = [](float by, double value) { return by == 0.f ? 0 : by * value; };
      const double rate = static_cast<const float*>(of.A)[h];
      const float bias = of.dt_bias ? static_cast<const float*>(of.dt_bias)[h] : 0.f;
      // Both directions of a shared dt, gate: the second adds to the first.
      const bool own_dt = d == 1 && g.reverse.dt, adds = d == 1 && p.forward.on;
      float* ddt = static_cast<float*>(own_dt ? g.reverse.dt : g.forward.dt);
      float* dgate = p.gate_per_token ? static_cast<float*>(g.gate) : nullptr;
      double arriving = 0, left = 0, crossing = 0;
      // What is not finite, or large beside the rest, no difference takes back: then each visit has a sum of its own.
      bool apart = false;
      for (int i = 0; i < s.chunk; ++i) {
        const double arrives = weighed(visits[i].weight, sums[i].from_state);
        arriving += arrives, apart |= !(fabs(arrives) < 1e10) || !(fabs(sums[i].flow) < 1e10);
      }
      const auto summed = [&](int k) {
        double before = 0, after = 0, size_before = 0, size_after = 0, arrives = 0;
        for (int l = 0; l < s.chunk; ++l) {
          const int i = d ? s.chunk - 1 - l : l;
          if (segments[i] != segments[d ? s.chunk - 1 - k : k]) continue;
          const double flow = sums[i].flow;
          if (l < k) {
            before += flow, size_before += fabs(flow);
          } else {
            after -= flow, size_after += fabs(flow), arrives += weighed(visits[i].weight, sums[i].from_state);
          }
        }
        // What began before the visit and has not ended is what ends from it on.
        return arrives + (size_after < size_before || size_before != size_before ? after : before);
      };
      for (int k = 0; k < s.chunk; ++k) {
        const int i = d ? s.chunk - 1 - k : k, token = tokens[i];
        if (token < 0) continue;
        const Visit v = visits[i];
        const VisitSums e = sums[i];
        if (k > 0 && segments[i] != segments[d ? i + 1 : i - 1]) left = 0;
        const double decay_gradient = (apart ? summed(k) : crossing + arriving) + left + passing;
        arriving -= weighed(v.weight, e.from_state);
        left += weighed(v.step, e.to_state);
        crossing += e.flow;
        const bool keep = !p.reverse.mask || p.reverse.mask[b * L + token];
        const int64_t at = (b * L + token) * H + h;
        double gradient = 0;
        if (d == 0 || keep) {
          gradient = e.column + weighed(v.weight, e.diagonal) + e.to_state + decay_gradient * rate;
          if (p.dt_softplus) gradient *= softplus_slope(static_cast<const float*>(of.dt)[at] + bias);
          totals.A[d] += decay_gradient * v.step, totals.dt_bias[d] += gradient;
        }
        ddt[at] = static_cast<float>(adds && !own_dt ? ddt[at] + gradient : gradient);
        const double weight = keep ? e.row + static_cast<double>(v.step) * e.diagonal + e.from_state : 0;
        totals.gate += d ? -weight : weight;
        if (dgate) dgate[at] = static_cast<float>(adds ? dgate[at] - weight : weight);
        if (!adds) totals.D += e.gram;
      }
    }
    small.totals[(b * small.all_chunks + s.first_chunk + c) * H + h] = totals;
  }
}

// One block per head.
__global__ void __launch_bounds__(kThreads)
    per_head_kernel(const __grid_constant__ SsdScanBwdParams g, const Totals* totals, int64_t count) {
  LINMU_SHARED(memory);
  Totals* parts = reinterpret_cast<Totals*>(memory);
  const SsdScanParams& p = g.scan;
  const int64_t h = blockIdx.x;
  Totals sum{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum.add(totals[i * p.heads + h]);
  parts[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) parts[threadIdx.x].add(parts[threadIdx.x + half]);
  }
  if (threadIdx.x > 0) return;
  Totals t = parts[0];
  if (!g.reverse.A) t.A[0] += t.A[1];
  if (!g.reverse.dt_bias) t.dt_bias[0] += t.dt_bias[1];
  const auto put = [&](void* to, double value) {
    if (to) static_cast<float*>(to)[h] = static_cast<float>(value);
  };
  put(g.forward.A, t.A[0]), put(g.reverse.A, t.A[1]);
  put(g.forward.dt_bias, t.dt_bias[0]), put(g.reverse.dt_bias, t.dt_bias[1]);
  put(g.D, t.D);
  if (!p.gate_per_token) put(g.gate, t.gate);
}

}  // namespace

void visit_gradients(const SsdScanBwdParams& g, const ScanPlan& s, VisitSums* const* sums, double* const* through,
                     Totals* totals, int64_t all_chunks, const CudaContext& context) {
  const Small small{{sums[0], sums[1]}, {through[0], through[1]}, totals, all_chunks};
  const dim3 blocks(static_cast<unsigned>(s.chunks), static_cast<unsigned>(s.p.batch));
  launch("ssd_scan_bwd", per_visit_kernel, blocks, kThreads, 0, context, g, s, small);
}

void head_gradients(const SsdScanBwdParams& g, const Totals* totals, int64_t all_chunks, const CudaContext& context) {
  launch("ssd_scan_bwd", per_head_kernel, blocks_of(g.scan.heads), kThreads,
         kThreads * static_cast<int64_t>(sizeof(Totals)), context, g, totals, g.scan.batch * all_chunks);
}

}  // namespace linmu
