// One step of the causal convolution: every element of the state is read and written once.
#include "../linmu/causal_conv1d_step.h"
#include "device.cuh"

namespace linmu {
namespace {

constexpr int kThreads = 128, kMaxWidth = 8;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) conv_step_kernel(const __grid_constant__ CausalConv1dStepParams p) {
  const int64_t D = p.dim, per_row = D / V, i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.batch * per_row) return;
  const int64_t b = i / per_row, d = i % per_row * V;
  const int before = static_cast<int>(p.width) - 1;
  using Piece = Vec<T, V>;
  const float *weight = static_cast<const float*>(p.weight) + d * p.width, *bias = static_cast<const float*>(p.bias);
  T* state = static_cast<T*>(p.state) + b * before * D + d;
  Piece line[kMaxWidth];  // the state, oldest first, then x
#pragma unroll
  for (int k = 0; k < kMaxWidth; ++k) {
    if (k < before) line[k] = *reinterpret_cast<const Piece*>(state + k * D);
    if (k == before) line[k] = *reinterpret_cast<const Piece*>(static_cast<const T*>(p.x) + b * D + d);
  }
  float sum[V];
#pragma unroll
  for (int e = 0; e < V; ++e) sum[e] = bias ? bias[d + e] : 0.f;
#pragma unroll
  for (int k = 0; k < kMaxWidth; ++k) {
    if (k > before) break;
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += weight[e * p.width + k] * to_float(line[k].v[e]);
    if (k > 0) *reinterpret_cast<Piece*>(state + (k - 1) * D) = line[k];
  }
  Piece y;
#pragma unroll
  for (int e = 0; e < V; ++e) y.v[e] = from_float<T>(p.silu ? sum[e] / (1.f + expf(-sum[e])) : sum[e]);
  *reinterpret_cast<Piece*>(static_cast<T*>(p.y) + b * D + d) = y;
}

}  // namespace

void causal_conv1d_step_cuda(const CausalConv1dStepParams& p, const CudaContext& context) {
  dispatch_cuda("causal_conv1d_step", p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    constexpr int V = 2;
    constexpr int64_t bytes = V * sizeof(T);
    const bool wide = p.dim % V == 0 && aligned(p.state, bytes) && aligned(p.x, bytes) && aligned(p.y, bytes);
    const int64_t count = p.batch * (wide ? p.dim / V : p.dim);
    launch("causal_conv1d_step", wide ? conv_step_kernel<T, V> : conv_step_kernel<T, 1>,
           blocks_of(ceil_div(count, kThreads)), kThreads, 0, context, p);
  });
}

}  // namespace linmu
