// Mix and norm, and their gradients: memory-bound. A row of both branches is read once and kept, mixed, in shared
// memory (read again where D is too large for it). A warp has a row, or a whole block where D is large. Backward, sums
// over rows are kept per part of the rows and added in order.
#include <algorithm>
#include <initializer_list>

#include "../linmu/branch_mix_norm.h"
#include "device.cuh"

namespace linmu {
namespace {

constexpr int kMaxThreads = 512, kWarpRow = 1024;  // elements up to which a warp takes a row alone
constexpr int kRowsPerBlock = 4;                   // of warps
constexpr int kParts = 264;                        // that sum over rows, at most
constexpr int64_t kKeep = 96 * 1024;               // bytes of shared memory at most

struct RowPlan {
  int per_row;  // threads
  int rows;     // per block
  bool kept;    // mixed rows, and backward the sums, in shared memory
  int64_t parts;
  float* sums;     // (parts * rows, 3, D): dmix by channel, dweight, dbias
  double* shares;  // (parts * rows,): dmix of a scalar
};

// The threads of one row.
struct Team {
  int lane, size;
  float* scratch;  // one per warp of the block

  __device__ Team(const RowPlan& o, float* partial)
      : lane(threadIdx.x % o.per_row), size(o.per_row), scratch(partial) {}

  __device__ float sum(float x) const {
    x = warp_sum(x);
    if (size == kWarp) return x;
    __syncthreads();
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
    __syncthreads();
    float total = 0.f;
    for (int i = 0; i < size / kWarp; ++i) total += scratch[i];
    return total;
  }
};

// V floats, in pieces of 16 bytes.
template <int V>
__device__ inline void read(float (&x)[V], const float* from) {
  constexpr int W = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    const Vec<float, W> values = *reinterpret_cast<const Vec<float, W>*>(from + i);
#pragma unroll
    for (int j = 0; j < W; ++j) x[i + j] = values.v[j];
  }
}
template <int V>
__device__ inline void write(float* to, const float (&x)[V]) {
  constexpr int W = V < 4 ? V : 4;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    Vec<float, W> values;
#pragma unroll
    for (int j = 0; j < W; ++j) values.v[j] = x[i + j];
    *reinterpret_cast<Vec<float, W>*>(to + i) = values;
  }
}
// to += x.
template <int V>
__device__ inline void add(float* to, const float (&x)[V]) {
  float sum[V];
  read(sum, to);
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] += x[i];
  write(to, sum);
}

// f(d) over a row, in pieces of V.
template <int V, class F>
__device__ inline void over_row(const Team& team, int64_t D, F&& f) {
  for (int64_t d = static_cast<int64_t>(team.lane) * V; d < D; d += static_cast<int64_t>(team.size) * V) f(d);
}

template <class T, int V>
struct Row {
  const BranchMixNormParams& p;
  const Team& team;
  const T *a, *b;
  float* mixed;  // or null: mix again
  bool on;
  float same;  // the weight of a, if not by channel
  float mean = 0.f, scale = 1.f;

  __device__ Row(const BranchMixNormParams& params, const Team& team_, int64_t row, float* keep)
      : p(params),
        team(team_),
        a(static_cast<const T*>(p.a) + row * p.dim),
        b(static_cast<const T*>(p.b) + row * p.dim),
        mixed(keep),
        on(!p.mask || p.mask[row]),
        same(p.mix_by == MixBy::channel ? 0.f : static_cast<const float*>(p.mix)[p.mix_by == MixBy::token ? row : 0]) {}

  __device__ void shares(float (&mix)[V], int64_t d) const {
    if (p.mix_by == MixBy::channel) return linmu::read(mix, static_cast<const float*>(p.mix) + d);
#pragma unroll
    for (int i = 0; i < V; ++i) mix[i] = same;
  }

  __device__ void mix(float (&m)[V], int64_t d) const {
    read_as_float(m, a + d);
    if (!on) return;
    float other[V], share[V];
    read_as_float(other, b + d);
    shares(share, d);
#pragma unroll
    for (int i = 0; i < V; ++i) m[i] = share[i] * m[i] + (1.f - share[i]) * other[i];
  }
  __device__ void get(float (&m)[V], int64_t d) const {
    if (mixed)
      linmu::read(m, mixed + d);
    else
      mix(m, d);
  }

