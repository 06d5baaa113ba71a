// Causal convolution and its gradients: memory-bound. A thread has a few channels and walks along a chunk of visits
// with the last inputs in registers, so that every row is read once but for those before a chunk. A restart empties
// them.
//
// Backward, with g the gradient before the activation: dx[v] = sum_j w_j g[v+j] and dw_j = sum_v g[v] x[v-j]. A thread
// walks K-1 visits past its chunk for the g it needs, and sums dw and dbias over the chunk; chunks are added in order.
#include <algorithm>
#include <initializer_list>

#include "../linmu/causal_conv1d.h"
#include "device.cuh"

namespace linmu {
namespace {

constexpr int kThreads = 128, kAhead = 4;  // rows read before the first is used
constexpr int kForwardChunk = 32, kBackwardChunk = 128;

// A row of the batch in visiting order. A position out of range is taken as the nearest one.
struct Line {
  const CausalConv1dParams& p;
  int64_t b;

  __device__ int64_t token(int64_t v) const {
    if (!p.token_order) return v;
    const int64_t at = p.token_order[b * p.length + v];
    return at < 0 ? 0 : at >= p.length ? p.length - 1 : at;
  }
  __device__ int64_t row(int64_t v) const { return (b * p.length + token(v)) * p.dim; }
  // v < 0, in a (B, K-1, D) state.
  __device__ int64_t past(int64_t v) const { return (b * (p.width - 1) + p.width - 1 + v) * p.dim; }
  __device__ bool starts(int64_t v) const {
    if (!p.seq_idx || v <= 0) return false;
    const int32_t* index = p.seq_idx + b * p.length;
    return index[token(v)] != index[token(v - 1)];
  }
};

// K: an upper bound of the width. V channels from d.
template <class T, int K, int V>
struct Filter {
  float taps[K][V];  // tap j reaches back j; 0 from the width on
  float bias[V];
  int width;
  float past[K - 1][V];  // the input j + 1 visits back; 0 where a restart or the start lies between
  int age;               // visits back to the restart or to a start from nothing, K - 1 or more alike

  __device__ Filter(const CausalConv1dParams& p, int64_t d) {
    width = static_cast<int>(p.width);
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
      for (int i = 0; i < V; ++i)
        taps[j][i] = j < width ? static_cast<const float*>(p.weight)[(d + i) * width + width - 1 - j] : 0.f;
#pragma unroll
    for (int i = 0; i < V; ++i) bias[i] = p.bias ? static_cast<const float*>(p.bias)[d + i] : 0.f;
  }

  // The inputs before visit v0.
  __device__ void begin(const Line& line, int64_t v0, int64_t d) {
    const CausalConv1dParams& p = line.p;
    bool cut = false;
    age = K - 1;
#pragma unroll
    for (int j = 0; j < K - 1; ++j) {
      const int64_t v = v0 - 1 - j;
#pragma unroll
      for (int i = 0; i < V; ++i) past[j][i] = 0.f;
      if (j + 1 >= p.width || cut) continue;
      if (v >= 0)
        read_as_float(past[j], static_cast<const T*>(p.x) + line.row(v) + d);
      else if (p.initial_state)
        read_as_float(past[j], static_cast<const T*>(p.initial_state) + line.past(v) + d);
      else
        cut = true, age = j - 1;
      if (line.starts(v)) cut = true, age = j;
    }
  }

  // Before the visit's own input is convolved; what came before a restart is forgotten.
  __device__ void arrive(bool restarts) {
    age = restarts ? 0 : age < K - 1 ? age + 1 : age;
    if (!restarts) return;
#pragma unroll
    for (int j = 0; j < K - 1; ++j)
#pragma unroll
      for (int i = 0; i < V; ++i) past[j][i] = 0.f;
  }

  __device__ void convolve(float (&z)[V], const float (&x)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = bias[i];
#pragma unroll
    for (int j = K - 1; j > 0; --j) {
      if (j >= width) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] += taps[j][i] * past[j - 1][i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] += taps[0][i] * x[i];
  }

  __device__ void leave(const float (&x)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int j = K - 2; j > 0; --j) past[j][i] = past[j - 1][i];
      past[0][i] = x[i];
    }
  }
};

