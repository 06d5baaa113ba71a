// Causal convolution: memory-bound, so tokens are taken four at a time (each row is read once and serves four outputs
// from registers) with the vectors along D. Rows are reached through pointers in visiting order, so a token order
// moves nothing; a tap that is cut off (another segment, before the start) points at a row of zeros.
#include "../linmu/causal_conv1d.h"

#include <algorithm>
#include <vector>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int kTile = 4, kMaxWidth = 8;
constexpr int64_t kBlock = 64;  // visits per task

// One batch row in visiting order.
template <class T>
struct Line {
  const CausalConv1dParams& p;
  int64_t b;
  const T* zeros;

  int64_t offset(int64_t v) const {
    const int64_t row = b * p.length;
    return (row + (p.token_order ? p.token_order[row + v] : v)) * p.dim;
  }
  int64_t past(int64_t v) const {  // v < 0, in a (B, K-1, D) state
    return (b * (p.width - 1) + p.width - 1 + v) * p.dim;
  }
  const T* x(int64_t v) const {
    if (v >= 0) return static_cast<const T*>(p.x) + offset(v);
    return p.initial_state ? static_cast<const T*>(p.initial_state) + past(v) : zeros;
  }
  bool starts(int64_t v) const {
    const int32_t* index = p.seq_idx;
    return index && v > 0 && v < p.length && index[offset(v) / p.dim] != index[offset(v - 1) / p.dim];
  }
  bool same_segment(int64_t first, int64_t last) const {  // visits first..last
    if (p.seq_idx)
      for (int64_t v = first + 1; v <= last; ++v)
        if (starts(v)) return false;
    return true;
  }
};

// weight as K rows of D, row j for the tap that reaches back j.
template <class A>
std::vector<A> taps_of(const CausalConv1dParams& p) {
  std::vector<A> taps(p.width * p.dim);
  const A* weight = static_cast<const A*>(p.weight);
  for (int64_t d = 0; d < p.dim; ++d)
    for (int64_t k = 0; k < p.width; ++k) taps[(p.width - 1 - k) * p.dim + d] = weight[d * p.width + k];
  return taps;
}

// Calls f(integral constants R, K) with the fast shape for `rows` and `width`, or with R = 1, K = 0 (any width).
template <class F>
void with_shape(bool tile, int64_t width, F&& f) {
  using std::integral_constant;
  if (tile && width == 4) return f(integral_constant<int, kTile>{}, integral_constant<int, 4>{});
  if (tile && width == 3) return f(integral_constant<int, kTile>{}, integral_constant<int, 3>{});
  if (tile && width == 2) return f(integral_constant<int, kTile>{}, integral_constant<int, 2>{});
  f(integral_constant<int, 1>{}, integral_constant<int, 0>{});
}
bool has_tile(int64_t width) { return width >= 2 && width <= 4; }

// Of R rows, what `convolve` needs of one vector: x[width-1+i-j] is what tap j of row i reads.
template <int R, int K, class A, class T, class L>
inline void load_rows(vec<A>* x, const T* const* in, int width, int64_t d, L lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < (K ? K : width) - 1 + R; ++i) x[i] = lanes.load(in[i] + d);
}
template <int R, int K, class A, class L>
inline void convolve(vec<A> (&y)[R], const vec<A>* x, const A* taps, const A* bias, int width, int64_t D, int64_t d,
                     L lanes) {
  const int before = (K ? K : width) - 1;
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) y[i] = bias ? lanes.load(bias + d) : vec<A>{};
#pragma GCC unroll 8
  for (int j = before; j >= 0; --j) {
    const vec<A> w = lanes.load(taps + j * D + d);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) y[i] = w * x[before + i - j] + y[i];
  }
}

// The pointers that `convolve` takes, for rows visited at v .. v+rows-1 (one row where a tap is cut).
template <class T>
void inputs_of(const Line<T>& line, int64_t v, int rows, const T** in) {
  const int64_t before = line.p.width - 1;
  for (int64_t i = 0; i < before + rows; ++i) in[i] = line.x(v - before + i);
  if (rows > 1) return;
  for (int64_t j = 0; j < before; ++j)
    if (line.starts(v - j)) {
      std::fill(in, in + before - j, line.zeros);
      break;
    }
}

