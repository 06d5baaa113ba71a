// Mix and norm: a row of both branches is read from memory once; the passes over it after that are in cache.
#include "../linmu/branch_mix_norm.h"

#include <algorithm>
#include <vector>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int64_t kBlock = 16;  // rows per task

// The mixed row, its mean and the reciprocal of its deviation (0 and 1 where the norm has none).
template <class T>
struct Row {
  using A = acc_t<T>;
  const BranchMixNormParams& p;
  std::vector<A> mixed;
  const T *a, *b;
  bool on;
  A mean, scale;

  explicit Row(const BranchMixNormParams& params) : p(params), mixed(params.dim) {}

  // The weight of a, by channel or the same for the row.
  struct Share {
    const A* by_channel;
    vec<A> same;

    template <class L>
    vec<A> operator()(int64_t d, L lanes) const {
      return by_channel ? lanes.load(by_channel + d) : same;
    }
  };
  Share share_of(int64_t row) const {
    const A* mix = static_cast<const A*>(p.mix);
    Share share{};
    if (p.mix_by == MixBy::channel)
      share.by_channel = mix;
    else
      share.same += mix[p.mix_by == MixBy::token ? row : 0];
    return share;
  }

  // Prefetches the next row while this one is computed on; past the last row that is harmless.
  void prefetch(int64_t d) const {
    __builtin_prefetch(a + p.dim + d);
    __builtin_prefetch(b + p.dim + d);
  }

  void read(int64_t row) {
    const int64_t D = p.dim;
    a = static_cast<const T*>(p.a) + row * D, b = static_cast<const T*>(p.b) + row * D;
    on = !p.mask || p.mask[row];
    // Copies, because a store through a pointer could change what `this` holds, as far as the compiler knows.
    const T *from = a, *other = b;
    A* to = mixed.data();
    const bool both = on, layer = p.norm == Norm::layer;
    const Share share = share_of(row);
    vec<A> total{};  // lanes past the end stay 0: they load as 0 and mix to 0
    for_each_vector<A>(D, [&](int64_t d, auto lanes) {
      vec<A> m = lanes.load(from + d);
      if (both) {
        const vec<A> mix = share(d, lanes);
        m = mix * m + (1 - mix) * lanes.load(other + d);
      }
      lanes.store(to + d, m);
      total = layer ? total + m : m * m + total;
    });
    mean = 0, scale = 1;
    if (p.norm == Norm::none) return;
    A square = sum<A>(total) / static_cast<A>(D);
    if (p.norm == Norm::layer) {
      mean = square;
      const A middle = mean;
      vec<A> squares{};
      for_each_vector<A>(D, [&](int64_t d, auto lanes) {
        const vec<A> c = lanes.only(lanes.load(to + d) - middle);
        squares = c * c + squares;
      });
      square = sum<A>(squares) / static_cast<A>(D);
    }
    scale = 1 / std::sqrt(square + static_cast<A>(p.eps));
  }
};

template <class T>
void forward(const BranchMixNormParams& p) {
  using A = acc_t<T>;
  const A *weight = static_cast<const A*>(p.weight), *bias = static_cast<const A*>(p.bias);
  const bool streams = worth_streaming(static_cast<const T*>(p.out), p.rows, p.dim);
  p.threads.run(p.rows, 1 + 32768 / (p.dim + 1), [&](int64_t begin, int64_t end) {
    Row<T> r(p);
    for (int64_t row = begin; row < end; ++row) {
      r.read(row);
      T* out = static_cast<T*>(p.out) + row * p.dim;
      const A* mixed = r.mixed.data();
      const A mean = r.mean, scale = r.scale;
      for_each_vector<A>(p.dim, [&](int64_t d, auto lanes) {
        r.prefetch(d);
        vec<A> m = (lanes.load(mixed + d) - mean) * scale;
        if (weight) m = m * lanes.load(weight + d);
        if (bias) m = m + lanes.load(bias + d);
        if (streams)
          lanes.stream(out + d, m);
        else
          lanes.store(out + d, m);
      });
    }
    finish_streams();
  });
}

