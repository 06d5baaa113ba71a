// One token of the scan: a single pass over the (B, H, P, N) states, the only traffic that counts. A warp walks along N
// for kRows rows of P at once, so that B and C are read once for all of them.
#include "../linmu/ssd_step.h"
#include "device.cuh"

namespace linmu {
namespace {

constexpr int kRows = 4, kThreads = 256, kRowsPerBlock = kRows * kThreads / kWarp;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) step_kernel(SsdStepParams p) {
  const int64_t P = p.head_dim, N = p.state_dim, H = p.heads, tiles = (P + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t bh = blockIdx.x / tiles, b = bh / H, h = bh % H;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = blockIdx.x % tiles * kRowsPerBlock + warp * kRows;
  if (row >= P) return;
  const T* x = static_cast<const T*>(p.x) + (b * p.groups_x + h / (H / p.groups_x)) * P;
  const T* B = static_cast<const T*>(p.B) + (b * p.groups_b + h / (H / p.groups_b)) * N;
  const T* C = static_cast<const T*>(p.C) + (b * p.groups_c + h / (H / p.groups_c)) * N;
  float* state = static_cast<float*>(p.state) + (bh * P + row) * N;
  T* y = static_cast<T*>(p.y) + bh * P;
  float dt = static_cast<const float*>(p.dt)[bh];
  if (p.dt_bias) dt += static_cast<const float*>(p.dt_bias)[h];
  if (p.dt_softplus) dt = softplus(dt);
  const float decay = expf(dt * static_cast<const float*>(p.A)[h]);
  const int rows = static_cast<int>(P - row < kRows ? P - row : kRows);

  float value[kRows], dot[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) value[r] = r < rows ? to_float(x[row + r]) : 0.f;
  for (int64_t n = lane * V; n < N; n += kWarp * V) {
    Vec<float, V> s[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) s[r] = *reinterpret_cast<const Vec<float, V>*>(state + r * N + n);
    float bn[V], cn[V];
#pragma unroll
    for (int i = 0; i < V; ++i) bn[i] = dt * to_float(B[n + i]), cn[i] = to_float(C[n + i]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        s[r].v[i] = s[r].v[i] * decay + value[r] * bn[i];
        dot[r] += s[r].v[i] * cn[i];
      }
      *reinterpret_cast<Vec<float, V>*>(state + r * N + n) = s[r];
    }
  }
  const float skip = p.D ? static_cast<const float*>(p.D)[h] : 0.f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = warp_sum(dot[r]);
    if (lane == 0 && r < rows) y[row + r] = from_float<T>(sum + skip * value[r]);
  }
}

}  // namespace

void ssd_step_cuda(const SsdStepParams& p, const CudaContext& context) {
  dispatch_cuda("ssd_step", p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const bool wide = p.state_dim % 4 == 0 && aligned(p.state, 16);
    const dim3 blocks = blocks_of(p.batch * p.heads * ceil_div(p.head_dim, kRowsPerBlock));
    SsdStepParams on_device = p;
    launch("ssd_step", wide ? step_kernel<T, 4> : step_kernel<T, 1>, blocks, kThreads, 0, context, on_device);
  });
}

}  // namespace linmu