template <class T>
void forward(const CausalConv1dParams& p) {
  using A = acc_t<T>;
  const int64_t D = p.dim, L = p.length, before = p.width - 1, blocks = (L + kBlock - 1) / kBlock;
  const std::vector<A> taps = taps_of<A>(p);
  const std::vector<T> zeros(D);
  const A *bias = static_cast<const A*>(p.bias), *taps_data = taps.data();
  const bool silu = p.silu, streams = worth_streaming(static_cast<const T*>(p.y), p.batch * L, D);
  const int width = static_cast<int>(p.width);
  p.threads.run(p.batch * blocks, 1 + 32768 / (kBlock * D + 1), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const Line<T> line{p, block / blocks, zeros.data()};
      const int64_t stop = std::min(L, (block % blocks + 1) * kBlock);
      for (int64_t v = block % blocks * kBlock; v < stop;) {
        const bool tile = has_tile(p.width) && v + kTile <= stop && line.same_segment(v - before, v + kTile - 1);
        with_shape(tile, p.width, [&](auto r, auto k) {
          constexpr int R = r, K = k;
          const T* in[kMaxWidth - 1 + R];
          inputs_of(line, v, R, in);
          T* out[R];
          for (int i = 0; i < R; ++i) out[i] = static_cast<T*>(p.y) + line.offset(v + i);
          // Copies, because a store could change what is behind a reference, as far as the compiler knows.
          const A *w = taps_data, *shift = bias;
          const bool activate = silu, past_caches = streams;
          const int64_t stride = D;
          for_each_vector<A>(D, [&](int64_t d, auto lanes) {
            vec<A> x[kMaxWidth - 1 + R], y[R];
            load_rows<R, K, A>(x, in, width, d, lanes);
            convolve<R, K, A>(y, x, w, shift, width, stride, d, lanes);
            if (activate) {
#pragma GCC unroll 8
              for (int i = 0; i < R; ++i) y[i] = y[i] * sigmoid(y[i]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) past_caches ? lanes.stream(out[i] + d, y[i]) : lanes.store(out[i] + d, y[i]);
          });
          v += R;
        });
      }
    }
    finish_streams();
  });
  if (!p.final_state) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Line<T> line{p, b, zeros.data()};
    for (int64_t i = 0; i < before; ++i) {
      const int64_t v = L - before + i;
      const T* from = line.same_segment(v, L - 1) ? line.x(v) : zeros.data();
      std::copy(from, from + D, static_cast<T*>(p.final_state) + (b * before + i) * D);
    }
  }
}

// Gradients. With g the gradient before the activation, dx[v] = sum_j w_j g[v+j] and dw_j = sum_v g[v] x[v-j]. A task
// walks through its rows with the last few g in a ring (g of the K-1 rows after it is computed twice), and sums dw and
// dbias into a slot of its own; the tasks depend on the shape alone, so the sums come out the same for any threads.
template <class T>
struct Backward {
  using A = acc_t<T>;
  static constexpr int64_t kRing = 16;

  const CausalConv1dBwdParams& q;
  const CausalConv1dParams& p;
  const A* taps;
  const T* zeros;
  const A* no_grad;     // D zeros
  A* sums;              // (K+1, D): dw by tap, then dbias
  std::vector<A> ring;  // (kRing, D)

  A* g(int64_t v) { return ring.data() + (v & (kRing - 1)) * p.dim; }

