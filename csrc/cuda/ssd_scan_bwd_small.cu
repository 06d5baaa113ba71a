// The gradients of the scan that are one number per visit and head, or per head.
//
// The log-decay of a visit weighs every pair on either side of it. Their sum changes from visit to visit by what ends
// there and what begins, so one walk along the chunk finds it; in double, and from the same numbers at both ends, for
// most of it cancels.
#include "ssd_scan_bwd.cuh"

namespace linmu {
namespace {

constexpr int kThreads = 128;

// Of one head, over the visits of a chunk.
struct Totals {
  double A[2], dt_bias[2], D, gate;

  __device__ void add(const Totals& t) {
    for (int d = 0; d < 2; ++d) A[d] += t.A[d], dt_bias[d] += t.dt_bias[d];
    D += t.D, gate += t.gate;
  }
};

struct Small {
  const VisitSums* sums[2];
  const double* through[2];
  Totals* totals;  // (B, chunks, H)
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
      const double passing = s.through[d][chunk] * small.through[d][chunk];
      const double rate = static_cast<const float*>(of.A)[h];
      const float bias = of.dt_bias ? static_cast<const float*>(of.dt_bias)[h] : 0.f;
      // Both directions of a shared dt, gate: the second adds to the first.
      const bool own_dt = d == 1 && g.reverse.dt, adds = d == 1 && p.forward.on;
      float* ddt = static_cast<float*>(own_dt ? g.reverse.dt : g.forward.dt);
      float* dgate = p.gate_per_token ? static_cast<float*>(g.gate) : nullptr;
      double arriving = 0, left = 0, crossing = 0;
      for (int i = 0; i < s.chunk; ++i) arriving += static_cast<double>(visits[i].weight) * sums[i].from_state;
      for (int k = 0; k < s.chunk; ++k) {
        const int i = d ? s.chunk - 1 - k : k, token = tokens[i];
        if (token < 0) continue;
        const Visit v = visits[i];
        const VisitSums e = sums[i];
        const double decay_gradient = crossing + arriving + left + passing;
        arriving -= static_cast<double>(v.weight) * e.from_state;
        left += static_cast<double>(v.step) * e.to_state;
        crossing += e.flow;
        const bool keep = !p.reverse_mask || p.reverse_mask[b * L + token];
        const int64_t at = (b * L + token) * H + h;
        double gradient = 0;
        if (d == 0 || keep) {
          gradient = e.column + static_cast<double>(v.weight) * e.diagonal + e.to_state + decay_gradient * rate;
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
    small.totals[(b * s.chunks + c) * H + h] = totals;
  }
}

// One block per head.
__global__ void __launch_bounds__(kThreads)
    per_head_kernel(const __grid_constant__ SsdScanBwdParams g, const __grid_constant__ Small small, int64_t count) {
  LINMU_SHARED(memory);
  Totals* parts = reinterpret_cast<Totals*>(memory);
  const SsdScanParams& p = g.scan;
  const int64_t h = blockIdx.x;
  Totals sum{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum.add(small.totals[i * p.heads + h]);
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

void small_gradients(const SsdScanBwdParams& g, const ScanPlan& s, VisitSums* const* sums, double* const* through,
                     const CudaContext& context) {
  const SsdScanParams& p = s.p;
  Small small{{sums[0], sums[1]}, {through[0], through[1]}, allocate<Totals>(context, p.batch * s.chunks * p.heads)};
  const dim3 blocks(static_cast<unsigned>(s.chunks), static_cast<unsigned>(p.batch));
  launch("ssd_scan_bwd", per_visit_kernel, blocks, kThreads, 0, context, g, s, small);
  launch("ssd_scan_bwd", per_head_kernel, blocks_of(p.heads), kThreads, kThreads * static_cast<int64_t>(sizeof(Totals)),
         context, g, small, p.batch * s.chunks);
}

}  // namespace linmu
