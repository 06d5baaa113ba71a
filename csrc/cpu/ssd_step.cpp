// One token of the scan. One task per (batch, head): a single pass over its (P, N) state, the only traffic that counts.
#include "../linmu/ssd_step.h"

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// R rows of the state, which share the loads of B and C.
template <int R, class T, class A = acc_t<T>>
inline void rows(A* state, const T* x, const T* B, const T* C, T* y, int64_t N, A dt, A decay, A skip) {
  vec<A> u[R], dot[R] = {};
  for (int i = 0; i < R; ++i) u[i] = splat(dt * widen(x[i]));
  for_each_vector<A>(N, [&](int64_t n, auto lanes) {
    const vec<A> b = lanes.load(B + n), c = lanes.load(C + n);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const vec<A> s = lanes.load(state + i * N + n) * decay + b * u[i];
      lanes.store(state + i * N + n, s);
      dot[i] = s * c + dot[i];
    }
  });
  for (int i = 0; i < R; ++i) y[i] = narrow<T>(sum<A>(dot[i]) + skip * widen(x[i]));
}

template <class T>
void step(const SsdStepParams& p) {
  using A = acc_t<T>;
  const int64_t P = p.head_dim, N = p.state_dim, H = p.heads;
  p.threads.run(p.batch * H, 1 + 16384 / (P * N + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, h = i % H;
      const T* x = static_cast<const T*>(p.x) + (b * p.groups_x + h / (H / p.groups_x)) * P;
      const T* B = static_cast<const T*>(p.B) + (b * p.groups_b + h / (H / p.groups_b)) * N;
      const T* C = static_cast<const T*>(p.C) + (b * p.groups_c + h / (H / p.groups_c)) * N;
      A* state = static_cast<A*>(p.state) + i * P * N;
      T* y = static_cast<T*>(p.y) + i * P;
      A dt = static_cast<const A*>(p.dt)[i];
      if (p.dt_bias) dt += static_cast<const A*>(p.dt_bias)[h];
      if (p.dt_softplus) dt = softplus(dt);
      const A decay = std::exp(dt * static_cast<const A*>(p.A)[h]);
      const A skip = p.D ? static_cast<const A*>(p.D)[h] : A(0);
      int64_t r = 0;
      for (; r + 4 <= P; r += 4) rows<4>(state + r * N, x + r, B, C, y + r, N, dt, decay, skip);
      for (; r < P; ++r) rows<1>(state + r * N, x + r, B, C, y + r, N, dt, decay, skip);
    }
  });
}

}  // namespace

void ssd_step_cpu(const SsdStepParams& p) {
  dispatch(p.dtype, [&](auto* t) { step<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