  __device__ void read() {
    float total = 0.f;
    over_row<V>(team, p.dim, [&](int64_t d) {
      float m[V];
      mix(m, d);
      if (mixed) write(mixed + d, m);
#pragma unroll
      for (int i = 0; i < V; ++i) total += p.norm == Norm::layer ? m[i] : m[i] * m[i];
    });
    if (p.norm == Norm::none) return;
    float square = team.sum(total) / static_cast<float>(p.dim);
    if (p.norm == Norm::layer) {
      mean = square;
      total = 0.f;
      over_row<V>(team, p.dim, [&](int64_t d) {
        float m[V];
        get(m, d);
#pragma unroll
        for (int i = 0; i < V; ++i) total += (m[i] - mean) * (m[i] - mean);
      });
      square = team.sum(total) / static_cast<float>(p.dim);
    }
    scale = 1.f / sqrtf(square + static_cast<float>(p.eps));
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    mix_norm_kernel(const __grid_constant__ BranchMixNormParams p, const __grid_constant__ RowPlan o) {
  LINMU_SHARED(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const Team team(o, scratch);
  const int own = threadIdx.x / o.per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * o.rows + own;
  if (row >= p.rows) return;  // a whole warp, or nobody
  Row<T, V> r(p, team, row, o.kept ? scratch + kWarp + own * p.dim : nullptr);
  r.read();
  const float *weight = static_cast<const float*>(p.weight), *bias = static_cast<const float*>(p.bias);
  T* out = static_cast<T*>(p.out) + row * p.dim;
  over_row<V>(team, p.dim, [&](int64_t d) {
    float m[V], w[V], offset[V];
    r.get(m, d);
    if (weight) read(w, weight + d);
    if (bias) read(offset, bias + d);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      m[i] = (m[i] - r.mean) * r.scale;
      if (weight) m[i] *= w[i];
      if (bias) m[i] += offset[i];
    }
    write_rounded(out + d, m);
  });
}

// With n the normed row and g = dy * weight: dm = scale * (h - mean(h)), h = g - n * mean(g * n), the first mean for
// "layer" only. It has mean(n), which is 0 but for roundings: without it the dm of a row would not add up to 0, and
// what its differences a - b have in common would multiply that in dmix.
template <class T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    mix_norm_bwd_kernel(const __grid_constant__ BranchMixNormBwdParams q, const __grid_constant__ RowPlan o) {
  LINMU_SHARED(memory);
  const BranchMixNormParams& p = q.forward;
  const int64_t D = p.dim;
  float* scratch = reinterpret_cast<float*>(memory);
  const Team team(o, scratch);
  const int own = threadIdx.x / o.per_row;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * o.rows + own, parts = o.parts * o.rows;
  float *kept = scratch + kWarp + own * 4 * D, *result = o.sums + part * 3 * D;
  float *dmix = o.kept ? kept + D : result, *dweight = dmix + D, *dbias = dweight + D;
  const float* weight = static_cast<const float*>(p.weight);
  double all = 0;
  over_row<V>(team, D, [&](int64_t d) {
    const float zeros[V] = {};
    write(dmix + d, zeros), write(dweight + d, zeros), write(dbias + d, zeros);
  });
  for (int64_t row = part; row < p.rows; row += parts) {
    Row<T, V> r(p, team, row, o.kept ? kept : nullptr);
    r.read();
    const T* grad = static_cast<const T*>(q.grad_out) + row * D;
    // n, and g from dy.
    const auto normed = [&](float (&n)[V], float (&g)[V], int64_t d) {
      r.get(n, d);
#pragma unroll
      for (int i = 0; i < V; ++i) n[i] = (n[i] - r.mean) * r.scale;
      if (!weight) return;
      float w[V];
      read(w, weight + d);
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] *= w[i];
    };
    float sum_g = 0.f, sum_gn = 0.f, sum_n = 0.f;
    over_row<V>(team, D, [&](int64_t d) {
      float n[V], dy[V], g[V], dw[V];
      read_as_float(dy, grad + d);
#pragma unroll
      for (int i = 0; i < V; ++i) g[i] = dy[i];
      normed(n, g, d);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dw[i] = dy[i] * n[i];
        sum_g += g[i];
        sum_gn += g[i] * n[i];
        sum_n += n[i];
      }
      if (q.dweight) add(dweight + d, dw);
      if (q.dbias) add(dbias + d, dy);
    });
    const float size = static_cast<float>(D);
    const float mean_gn = p.norm == Norm::none ? 0.f : team.sum(sum_gn) / size;
    const float mean_h = p.norm == Norm::layer ? team.sum(sum_g - sum_n * mean_gn) / size : 0.f;
    float share = 0.f;
    over_row<V>(team, D, [&](int64_t d) {
      float n[V], dm[V], db[V] = {};
      read_as_float(dm, grad + d);
      normed(n, dm, d);
#pragma unroll
      for (int i = 0; i < V; ++i) dm[i] = (dm[i] - n[i] * mean_gn - mean_h) * r.scale;
      if (r.on) {
        float a[V], b[V], mix[V], lean[V];
        read_as_float(a, r.a + d), read_as_float(b, r.b + d);
        r.shares(mix, d);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          lean[i] = dm[i] * (a[i] - b[i]);
          if (p.mix_by != MixBy::channel) share += lean[i];
          db[i] = (1.f - mix[i]) * dm[i];
          dm[i] *= mix[i];
        }
        if (p.mix_by == MixBy::channel) add(dmix + d, lean);
      }
      write_rounded(static_cast<T*>(q.da) + row * D + d, dm);
      write_rounded(static_cast<T*>(q.db) + row * D + d, db);
    });
    if (p.mix_by != MixBy::channel) share = team.sum(share);
    if (p.mix_by == MixBy::token && team.lane == 0) static_cast<float*>(q.dmix)[row] = share;
    all += share;
  }
  if (team.lane == 0) o.shares[part] = all;
  if (o.kept)
    over_row<V>(team, D, [&](int64_t d) {
      for (int k = 0; k < 3; ++k) {
        float sum[V];
        read(sum, dmix + k * D + d);
        write(result + k * D + d, sum);
      }
    });
}

