// Gated norm: a row of x and z is read from memory once; the passes over a group after that are in cache.
#include "../linmu/gated_norm.h"

#include <algorithm>
#include <vector>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

template <class T>
const T* row_of(const GatedNormParams& p, const GatedNormTensor& t, int64_t row) {
  return static_cast<const T*>(t.data) + row / p.length * t.batch_stride + row % p.length * t.token_stride;
}

// 1 / sqrt(mean square + eps) of a group, whose gated values go to `to` if the gate comes first.
template <class T, bool GateFirst>
acc_t<T> scale_of(const GatedNormParams& p, const T* x, const T* z, acc_t<T>* to) {
  using A = acc_t<T>;
  vec<A> squares{};  // lanes past the end stay 0: they load as 0
  for_each_vector<A>(p.group_size, [&](int64_t d, auto lanes) {
    vec<A> u = lanes.load(x + d);
    if constexpr (GateFirst) {
      const vec<A> gate = lanes.load(z + d);
      u = u * (gate * sigmoid(gate));
      lanes.store(to + d, u);
    }
    squares = u * u + squares;
  });
  return 1 / std::sqrt(sum<A>(squares) / static_cast<A>(p.group_size) + static_cast<A>(p.eps));
}

template <class T, bool GateFirst>
void forward(const GatedNormParams& p) {
  using A = acc_t<T>;
  const A* weight = static_cast<const A*>(p.weight);
  const int64_t rows = p.batch * p.length, D = p.dim, G = p.group_size;
  const bool streams = worth_streaming(static_cast<const T*>(p.out), rows, D) && G % Simd<A>::width == 0;
  p.threads.run(rows, 1 + 32768 / (D + 1), [&](int64_t begin, int64_t end) {
    std::vector<A> gated(GateFirst ? G : 0);
    A* to = gated.data();
    for (int64_t row = begin; row < end; ++row) {
      const T *x = row_of<T>(p, p.x, row), *z = row_of<T>(p, p.z, row);
      T* out = static_cast<T*>(p.out) + row * D;
      for (int64_t from = 0; from < D; from += G) {
        const A scale = scale_of<T, GateFirst>(p, x + from, z + from, to);
        for_each_vector<A>(G, [&](int64_t i, auto lanes) {
          const int64_t d = from + i;
          vec<A> u;
          if constexpr (GateFirst) {
            u = lanes.load(to + i) * scale;
            if (weight) u = u * lanes.load(weight + d);
          } else {
            const vec<A> gate = lanes.load(z + d);
            u = lanes.load(x + d) * scale;
            if (weight) u = u * lanes.load(weight + d);
            u = u * (gate * sigmoid(gate));
          }
          if (streams)
            lanes.stream(out + d, u);
          else
            lanes.store(out + d, u);
        });
      }
    }
    finish_streams();
  });
}

// With n the normed group and h the gradient of n: du = scale * (h - n * mean(h n)). Sums over rows go to a slot per
// task; the tasks depend on the shape alone, so any threads give the same bits.
template <class T, bool GateFirst>
void backward(const GatedNormBwdParams& q) {
  using A = acc_t<T>;
  const GatedNormParams& p = q.forward;
  const A* weight = static_cast<const A*>(p.weight);
  const int64_t rows = p.batch * p.length, D = p.dim, G = p.group_size;
  const int64_t per_task = std::max<int64_t>(16, (rows + 31) / 32), tasks = (rows + per_task - 1) / per_task;
  std::vector<A> sums(q.dweight ? tasks * D : 0);
  p.threads.run(tasks, 1 + 16384 / (per_task * D + 1), [&](int64_t begin, int64_t end) {
    std::vector<A> gated(GateFirst ? G : 0);
    A* to = gated.data();
    for (int64_t task = begin; task < end; ++task) {
      A* dweight = q.dweight ? sums.data() + task * D : nullptr;
      for (int64_t row = task * per_task; row < std::min(rows, (task + 1) * per_task); ++row) {
        const T *x = row_of<T>(p, p.x, row), *z = row_of<T>(p, p.z, row), *dy = row_of<T>(p, q.grad_out, row);
        T *dx = static_cast<T*>(q.dx) + row * D, *dz = static_cast<T*>(q.dz) + row * D;
        for (int64_t from = 0; from < D; from += G) {
          const A scale = scale_of<T, GateFirst>(p, x + from, z + from, to);
          vec<A> along{};
          for_each_vector<A>(G, [&](int64_t i, auto lanes) {
            const int64_t d = from + i;
            vec<A> n, h = lanes.load(dy + d);
            if constexpr (GateFirst) {
              n = lanes.load(to + i) * scale;
            } else {
              const vec<A> gate = lanes.load(z + d);
              n = lanes.load(x + d) * scale;
              h = h * (gate * sigmoid(gate));
            }
            if (dweight) lanes.store(dweight + d, h * n + lanes.load(dweight + d));
            if (weight) h = h * lanes.load(weight + d);
            along = h * n + along;
          });
          const A mean = sum<A>(along) / static_cast<A>(G);
          for_each_vector<A>(G, [&](int64_t i, auto lanes) {
            const int64_t d = from + i;
            const vec<A> gate = lanes.load(z + d), open = sigmoid(gate), silu = gate * open;
            const vec<A> slope = open * (1 + gate * (1 - open));
            const vec<A> value = lanes.load(x + d);
            vec<A> h = lanes.load(dy + d);
            if (weight) h = h * lanes.load(weight + d);
            if constexpr (GateFirst) {
              const vec<A> du = (h - lanes.load(to + i) * scale * mean) * scale;
              lanes.store(dx + d, du * silu);
              lanes.store(dz + d, du * value * slope);
            } else {
              const vec<A> n = value * scale;
              lanes.store(dx + d, (h * silu - n * mean) * scale);
              lanes.store(dz + d, h * n * slope);
            }
          });
        }
      }
    }
  });
  for (int64_t d = 0; q.dweight && d < D; ++d) {
    A total = 0;
    for (int64_t task = 0; task < tasks; ++task) total += sums[task * D + d];
    static_cast<A*>(q.dweight)[d] = total;
  }
}

}  // namespace

void gated_norm_fwd_cpu(const GatedNormParams& p) {
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    p.norm_before_gate ? forward<T, false>(p) : forward<T, true>(p);
  });
}

void gated_norm_bwd_cpu(const GatedNormBwdParams& q) {
  dispatch(q.forward.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    q.forward.norm_before_gate ? backward<T, false>(q) : backward<T, true>(q);
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
