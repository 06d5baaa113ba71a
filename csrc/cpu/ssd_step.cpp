// One token of the scan. One task per (batch, head): a single pass over its (P, N) state, the only traffic that counts.
#include "../linmu/ssd_step.h"

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

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
      A* state = static_cast<A*>(p.state) + i * P * N;
      T* y = static_cast<T*>(p.y) + i * P;
      A dt = static_cast<const A*>(p.dt)[i];
      if (p.dt_bias) dt += static_cast<const A*>(p.dt_bias)[h];
      if (p.dt_softplus) dt = softplus(dt);
      const A decay = std::exp(dt * static_cast<const A*>(p.A)[h]);
      const A skip = p.D ? static_cast<const A*>(p.D)[h] : A(0);
      for (int64_t r = 0; r < P; ++r, state += N) {
        const A u = dt * widen(x[r]);
        vec<A> dot{};
        int64_t n = 0;
        for (; n + W <= N; n += W) {
          vec<A> s = load(state + n) * decay + load(B + n) * u;
          store(state + n, s);
          dot = s * load(C + n) + dot;
        }
        if (n < N) {
          const int rest = static_cast<int>(N - n);
          vec<A> s = load_n(state + n, rest) * decay + load_n(B + n, rest) * u;
          store_n(state + n, s, rest);
          dot = s * load_n(C + n, rest) + dot;
        }
        y[r] = narrow<T>(sum<A>(dot) + skip * widen(x[r]));
      }
    }
  });
}

}  // namespace

void ssd_step_cpu(const SsdStepParams& p) {
  dispatch(p.dtype, [&](auto* t) { step<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