// Of this thread: batch row, chunk, first channel.
struct Place {
  int64_t b, chunk, d;
  template <int V>
  __device__ static Place of(const CausalConv1dParams& p, int64_t chunks) {
    const int64_t tiles = (p.dim + blockDim.x * V - 1) / (blockDim.x * V), tile = blockIdx.x % tiles;
    return {blockIdx.x / tiles / chunks, blockIdx.x / tiles % chunks, (tile * blockDim.x + threadIdx.x) * V};
  }
};

template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads, 1)
    conv_kernel(const __grid_constant__ CausalConv1dParams p, int64_t chunks) {
  const Place at = Place::of<V>(p, chunks);
  if (at.d >= p.dim) return;
  const Line line{p, at.b};
  const int64_t v0 = at.chunk * kForwardChunk, v1 = v0 + kForwardChunk < p.length ? v0 + kForwardChunk : p.length;
  Filter<T, K, V> filter(p, at.d);
  filter.begin(line, v0, at.d);
  for (int64_t v = v0; v < v1; v += kAhead) {
    float x[kAhead][V];
    int64_t rows[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      if (v + r >= v1) break;
      rows[r] = line.row(v + r) + at.d;
      read_as_float(x[r], static_cast<const T*>(p.x) + rows[r]);
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      if (v + r >= v1) break;
      float z[V];
      filter.arrive(line.starts(v + r));
      filter.convolve(z, x[r]);
#pragma unroll
      for (int i = 0; i < V; ++i) z[i] = p.silu ? z[i] / (1.f + expf(-z[i])) : z[i];
      write_rounded(static_cast<T*>(p.y) + rows[r], z);
      filter.leave(x[r]);
    }
  }
  if (!p.final_state || v1 < p.length) return;
#pragma unroll
  for (int j = 1; j < K; ++j)
    if (j < p.width) write_rounded(static_cast<T*>(p.final_state) + line.past(-j) + at.d, filter.past[j - 1]);
}

template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads)
    conv_bwd_kernel(const __grid_constant__ CausalConv1dBwdParams q, int64_t chunks, float* sums) {
  const CausalConv1dParams& p = q.forward;
  const Place at = Place::of<V>(p, chunks);
  if (at.d >= p.dim) return;
  const Line line{p, at.b};
  const int before = static_cast<int>(p.width) - 1;
  const int64_t L = p.length, v0 = at.chunk * kBackwardChunk, v1 = v0 + kBackwardChunk < L ? v0 + kBackwardChunk : L;
  const int64_t end = v1 + before < L ? v1 + before : L;  // of the visits walked through
  const int64_t first = v0 > 0 ? v0 : -before;            // of the gradients that are this thread's
  Filter<T, K, V> filter(p, at.d);
  filter.begin(line, v0, at.d);
  float pending[K][V] = {}, dtaps[K][V] = {}, dbias[V] = {};  // pending[j]: dx of j visits back, so far

  const auto emit = [&](int64_t v, const float (&dx)[V]) {
    if (v < first || v >= v1) return;
    if (v >= 0)
      write_rounded(static_cast<T*>(q.dx) + line.row(v) + at.d, dx);
    else if (q.dinitial_state)
      write_rounded(static_cast<T*>(q.dinitial_state) + line.past(v) + at.d, dx);
  };

  for (int64_t v = v0; v < end; ++v) {
    const int64_t row = line.row(v) + at.d;
    float x[V], g[V];
    read_as_float(x, static_cast<const T*>(p.x) + row);
    read_as_float(g, static_cast<const T*>(q.grad_y) + row);
    filter.arrive(line.starts(v));
    if (p.silu) {
      float z[V];
      filter.convolve(z, x);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float s = 1.f / (1.f + expf(-z[i]));
        g[i] *= s * (1.f + z[i] * (1.f - s));
      }
    }
#pragma unroll
    for (int j = K - 1; j >= 0; --j)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float so_far = j > 0 ? pending[j - 1][i] : 0.f;
        pending[j][i] = j <= filter.age ? so_far + filter.taps[j][i] * g[i] : so_far;
        // A tap that is cut gets no gradient, even of a NaN.
        if (v < v1 && j <= filter.age) dtaps[j][i] += g[i] * (j > 0 ? filter.past[j > 0 ? j - 1 : 0][i] : x[i]);
      }
#pragma unroll
    for (int i = 0; i < V; ++i) dbias[i] += v < v1 ? g[i] : 0.f;
    filter.leave(x);
