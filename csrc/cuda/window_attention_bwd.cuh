// What the gradients of window_attention share.
#pragma once
#include "window_attention.cuh"

namespace linmu {

// A log-sum-exp as an exponent; infinity, for weights of 0, where no key answered.
template <class T>
__device__ inline float exponent(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kPerE<T>;
}

// The log-sum-exp of a lane's rows, as exponents; infinity, for weights of 0, where there is no query.
template <class T, int R>
__device__ inline void read_lse(float (&lse)[R], const WindowAttentionParams& p, const WindowSlots& window, int first,
                                int64_t head, const int* tokens) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int row = row_of(r);
    const int64_t at = (window.begin + first + row) * p.heads + head;
    lse[r] = tokens[row] < 0 ? INFINITY : exponent<T>(static_cast<const float*>(p.lse)[at]);
  }
}

// Exponents, rows the queries, become weight * (dp - delta).
template <class T, int M, int N>
__device__ inline void score_gradients(Accumulator<M, N>& ds, const Accumulator<M, N>& dp, const float (&lse)[M / 8],
                                       const float* deltas) {
#pragma unroll
  for (int r = 0; r < M / 8; ++r) {
    const float delta = deltas[row_of(r)];
#pragma unroll
    for (int c = 0; c < N / 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = ds.v[r / 2][c][r % 2 * 2 + e];
        x = power<T>(x - lse[r]) * (dp.v[r / 2][c][r % 2 * 2 + e] - delta);
      }
  }
}

// dbias (H, bias_size), from s.delta and the log-sum-exp.
void window_bias_gradient(const WindowPlan& s, float* dbias, const CudaContext& context);

}  // namespace linmu
