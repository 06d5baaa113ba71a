// One step of the causal convolution. One task per chunk of channels; its weights are turned around once and serve the
// whole batch.
#include "../linmu/causal_conv1d_step.h"

#include <algorithm>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int64_t kChunk = 128, kMaxWidth = 8;

template <class T>
void step(const CausalConv1dStepParams& p) {
  using A = acc_t<T>;
  const int64_t D = p.dim, K = p.width, chunks = (D + kChunk - 1) / kChunk;
  p.threads.run(chunks, 1 + 65536 / (kChunk * K * p.batch + 1), [&](int64_t begin, int64_t end) {
    alignas(64) A taps[kMaxWidth][kChunk];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, D - first);
      const A* weight = static_cast<const A*>(p.weight) + first * K;
      const A* bias = p.bias ? static_cast<const A*>(p.bias) + first : nullptr;
      for (int64_t d = 0; d < count; ++d)
        for (int64_t k = 0; k < K; ++k) taps[k][d] = weight[d * K + k];
      for (int64_t b = 0; b < p.batch; ++b) {
        const T* x = static_cast<const T*>(p.x) + b * D + first;
        T* state = static_cast<T*>(p.state) + b * (K - 1) * D + first;
        T* y = static_cast<T*>(p.y) + b * D + first;
        for_each_vector<A>(count, [&](int64_t d, auto lanes) {
          vec<A> sum = bias ? lanes.load(bias + d) : vec<A>{};
          for (int64_t k = 0; k < K - 1; ++k) {
            sum = lanes.load(taps[k] + d) * lanes.load(state + k * D + d) + sum;
            lanes.store(state + k * D + d, lanes.load(k + 2 < K ? state + (k + 1) * D + d : x + d));
          }
          sum = lanes.load(taps[K - 1] + d) * lanes.load(x + d) + sum;
          lanes.store(y + d, p.silu ? sum * sigmoid(sum) : sum);
        });
      }
    }
  });
}

}  // namespace

void causal_conv1d_step_cpu(const CausalConv1dStepParams& p) {
  dispatch(p.dtype, [&](auto* t) { step<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
