// Gradients that are sums over heads or tokens: where the tasks of the scan's gradient put theirs, and who adds them
// up.
#pragma once
#include "ssd_scan.h"

namespace linmu {
namespace LINMU_ISA {

// to[w] += sign * v[w].
inline void add_wide(long double* to, vd v, int sign) {
  for (int w = 0; w < Simd<double>::width; ++w) to[w] += sign * static_cast<long double>(v[w]);
}
inline void add_wide(double* to, vf v, int sign) {
  typedef float half __attribute__((vector_size(LINMU_VECTOR_BYTES / 2)));
  half part[2];
  std::memcpy(part, &v, sizeof(v));
  for (int i = 0; i < 2; ++i, to += Simd<double>::width)
    store(to, load(to) + __builtin_convertvector(part[i], vd) * static_cast<double>(sign));
}

// Heads [first, last) of one task, and where each adds the gradients of what it shares with heads of other tasks:
// slots of group_heads heads, summed in order when all tasks are done.
template <class A>
struct Shared {
  A* data = nullptr;  // (B, L, slots, dim)
  Buffer<A> own;      // data, unless that is the gradient itself
  int64_t group_heads = 1, slots = 0, dim = 0;

  int64_t slot(int64_t head) const { return head / group_heads; }
  bool starts(int64_t head) const { return head % group_heads == 0; }

  // Adds the chunk's tile, in rows of ld, to the slot, or stores it there when nothing has been.
  void add(const Chunk& c, int64_t length, int64_t slot, bool first, const A* tile, int64_t ld) const {
    constexpr int64_t W = Simd<A>::width;
    for (int64_t i = 0; i < c.visits; ++i, tile += ld) {
      A* out = data + ((c.batch * length + c.tokens[i]) * slots + slot) * dim;
      int64_t n = 0;
      for (; n + W <= dim; n += W) store(out + n, first ? load(tile + n) : load(out + n) + load(tile + n));
      for (; n < dim; ++n) out[n] = first ? tile[n] : out[n] + tile[n];
    }
  }
};

// Sums over tokens of one batch row and head, by direction.
template <class Wide>
struct Totals {
  Wide A[2] = {}, dt_bias[2] = {}, D = 0, gate = 0;
};

template <class A>
struct Plan {
  ScanSizes sizes;
  int64_t unit;  // heads per task
  Shared<A> x, B[2], C[2];
  std::vector<Totals<wide_t<A>>> totals;  // (B, H)
};

template <class T>
inline void plan_shared(const SsdScanParams& p, int64_t unit, int64_t per, int64_t dim, void* out,
                        Shared<acc_t<T>>& s) {
  using A = acc_t<T>;
  if (!out) return;
  s.group_heads = std::min(unit, per), s.slots = p.heads / s.group_heads, s.dim = dim;
  if (std::is_same_v<T, A> && s.group_heads == per) {
    s.data = static_cast<A*>(out);
  } else {
    s.own = Buffer<A>(p.batch * p.length * s.slots * dim);
    s.data = s.own;
  }
}

// The slots of each group, summed in order.
template <class T>
inline void reduce(const SsdScanParams& p, const Shared<acc_t<T>>& s, int64_t per, void* out) {
  using A = acc_t<T>;
  if (!s.own) return;
  const int64_t parts = per / s.group_heads, groups = s.slots / parts, W = Simd<A>::width;
  p.threads.run(p.batch * p.length, 1 + 16384 / (s.slots * s.dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const A* from = s.data + i * parts * s.dim;
      T* to = static_cast<T*>(out) + i * s.dim;
      for (int64_t n = 0; n < s.dim; n += W) {
        const int rest = static_cast<int>(std::min<int64_t>(W, s.dim - n));
        vec<A> sum{};
        for (int64_t k = 0; k < parts; ++k) {
          const A* at = from + k * s.dim + n;
          sum += rest == W ? load(at) : load_n(at, rest);
        }
        if (rest == W)
          store(to + n, sum);
        else
          store_n(to + n, sum, rest);
      }
    }
  });
}

template <class A>
inline void reduce_totals(const SsdScanBwdParams& g, const std::vector<Totals<wide_t<A>>>& totals) {
  const SsdScanParams& p = g.scan;
  for (int64_t h = 0; h < p.heads; ++h) {
    Totals<wide_t<A>> t;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Totals<wide_t<A>>& one = totals[b * p.heads + h];
      for (int d = 0; d < 2; ++d) t.A[d] += one.A[d], t.dt_bias[d] += one.dt_bias[d];
      t.D += one.D, t.gate += one.gate;
    }
    if (!g.reverse.A) t.A[0] += t.A[1];
    if (!g.reverse.dt_bias) t.dt_bias[0] += t.dt_bias[1];
    const auto put = [&](void* to, wide_t<A> value) {
      if (to) static_cast<A*>(to)[h] = static_cast<A>(value);
    };
    put(g.forward.A, t.A[0]), put(g.reverse.A, t.A[1]);
    put(g.forward.dt_bias, t.dt_bias[0]), put(g.reverse.dt_bias, t.dt_bias[1]);
    put(g.D, t.D);
    if (!p.gate_per_token) put(g.gate, t.gate);
  }
}

}  // namespace LINMU_ISA
}  // namespace linmu