  void gradient_rows(const Line<T>& line, int64_t v, bool tile, bool count) {
    const int64_t D = p.dim;
    const int width = static_cast<int>(p.width);
    const bool silu = p.silu;
    const A *bias = static_cast<const A*>(p.bias), *w = taps;
    A* total = count ? sums : nullptr;
    with_shape(tile, width, [&](auto r, auto k) {
      constexpr int R = r, K = k;
      const T* in[kMaxWidth - 1 + R];
      inputs_of(line, v, R, in);
      const T* dy[R];
      A* out[R];
      for (int i = 0; i < R; ++i) {
        dy[i] = static_cast<const T*>(q.grad_y) + line.offset(v + i);
        out[i] = g(v + i);
      }
      for_each_vector<A>(D, [&](int64_t d, auto lanes) {
        vec<A> x[kMaxWidth - 1 + R], y[R], dbias{};
        load_rows<R, K, A>(x, in, width, d, lanes);
        if (silu) convolve<R, K, A>(y, x, w, bias, width, D, d, lanes);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          vec<A> grad = lanes.load(dy[i] + d);
          if (silu) {
            const vec<A> s = sigmoid(y[i]);
            grad = grad * (s * (1 + y[i] * (1 - s)));
          }
          y[i] = grad;
          dbias = dbias + grad;
          lanes.store(out[i] + d, grad);
        }
        if (!total) return;
        A* sum = total + width * D + d;
        lanes.store(sum, lanes.load(sum) + dbias);
        const int before = (K ? K : width) - 1;
#pragma GCC unroll 8
        for (int j = 0; j <= before; ++j) {
          if (R == 1 && in[before - j] == line.zeros) break;  // cut: no gradient, even of a NaN
          vec<A> dw{};
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) dw = y[i] * x[before + i - j] + dw;
          sum = total + j * D + d;
          lanes.store(sum, lanes.load(sum) + dw);
        }
      });
    });
  }

  // dx of R rows from v (v < 0: rows of the initial state); `last` is the row's share in the final state, or null.
  void input_rows(const Line<T>& line, int64_t v, bool tile, const T* last) {
    const int64_t D = p.dim;
    const int width = static_cast<int>(p.width);
    const A* w = taps;
    with_shape(tile, width, [&](auto r, auto k) {
      constexpr int R = r, K = k;
      const A* in[kMaxWidth - 1 + R];
      for (int64_t i = 0; i < width - 1 + R; ++i) in[i] = v + i >= 0 && v + i < p.length ? g(v + i) : no_grad;
      if (R == 1)
        for (int64_t j = 1; j < width; ++j)
          if (line.starts(v + j)) {
            std::fill(in + j, in + width, no_grad);
            break;
          }
      T* out[R];
      for (int i = 0; i < R; ++i)
        out[i] = v < 0 ? static_cast<T*>(q.dinitial_state) + line.past(v) : static_cast<T*>(q.dx) + line.offset(v + i);
      for_each_vector<A>(D, [&](int64_t d, auto lanes) {
        vec<A> dx[R] = {};
        if constexpr (K == 0) {
          if (last) dx[0] = lanes.load(last + d);
          for (int j = 0; j < width; ++j) dx[0] = lanes.load(w + j * D + d) * lanes.load(in[j] + d) + dx[0];
        } else {
          vec<A> x[K - 1 + R];
#pragma GCC unroll 8
          for (int i = 0; i < K - 1 + R; ++i) x[i] = lanes.load(in[i] + d);
#pragma GCC unroll 8
          for (int j = 0; j < K; ++j) {
            const vec<A> tap = lanes.load(w + j * D + d);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) dx[i] = tap * x[i + j] + dx[i];
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) lanes.store(out[i] + d, dx[i]);
      });
    });
  }

  void piece(int64_t b, int64_t begin, int64_t end) {  // visits begin..end-1 of one batch row
    const Line<T> line{p, b, zeros};
    const int64_t L = p.length, before = p.width - 1;
    const bool tiles = has_tile(p.width);
    int64_t have = begin;  // g is known up to here
    for (int64_t v = begin == 0 && q.dinitial_state ? -before : begin; v < end;) {
      const int64_t last_rows = q.grad_final_state ? L - before : L;
      const bool tile = tiles && v >= 0 && v + kTile <= std::min(end, last_rows) &&
                        line.same_segment(v, std::min(L - 1, v + kTile - 1 + before));
      const int64_t rows = tile ? kTile : 1;
      while (have < std::min(L, v + rows + before)) {
        const bool count = have < end;
        const bool whole = tiles && (have >= before || p.initial_state) &&
                           have + kTile <= std::min(count ? end : L, v + rows + before) &&
                           line.same_segment(have - before, have + kTile - 1);
        gradient_rows(line, have, whole, count);
        have += whole ? kTile : 1;
      }
      const bool carried = v >= last_rows && line.same_segment(v, L - 1);
      input_rows(line, v, tile, carried ? static_cast<const T*>(q.grad_final_state) + line.past(v - L) : nullptr);
      v += rows;
    }
  }
};

template <class T>
void backward(const CausalConv1dBwdParams& q) {
  using A = acc_t<T>;
  const CausalConv1dParams& p = q.forward;
  const int64_t D = p.dim, L = p.length, K = p.width, rows = p.batch * L;
  const int64_t per_task = std::max(kBlock, (rows + 31) / 32), tasks = (rows + per_task - 1) / per_task;
  const std::vector<A> taps = taps_of<A>(p), no_grad(D);
  const std::vector<T> zeros(D);
  std::vector<A> sums(tasks * (K + 1) * D);
  p.threads.run(tasks, 1 + 16384 / (per_task * D + 1), [&](int64_t begin, int64_t end) {
    Backward<T> work{q, p, taps.data(), zeros.data(), no_grad.data(), nullptr, {}};
    work.ring.resize(Backward<T>::kRing * D);
    for (int64_t task = begin; task < end; ++task) {
      work.sums = sums.data() + task * (K + 1) * D;
      const int64_t stop = std::min(rows, (task + 1) * per_task);
      for (int64_t row = task * per_task; row < stop;) {
        const int64_t b = row / L, next = std::min(stop, (b + 1) * L);
        work.piece(b, row - b * L, next - b * L);
        row = next;
      }
    }
  });
  if (L == 0 && q.dinitial_state) {
    const T* from = static_cast<const T*>(q.grad_final_state);
    T* to = static_cast<T*>(q.dinitial_state);
    for (int64_t i = 0; i < p.batch * (K - 1) * D; ++i) to[i] = from ? from[i] : T{};
  }
  for (int64_t j = 0; j <= K; ++j)
    for (int64_t d = 0; d < D; ++d) {
      A total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += sums[(task * (K + 1) + j) * D + d];
      if (j < K)
        static_cast<A*>(q.dweight)[d * K + K - 1 - j] = total;
      else if (q.dbias)
        static_cast<A*>(q.dbias)[d] = total;
    }
}

}  // namespace

void causal_conv1d_fwd_cpu(const CausalConv1dParams& p) {
  dispatch(p.dtype, [&](auto* t) { forward<std::remove_pointer_t<decltype(t)>>(p); });
}

void causal_conv1d_bwd_cpu(const CausalConv1dBwdParams& q) {
  dispatch(q.forward.dtype, [&](auto* t) { backward<std::remove_pointer_t<decltype(t)>>(q); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
