// One step of the causal convolution. One task per chunk of channels; its weights are turned around once and serve the
// whole batch.
#include "../linmu/causal_conv1d_step.h"

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int64_t kChunk = 128, kMaxWidth = 8;

using Four = float __attribute__((vector_size(16), aligned(4), may_alias));

// Four rows of four as four columns of it: value k of each at to[k][d].
inline void transpose(Four a, Four b, Four c, Four d, float (*to)[kChunk], int64_t at) {
  const Four low_ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), high_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four low_cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), high_cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const auto put = [&](int k, Four values) { *reinterpret_cast<Four*>(to[k] + at) = values; };
  put(0, __builtin_shufflevector(low_ab, low_cd, 0, 1, 4, 5));
  put(1, __builtin_shufflevector(low_ab, low_cd, 2, 3, 6, 7));
  put(2, __builtin_shufflevector(high_ab, high_cd, 0, 1, 4, 5));
  put(3, __builtin_shufflevector(high_ab, high_cd, 2, 3, 6, 7));
}

// Rows of K values, which lie side by side, as columns.
template <class A>
inline void turn(const A* rows, int64_t K, int64_t count, A (*to)[kChunk]) {
  int64_t d = 0;
  if constexpr (std::is_same_v<A, float>)
    for (; K == 4 && d + 4 <= count; d += 4) {
      const Four* four = reinterpret_cast<const Four*>(rows + d * 4);
      transpose(four[0], four[1], four[2], four[3], to, d);
    }
  for (; d < count; ++d)
    for (int64_t k = 0; k < K; ++k) to[k][d] = rows[d * K + k];
}

// All n inputs of `count` channels, which lie side by side in `state`, as columns; and x appended to them. Where there
// are four, as transformers keeps them, by vectors.
template <class T, class A = acc_t<T>>
inline void shift(T* state, const T* x, int64_t n, int64_t older, int64_t count, A (*line)[kChunk]) {
  int64_t d = 0;
  if constexpr (std::is_same_v<T, float>)
    for (; n == 4 && older <= 1 && d + 4 <= count; d += 4) {
      Four* four = reinterpret_cast<Four*>(state + d * 4);
      const Four last = *reinterpret_cast<const Four*>(x + d);
      const Four a = four[0], b = four[1], c = four[2], e = four[3];
      transpose(a, b, c, e, line, d);
      four[0] = __builtin_shufflevector(a, last, 1, 2, 3, 4), four[1] = __builtin_shufflevector(b, last, 1, 2, 3, 5);
      four[2] = __builtin_shufflevector(c, last, 1, 2, 3, 6), four[3] = __builtin_shufflevector(e, last, 1, 2, 3, 7);
    }
  for (state += d * n; d < count; ++d, state += n) {
    // Of more than kMaxWidth inputs only those that are used.
    for (int64_t k = older > 1 ? older : 0; k < n; ++k) line[older > 1 ? k - older : k][d] = widen(state[k]);
    for (int64_t k = 0; k + 1 < n; ++k) state[k] = state[k + 1];
    if (n > 0) state[n - 1] = x[d];
  }
}

template <class T>
void step(const CausalConv1dStepParams& p) {
  using A = acc_t<T>;
  const int64_t D = p.dim, K = p.width, older = p.older, n = older + K - 1, chunks = (D + kChunk - 1) / kChunk;
  p.threads.run(chunks, 1 + 65536 / (kChunk * K * p.batch + 1), [&](int64_t begin, int64_t end) {
    alignas(64) A taps[kMaxWidth][kChunk];
    alignas(64) A line[kMaxWidth][kChunk];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, D - first);
      const A* weight = static_cast<const A*>(p.weight) + first * K;
      const A* bias = p.bias ? static_cast<const A*>(p.bias) + first : nullptr;
      turn(weight, K, count, taps);
      for (int64_t b = 0; b < p.batch; ++b) {
        const T* x = static_cast<const T*>(p.x) + b * D + first;
        T* y = static_cast<T*>(p.y) + b * D + first;
        if (p.by_channel) {
          shift(static_cast<T*>(p.state) + (b * D + first) * n, x, n, older, count, line);
          const auto* used = line + (older == 1);
          for_each_vector<A>(count, [&](int64_t d, auto lanes) {
            vec<A> sum = bias ? lanes.load(bias + d) : vec<A>{};
            for (int64_t k = 0; k < K - 1; ++k) sum = lanes.load(taps[k] + d) * lanes.load(used[k] + d) + sum;
            sum = lanes.load(taps[K - 1] + d) * lanes.load(x + d) + sum;
            lanes.store(y + d, p.silu ? sum * sigmoid(sum) : sum);
          });
          continue;
        }
        T* rows = static_cast<T*>(p.state) + b * n * D + first;
        for (int64_t k = 0; k < older; ++k) {
          const T* next = k + 1 < n ? rows + (k + 1) * D : x;
          std::copy(next, next + count, rows + k * D);
        }
        T* state = rows + older * D;
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