#pragma unroll
    for (int j = 0; j < K; ++j)
      if (j == before) emit(v - j, pending[j]);
  }

  // Nothing comes after the last visit but the state that it leaves.
  if (end == L)
#pragma unroll
    for (int j = 1; j < K; ++j) {
      if (j > before) break;
      if (q.grad_final_state && j - 1 <= filter.age) {
        float last[V];
        read_as_float(last, static_cast<const T*>(q.grad_final_state) + line.past(-j) + at.d);
#pragma unroll
        for (int i = 0; i < V; ++i) pending[j - 1][i] += last[i];
      }
      emit(L - j, pending[j - 1]);
    }

  float* own = sums + (at.b * chunks + at.chunk) * (p.width + 1) * p.dim + at.d;
#pragma unroll
  for (int j = 0; j < K; ++j)
    if (j < p.width) write_rounded(own + j * p.dim, dtaps[j]);
  write_rounded(own + p.width * p.dim, dbias);
}

__global__ void conv_sums_kernel(const __grid_constant__ CausalConv1dBwdParams q, int64_t parts, const float* sums) {
  const int64_t D = q.forward.dim, K = q.forward.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, j = i / D, d = i % D;
  if (j > K) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[part * (K + 1) * D + i];
  if (j < K)
    static_cast<float*>(q.dweight)[d * K + K - 1 - j] = static_cast<float>(sum);
  else if (q.dbias)
    static_cast<float*>(q.dbias)[d] = static_cast<float>(sum);
}

// Calls f(T, K, V) as a null pointer and integral constants; V = kWide where every row is so aligned, else 1.
template <int kWide, class F>
void with_shape(const CausalConv1dParams& p, std::initializer_list<const void*> rows, F&& f) {
  bool wide = p.dim % kWide == 0;
  for (const void* row : rows) wide = wide && aligned(row, kWide * element_size(p.dtype));
  using std::integral_constant;
  dispatch_cuda("causal_conv1d", p.dtype, [&](auto* t) {
    const auto by_width = [&](auto k) {
      if (wide) return f(t, k, integral_constant<int, kWide>{});
      f(t, k, integral_constant<int, 1>{});
    };
    if (p.width <= 4) return by_width(integral_constant<int, 4>{});
    by_width(integral_constant<int, 8>{});
  });
}

int threads_for(int64_t dim, int channels) {
  return static_cast<int>(std::min<int64_t>(kThreads, ceil_div(ceil_div(dim, channels), kWarp) * kWarp));
}

}  // namespace

void causal_conv1d_fwd_cuda(const CausalConv1dParams& p, const CudaContext& context) {
  if (p.dim == 0) return;
  with_shape<4>(p, {p.x, p.y, p.initial_state, p.final_state}, [&](auto* t, auto k, auto v) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t chunks = std::max<int64_t>(1, ceil_div(p.length, kForwardChunk));
    const int threads = threads_for(p.dim, v());
    const int64_t blocks = p.batch * chunks * ceil_div(p.dim, threads * v());
    launch("causal_conv1d", conv_kernel<T, k(), v()>, blocks_of(blocks), threads, 0, context, p, chunks);
  });
}

void causal_conv1d_bwd_cuda(const CausalConv1dBwdParams& q, const CudaContext& context) {
  const CausalConv1dParams& p = q.forward;
  if (p.dim == 0) return;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(p.length, kBackwardChunk));
  const int64_t sums_count = (p.width + 1) * p.dim;
  auto* sums = static_cast<float*>(
      context.allocate(std::max<int64_t>(1, p.batch * chunks * sums_count) * static_cast<int64_t>(sizeof(float))));
  const auto rows = {p.x,
                     p.initial_state,
                     q.grad_y,
                     q.grad_final_state,
                     static_cast<const void*>(q.dx),
                     static_cast<const void*>(q.dinitial_state)};
  with_shape<2>(p, rows, [&](auto* t, auto k, auto v) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int threads = threads_for(p.dim, v());
    const int64_t blocks = p.batch * chunks * ceil_div(p.dim, threads * v());
    launch("causal_conv1d_bwd", conv_bwd_kernel<T, k(), v()>, blocks_of(blocks), threads, 0, context, q, chunks, sums);
  });
  launch("causal_conv1d_bwd", conv_sums_kernel, blocks_of(ceil_div(sums_count, kThreads)), kThreads, 0, context, q,
         p.batch * chunks, sums);
}

}  // namespace linmu
