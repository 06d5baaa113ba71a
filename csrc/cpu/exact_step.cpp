// One token of text of ExactMMATE. Keys, values and step sizes are written first, row by row. Then one task per (batch,
// key/value head, up to four of its query heads): each key and value is read once for these, and each head's state and
// map once. What is far is read only where there is something far.
#include "../linmu/exact_step.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../linmu/ssd_scan.h"
#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int kHeads = 4;  // that read the same keys together

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }  // to whole vectors of any width

// The first R of P channels turned, the others as they are.
template <class T, class A = acc_t<T>>
inline void rotate(const T* x, const A* cos, const A* sin, int64_t R, int64_t P, bool interleaved, A* out) {
  const int64_t half = R / 2;
  if (interleaved) {
    for (int64_t i = 0; i < R; i += 2) {
      const A a = widen(x[i]), b = widen(x[i + 1]);
      out[i] = a * cos[i] - b * sin[i], out[i + 1] = b * cos[i + 1] + a * sin[i + 1];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const A a = widen(x[i]), b = widen(x[i + half]);
      out[i] = a * cos[i] - b * sin[i], out[i + half] = b * cos[i + half] + a * sin[i + half];
    }
  }
  for (int64_t i = R; i < P; ++i) out[i] = widen(x[i]);
}

template <class A>
inline A largest(const A* x, int64_t n) {
  A top = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// x becomes exp(x - top), n of them and zeros up to a whole vector; returns their sum.
template <class A>
inline A exponentials(A* x, int64_t n, A top) {
  constexpr int W = Simd<A>::width;
  vec<A> total{};
  for (int64_t i = 0; i < n; i += W) {
    vec<A> e = exp(load(x + i) - top);
    if (i + W > n) e = SomeLanes{static_cast<int>(n - i)}.only(e);
    store(x + i, e);
    total = total + e;
  }
  return sum<A>(total);
}

// A row's part in the call.
struct Row {
  int64_t count = 0;  // places that it sees
  int64_t far = 0;    // tokens that are far from it
};

// Which places of the state a row's token sees, after it was written.
Row look(const ExactStepParams& p, int64_t b, int64_t* places) {
  const int64_t seen = p.seen[b], ring = p.ring(), gone = p.over(seen) * p.leave();
  Row row;
  int64_t before = 0;
  for (int64_t i = 0; i < std::min(p.sinks, gone); ++i)
    if (p.there[b * p.sinks + i]) ++before, places[row.count] = i, row.count += !p.nothing_beyond;
  const int64_t first = p.nothing_beyond ? std::max(gone, seen + 1 - p.window) : gone;
  for (int64_t i = first; i <= seen; ++i) places[row.count++] = p.sinks + i % ring;
  const int64_t left = gone - before;
  if (p.nothing_beyond) return row;
  for (int64_t i = std::max<int64_t>(p.kept - left, 0); i < p.kept; ++i) places[row.count++] = p.sinks + ring + i;
  row.far = std::max<int64_t>(left - p.kept, 0);
  return row;
}

// What a task computes in.
template <class A>
struct Scratch {
  int64_t dim, state, scores;  // padded P, N and n
  std::vector<int64_t> places;
  std::vector<A> memory;
  A *q, *weights, *features, *y;

  explicit Scratch(const ExactStepParams& p)
      : dim(padded(p.head_dim)),
        state(padded(p.state_dim)),
        scores(padded(p.places())),
        places(p.places()),
        memory(kHeads * (2 * dim + scores) + state),
        q(memory.data()),
        weights(q + kHeads * dim),
        features(weights + kHeads * scores),
        y(features + state) {}
};

// Softmax attention of R heads to the same places: y, and the log-sum-exp of each.
template <int R, class T, class A = acc_t<T>>
inline void near(const ExactStepParams& p, Scratch<A>& s, int64_t count, const T* keys, const T* values, A* lse) {
  constexpr int W = Simd<A>::width;
  const int64_t P = p.head_dim;
  const int64_t* places = s.places.data();
  const A factor = static_cast<A>(p.softmax_scale);
  for (int64_t j = 0; j < count; ++j) {
    const T* key = keys + places[j] * P;
    vec<A> dot[R] = {};
    for_each_vector<A>(P, [&](int64_t i, auto lanes) {
      const vec<A> k = lanes.load(key + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dot[r] = load(s.q + r * s.dim + i) * k + dot[r];
    });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) s.weights[r * s.scores + j] = sum<A>(dot[r]) * factor;
  }
  A share[R];
  for (int r = 0; r < R; ++r) {
    A* w = s.weights + r * s.scores;
    const A top = largest(w, count), total = exponentials(w, count, top);
    lse[r] = top + std::log(total), share[r] = 1 / total;
  }
  const auto columns = [&](int64_t i, auto vectors, auto lanes) {
    constexpr int V = vectors;
    vec<A> out[R][V] = {};
    for (int64_t j = 0; j < count; ++j) {
      const T* value = values + places[j] * P + i;
      vec<A> v[V];
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) v[c] = lanes.load(value + c * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c) out[r][c] = v[c] * s.weights[r * s.scores + j] + out[r][c];
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < V; ++c) store(s.y + r * s.dim + i + c * W, out[r][c] * share[r]);
  };
  int64_t i = 0;
  for (; i + 2 * W <= P; i += 2 * W) columns(i, std::integral_constant<int, 2>{}, AllLanes{});
  for (; i + W <= P; i += W) columns(i, std::integral_constant<int, 1>{}, AllLanes{});
  if (i < P) columns(i, std::integral_constant<int, 1>{}, SomeLanes{static_cast<int>(P - i)});
}