__global__ void mix_norm_sums_kernel(const __grid_constant__ BranchMixNormBwdParams q,
                                     const __grid_constant__ RowPlan o) {
  const BranchMixNormParams& p = q.forward;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, D = p.dim, parts = o.parts * o.rows;
  if (i == 3 * D && p.mix_by == MixBy::scalar) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += o.shares[part];
    static_cast<float*>(q.dmix)[0] = static_cast<float>(sum);
  }
  if (i >= 3 * D) return;
  void* to = i / D == 0 ? (p.mix_by == MixBy::channel ? q.dmix : nullptr) : i / D == 1 ? q.dweight : q.dbias;
  if (!to) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += o.sums[part * 3 * D + i];
  static_cast<float*>(to)[i % D] = static_cast<float>(sum);
}

// `buffers`: floats per element of a row that shared memory would hold.
RowPlan plan_rows(int64_t dim, int channels, int buffers) {
  RowPlan o{};
  const bool alone = dim <= kWarpRow;
  const int64_t threads = ceil_div(ceil_div(dim, channels), kWarp) * kWarp;
  o.per_row = alone ? kWarp : static_cast<int>(std::min<int64_t>(threads, kMaxThreads));
  o.rows = alone ? kRowsPerBlock : 1;
  o.kept = o.rows * buffers * dim * 4 <= std::min<int64_t>(kKeep, shared_limit()) - kWarp * 4;
  return o;
}
int64_t shared_bytes(const RowPlan& o, int64_t dim, int buffers) {
  return kWarp * 4 + (o.kept ? o.rows * buffers * dim * 4 : 0);
}

// Calls f(T, V) as a null pointer and an integral constant; pieces of 16 bytes where all rows allow them.
template <class F>
void with_pieces(const BranchMixNormParams& p, std::initializer_list<const void*> rows, F&& f) {
  dispatch_cuda("branch_mix_norm", p.dtype, [&](auto* t) {
    constexpr int V = 16 / static_cast<int>(sizeof(*t));
    bool wide = p.dim % V == 0;
    if (p.mix_by == MixBy::channel) wide = wide && aligned(p.mix, 16);
    for (const void* row : rows) wide = wide && aligned(row, 16);
    if (wide) return f(t, std::integral_constant<int, V>{});
    f(t, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void branch_mix_norm_fwd_cuda(const BranchMixNormParams& p, const CudaContext& context) {
  if (p.dim == 0) return;
  with_pieces(p, {p.a, p.b, p.out, p.weight, p.bias}, [&](auto* t, auto v) {
    using T = std::remove_pointer_t<decltype(t)>;
    const RowPlan o = plan_rows(p.dim, v(), 1);
    launch("branch_mix_norm", mix_norm_kernel<T, v()>, blocks_of(ceil_div(p.rows, o.rows)), o.per_row * o.rows,
           shared_bytes(o, p.dim, 1), context, p, o);
  });
}

void branch_mix_norm_bwd_cuda(const BranchMixNormBwdParams& q, const CudaContext& context) {
  const BranchMixNormParams& p = q.forward;
  with_pieces(p, {p.a, p.b, q.grad_out, q.da, q.db, p.weight}, [&](auto* t, auto v) {
    using T = std::remove_pointer_t<decltype(t)>;
    RowPlan o = plan_rows(p.dim, v(), 4);
    o.parts = std::min<int64_t>(kParts, ceil_div(p.rows, o.rows));
    const int64_t parts = std::max<int64_t>(1, o.parts * o.rows);
    o.sums = static_cast<float*>(context.allocate(parts * std::max<int64_t>(1, 3 * p.dim) * 4));
    o.shares = static_cast<double*>(context.allocate(parts * 8));
    launch("branch_mix_norm_bwd", mix_norm_bwd_kernel<T, v()>, blocks_of(o.parts), o.per_row * o.rows,
           shared_bytes(o, p.dim, 4), context, q, o);
    constexpr int kThreads = 128;
    launch("branch_mix_norm_bwd", mix_norm_sums_kernel, blocks_of(ceil_div(3 * p.dim + 1, kThreads)), kThreads, 0,
           context, q, o);
  });
}

}  // namespace linmu