// With n the normed row and g = dy * weight: dm = scale * (h - mean(h)), h = g - n * mean(g * n), the first mean for
// "layer" only. It has mean(n), which is 0 but for roundings: without it the dm of a row would not add up to 0, and
// what its differences a - b have in common would multiply that in dmix. Sums over rows go to a slot per task; the
// tasks depend on the shape alone, so any threads give the same bits.
template <class T>
void backward(const BranchMixNormBwdParams& q) {
  using A = acc_t<T>;
  const BranchMixNormParams& p = q.forward;
  const int64_t D = p.dim, rows = p.rows;
  const int64_t per_task = std::max(kBlock, (rows + 31) / 32), tasks = (rows + per_task - 1) / per_task;
  const A* weight = static_cast<const A*>(p.weight);
  const bool by_channel = p.mix_by == MixBy::channel, has_weight = q.dweight, has_bias = q.dbias;
  std::vector<A> sums(tasks * 3 * D);  // per task: dmix, dweight, dbias, each (D,)
  std::vector<double> shares(tasks);   // per task: dmix of a scalar
  p.threads.run(tasks, 1 + 16384 / (per_task * D + 1), [&](int64_t begin, int64_t end) {
    Row<T> r(p);
    for (int64_t task = begin; task < end; ++task) {
      A *dmix = sums.data() + task * 3 * D, *dweight = dmix + D, *dbias = dweight + D;
      for (int64_t row = task * per_task; row < std::min(rows, (task + 1) * per_task); ++row) {
        r.read(row);
        const T* dy = static_cast<const T*>(q.grad_out) + row * D;
        const A* mixed = r.mixed.data();
        const A mean = r.mean, scale = r.scale;
        vec<A> sum_g{}, sum_gn{}, sum_n{};
        for_each_vector<A>(D, [&](int64_t d, auto lanes) {
          const vec<A> grad = lanes.load(dy + d), n = (lanes.load(mixed + d) - mean) * scale;
          if (has_weight) lanes.store(dweight + d, grad * n + lanes.load(dweight + d));
          if (has_bias) lanes.store(dbias + d, grad + lanes.load(dbias + d));
          const vec<A> g = weight ? grad * lanes.load(weight + d) : grad;
          sum_g = sum_g + g;
          sum_gn = g * n + sum_gn;
          sum_n = sum_n + lanes.only(n);
        });
        const A size = static_cast<A>(D);
        const A mean_gn = p.norm == Norm::none ? A(0) : sum<A>(sum_gn) / size;
        const A mean_h = p.norm == Norm::layer ? sum<A>(sum_g - sum_n * mean_gn) / size : A(0);
        T *da = static_cast<T*>(q.da) + row * D, *db = static_cast<T*>(q.db) + row * D;
        const T *a = r.a, *b = r.b;
        const bool on = r.on, normed = p.norm != Norm::none;
        const auto share_of = r.share_of(row);
        vec<A> share{};
        for_each_vector<A>(D, [&](int64_t d, auto lanes) {
          r.prefetch(d);
          const vec<A> grad = lanes.load(dy + d), n = (lanes.load(mixed + d) - mean) * scale;
          const vec<A> g = weight ? grad * lanes.load(weight + d) : grad;
          const vec<A> dm = normed ? (g - n * mean_gn - mean_h) * scale : g;
          if (!on) {
            lanes.store(da + d, dm);
            lanes.store(db + d, vec<A>{});
            return;
          }
          const vec<A> mix = share_of(d, lanes);
          lanes.store(da + d, mix * dm);
          lanes.store(db + d, (1 - mix) * dm);
          const vec<A> difference = lanes.load(a + d) - lanes.load(b + d);  // 0 past the end
          if (by_channel)
            lanes.store(dmix + d, dm * difference + lanes.load(dmix + d));
          else
            share = dm * difference + share;
        });
        if (p.mix_by == MixBy::token) static_cast<A*>(q.dmix)[row] = sum<A>(share);
        if (p.mix_by == MixBy::scalar) shares[task] += sum<A>(share);
      }
    }
  });
  const auto reduce = [&](int which, void* to) {
    for (int64_t d = 0; to && d < D; ++d) {
      A total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += sums[(task * 3 + which) * D + d];
      static_cast<A*>(to)[d] = total;
    }
  };
  if (by_channel) reduce(0, q.dmix);
  reduce(1, q.dweight);
  reduce(2, q.dbias);
  if (p.mix_by == MixBy::scalar) {
    double total = 0;
    for (double s : shares) total += s;
    static_cast<A*>(q.dmix)[0] = static_cast<A>(total);
  }
}

}  // namespace

void branch_mix_norm_fwd_cpu(const BranchMixNormParams& p) {
  dispatch(p.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)>>(p); });
}

void branch_mix_norm_bwd_cpu(const BranchMixNormBwdParams& q) {
  dispatch(q.forward.dtype, [&](auto* t) { backward<std::remove_pointer_t<decltype(t)>>(q); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