// softmax(scale q map): the features that a head reads the state with.
template <class M, class A = acc_t<M>>
inline void features(const A* q, const M* map, A scale, int64_t P, int64_t N, A* out) {
  constexpr int W = Simd<A>::width;
  const auto columns = [&](int64_t n, auto vectors, auto lanes) {
    constexpr int V = vectors;
    vec<A> sums[V] = {};
    for (int64_t i = 0; i < P; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < V; ++c) sums[c] = lanes.load(map + i * N + n + c * W) * q[i] + sums[c];
    for (int c = 0; c < V; ++c) store(out + n + c * W, sums[c] * scale);
  };
  int64_t n = 0;
  for (; n + 4 * W <= N; n += 4 * W) columns(n, std::integral_constant<int, 4>{}, AllLanes{});
  for (; n + W <= N; n += W) columns(n, std::integral_constant<int, 1>{}, AllLanes{});
  if (n < N) columns(n, std::integral_constant<int, 1>{}, SomeLanes{static_cast<int>(N - n)});
  const A share = 1 / exponentials(out, N, largest(out, N));
  for (n = 0; n < N; n += W) store(out + n, load(out + n) * share);
}

// Adds to y, what a head has from near, its share of what is far.
template <class T, class A = acc_t<T>>
inline void mix(const ExactStepParams& p, const A* ssm, const A* C, const T* z, A rest, A lse, A* y) {
  const int64_t P = p.head_dim, N = p.state_dim;
  const auto dot = [&](const A* row) {
    vec<A> sums{};
    for_each_vector<A>(N, [&](int64_t n, auto lanes) { sums = lanes.load(row + n) * lanes.load(C + n) + sums; });
    return sum<A>(sums);
  };
  const A total = dot(ssm + P * N);
  const bool empty = total < A(kLeastMass);
  const A log_total = empty ? A(kLeastLogTotal) : std::max(std::log(total), A(kLeastLogTotal));
  const A share = 1 / (1 + std::exp(-(rest + log_total - lse))), factor = empty ? A(0) : 1 / total;
  for (int64_t i = 0; i < P; ++i) {
    A far = dot(ssm + i * N) * factor;
    if (z) {
      const A gate = widen(z[i]);
      far *= gate / (1 + std::exp(-gate));
    }
    // As torch.lerp does, which is exact at both ends.
    y[i] = share < A(0.5) ? y[i] + share * (far - y[i]) : far - (far - y[i]) * (1 - share);
  }
}

