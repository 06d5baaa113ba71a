// One token of the gated delta rule. One task per (batch, head): its (K, V) state is read from memory once, for k S and
// q S at a time, and is still in cache when it is updated:
//     u = beta (v - decay k S),    y = decay q S + (q . k) u,    S = decay S + k (outer) u
#include "../linmu/gated_delta_step.h"

#include <vector>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// Vectors of V that are summed at a time: two sums each stay in registers.
constexpr int kPanel = LINMU_VECTOR_BYTES == 64 ? 8 : 4;

template <class A>
struct Head {
  A* state;  // (K, V)
  const A *k, *q;
  int64_t K, V;
  A decay, beta, dot;  // dot: q . k
};

// NV whole vectors of columns, or the lanes of one.
template <int NV, class T, class Lanes, class A = acc_t<T>>
inline void columns(const Head<A>& h, const T* v, T* y, int64_t at, Lanes lanes) {
  constexpr int W = Simd<A>::width;
  vec<A> by_k[NV] = {}, by_q[NV] = {};
  A* row = h.state + at;
  for (int64_t i = 0; i < h.K; ++i, row += h.V) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      const vec<A> s = lanes.load(row + n * W);
      by_k[n] = s * h.k[i] + by_k[n];
      by_q[n] = s * h.q[i] + by_q[n];
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < NV; ++n) {
    by_k[n] = (lanes.load(v + at + n * W) - by_k[n] * h.decay) * h.beta;
    lanes.store(y + at + n * W, by_q[n] * h.decay + by_k[n] * h.dot);
  }
  row = h.state + at;
  for (int64_t i = 0; i < h.K; ++i, row += h.V) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) lanes.store(row + n * W, lanes.load(row + n * W) * h.decay + by_k[n] * h.k[i]);
  }
}

// A row of K values, widened, times `factor`; to length 1 first if wanted.
template <class T, class A = acc_t<T>>
inline void read_row(const T* from, int64_t K, bool normalize, A factor, A* to) {
  A squares = 0;
  for (int64_t i = 0; i < K; ++i) to[i] = widen(from[i]), squares += to[i] * to[i];
  if (normalize) factor *= 1 / std::sqrt(squares + A(1e-6));
  for (int64_t i = 0; i < K; ++i) to[i] *= factor;
}

template <class T>
void step(const GatedDeltaStepParams& p) {
  using A = acc_t<T>;
  constexpr int W = Simd<A>::width;
  const int64_t K = p.key_dim, V = p.value_dim, H = p.heads;
  p.threads.run(p.batch * H, 1 + 16384 / (K * V + 1), [&](int64_t begin, int64_t end) {
    std::vector<A> q(K), k(K);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, h = i % H;
      const auto row = [&](const void* data, int64_t groups, int64_t dim) {
        return static_cast<const T*>(data) + (b * groups + h / (H / groups)) * dim;
      };
      read_row(row(p.q, p.groups_q, K), K, p.normalize, static_cast<A>(p.scale), q.data());
      read_row(row(p.k, p.groups_k, K), K, p.normalize, A(1), k.data());
      Head<A> head{
          static_cast<A*>(p.state) + i * K * V, k.data(), q.data(), K, V, std::exp(static_cast<const A*>(p.g)[i]),
          static_cast<const A*>(p.beta)[i],     A(0)};
      for (int64_t n = 0; n < K; ++n) head.dot += q[n] * k[n];
      const T* v = row(p.v, p.groups_v, V);
      T* y = static_cast<T*>(p.y) + i * V;
      int64_t at = 0;
      for (; at + kPanel * W <= V; at += kPanel * W) columns<kPanel>(head, v, y, at, AllLanes{});
      for (; at + W <= V; at += W) columns<1>(head, v, y, at, AllLanes{});
      if (at < V) columns<1>(head, v, y, at, SomeLanes{static_cast<int>(V - at)});
    }
  });
}

}  // namespace

void gated_delta_step_cpu(const GatedDeltaStepParams& p) {
  dispatch(p.dtype, [&](auto* t) { step<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
