// One token of the scan. One task per (batch, head): a single pass over its (P, N) state, the only traffic that counts.
#include "../linmu/ssd_step.h"

#include "../linmu/ssd_scan.h"
#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// Rows of N values each. V > 0: N is V vectors, and B and C stay in registers, so that a row costs little more than the
// memory it is in.
template <int V, class T, class A = acc_t<T>>
inline void rows(A* state, const T* x, const T* B, const T* C, T* y, A* log_mass, int64_t P, int64_t N, A dt, A decay,
                 A skip) {
  constexpr int W = Simd<A>::width;
  vec<A> b[V ? V : 1], c[V ? V : 1];
#pragma GCC unroll 8
  for (int i = 0; i < V; ++i) b[i] = load(B + i * W), c[i] = load(C + i * W);
  const auto row = [&](A value) {
    const A u = dt * value;
    vec<A> dot[2] = {};
    if constexpr (V > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) {
        const vec<A> s = load(state + i * W) * decay + b[i] * u;
        store(state + i * W, s);
        dot[i % 2] = s * c[i] + dot[i % 2];
      }
    } else {
      for_each_vector<A>(N, [&](int64_t n, auto lanes) {
        const vec<A> s = lanes.load(state + n) * decay + lanes.load(B + n) * u;
        lanes.store(state + n, s);
        dot[0] = s * lanes.load(C + n) + dot[0];
      });
    }
    state += N;
    return sum<A>(dot[0] + dot[1]) + skip * value;
  };
  A* const first = state;
  A factor = 1;
  bool empty = false;
  if (log_mass) {
    state = first + P * N;
    const A mass = row(A(1));
    empty = mass < A(kLeastMass), factor = 1 / mass;
    *log_mass = empty ? -std::numeric_limits<A>::infinity() : std::log(mass);
    state = first;
  }
  for (int64_t r = 0; r < P; ++r) {
    const A value = row(widen(x[r]));
    y[r] = narrow<T>(empty ? A(0) : value * factor);
  }
}

template <class T>
void step(const SsdStepParams& p) {
  using A = acc_t<T>;
  constexpr int W = Simd<A>::width;
  const int64_t P = p.head_dim, N = p.state_dim, H = p.heads;
  p.threads.run(p.batch * H, 1 + 16384 / (P * N + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, h = i % H;
      const T* x = static_cast<const T*>(p.x) + (b * p.groups_x + h / (H / p.groups_x)) * P;
      const T* B = static_cast<const T*>(p.B) + (b * p.groups_b + h / (H / p.groups_b)) * N;
      const T* C = static_cast<const T*>(p.C) + (b * p.groups_c + h / (H / p.groups_c)) * N;
      A* state = static_cast<A*>(p.state) + i * (P + p.normalize) * N;
      A* log_mass = p.normalize ? static_cast<A*>(p.log_mass) + i : nullptr;
      T* y = static_cast<T*>(p.y) + i * P;
      A dt = static_cast<const A*>(p.dt)[i];
      if (p.dt_bias) dt += static_cast<const A*>(p.dt_bias)[h];
      if (p.dt_softplus) dt = softplus(dt);
      const A decay = std::exp(dt * static_cast<const A*>(p.A)[h]);
      const A skip = p.D ? static_cast<const A*>(p.D)[h] : A(0);
      const auto run = [&](auto v) { rows<v>(state, x, B, C, y, log_mass, P, N, dt, decay, skip); };
      if (N == 8 * W)
        run(std::integral_constant<int, 8>{});
      else if (N == 4 * W)
        run(std::integral_constant<int, 4>{});
      else
        run(std::integral_constant<int, 0>{});
    }
  });
}

}  // namespace

void ssd_step_cpu(const SsdStepParams& p) {
  dispatch(p.dtype, [&](auto* t) { step<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