template <class T, class M>
void step(const ExactStepParams& p) {
  using A = acc_t<T>;
  const int64_t B = p.batch, H = p.heads, G = p.groups, P = p.head_dim, N = p.state_dim, R = p.rotary;
  const int64_t heads = H / G, places = p.places(), ring = p.ring(), first = p.sinks;
  const auto table = [&](const void* t, int64_t b) {
    return static_cast<const A*>(t) + (p.rotary_rows == 1 ? 0 : b) * R;
  };
  const auto real = [&](int64_t b) { return !p.real || p.real[b]; };
  const A *dt = static_cast<const A*>(p.dt), *bias = static_cast<const A*>(p.dt_bias);

  p.threads.run(B, 16, [&](int64_t begin, int64_t end) {
    std::vector<A> turned(P);
    for (int64_t b = begin; b < end; ++b) {
      if (!real(b)) continue;
      const int64_t seen = p.seen[b], newest = seen % ring;
      for (int64_t g = 0; g < G; ++g) {
        const int64_t row = (b * G + g) * places;
        const T* v = static_cast<const T*>(p.v) + (b * G + g) * P;
        rotate(static_cast<const T*>(p.k) + (b * G + g) * P, table(p.cos, b), table(p.sin, b), R, P, p.interleaved,
               turned.data());
        const auto write = [&](int64_t place) {
          T* key = static_cast<T*>(p.keys) + (row + place) * P;
          for (int64_t i = 0; i < P; ++i) key[i] = narrow<T>(turned[i]);
          std::copy(v, v + P, static_cast<T*>(p.values) + (row + place) * P);
        };
        write(first + newest);
        if (seen < first) write(seen);
        A* sizes = static_cast<A*>(p.steps) + ((b * G + g) * (places - first) + newest) * heads;
        for (int64_t h = g * heads; h < (g + 1) * heads; ++h) *sizes++ = softplus(dt[b * H + h] + bias[h]);
      }
    }
  });

  const int64_t blocks = (heads + kHeads - 1) / kHeads;
  const int64_t work = kHeads * P * (2 * places + 2 * N);
  p.threads.run(B * G * blocks, 1 + 65536 / (work + 1), [&](int64_t begin, int64_t end) {
    Scratch<A> s(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bg = task / blocks, b = bg / G, h0 = bg % G * heads + task % blocks * kHeads;
      const int count = static_cast<int>(std::min<int64_t>(kHeads, (bg % G + 1) * heads - h0));
      T* y = static_cast<T*>(p.y) + (b * H + h0) * P;
      if (!real(b)) {
        std::fill(y, y + count * P, narrow<T>(A(0)));
        continue;
      }
      for (int r = 0; r < count; ++r)
        rotate(static_cast<const T*>(p.q) + (b * H + h0 + r) * P, table(p.cos, b), table(p.sin, b), R, P, p.interleaved,
               s.q + r * s.dim);
      const Row row = look(p, b, s.places.data());
      const A excess = row.far > p.far_limit ? std::log(static_cast<A>(row.far) / static_cast<A>(p.far_limit)) : A(0);
      A lse[kHeads];
      const auto attend = [&](auto heads_) {
        near<heads_, T>(p, s, row.count, static_cast<const T*>(p.keys) + bg * places * P,
                        static_cast<const T*>(p.values) + bg * places * P, lse);
      };
      switch (count) {
        case 1: attend(std::integral_constant<int, 1>{}); break;
        case 2: attend(std::integral_constant<int, 2>{}); break;
        case 3: attend(std::integral_constant<int, 3>{}); break;
        default: attend(std::integral_constant<int, 4>{});
      }
      for (int r = 0; r < count; ++r) {
        const int64_t h = h0 + r;
        A* out = s.y + r * s.dim;
        if (row.far) {
          const A scale = static_cast<const A*>(p.scale)[h] * static_cast<A>(p.softmax_scale);
          features(s.q + r * s.dim, static_cast<const M*>(p.c_map) + h * P * N, scale, P, N, s.features);
          const T* z = p.z_gate ? static_cast<const T*>(p.z_gate) + (b * H + h) * P : nullptr;
          mix(p, static_cast<const A*>(p.ssm) + (b * H + h) * (P + 1) * N, s.features, z,
              static_cast<const A*>(p.rest)[b * H + h] - excess, lse[r], out);
        }
        for_each_vector<A>(P, [&](int64_t i, auto lanes) { lanes.store(y + r * P + i, load(out + i)); });
      }
    }
  });

  for (int64_t b = 0; b < B; ++b) {
    const int64_t seen = p.seen[b];
    p.due[b] = real(b) && p.over(seen + 1) > p.over(seen);
    if (!real(b)) continue;
    if (seen < first) p.there[b * first + seen] = 1;
    p.seen[b] = seen + 1;
  }
}

}  // namespace

void exact_step_cpu(const ExactStepParams& p) {
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    p.wide_map ? step<T, acc_t<T>>(p) : step<T, T>(p);
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
