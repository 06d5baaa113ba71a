// The scan's output on sm_90a, for 16-bit inputs with P and N up to 128. As in ssd_scan.cu, and: a warpgroup has 64
// rows of the chunk, and M goes from its sums to the next product in registers, 64 columns at a time. All tiles of the
// chunk are on their way from the start, in the order they are needed.
#include <algorithm>

#include "ssd_scan_output.cuh"
#include "wgmma.cuh"

namespace linmu {
namespace {

constexpr int kColumns = 64;  // of a warpgroup's products
constexpr int kMaxSize = 128;

// Where things lie in shared memory, in bytes.
struct GroupTiles {
  int64_t visits, segments, tokens, c, b, x, states, bytes;

  __host__ __device__ static constexpr GroupTiles of(int chunk, int head_dim, int state_dim, int directions,
                                                     bool separate) {
    const int64_t row = int64_t{2} * chunk, sets = separate ? 2 : 1;
    GroupTiles t{};
    t.segments = t.visits + 2 * chunk * static_cast<int64_t>(sizeof(Visit));
    t.tokens = t.segments + 2 * chunk * static_cast<int64_t>(sizeof(int));
    t.c = (t.tokens + chunk * static_cast<int64_t>(sizeof(int)) + 127) / 128 * 128;
    t.b = t.c + sets * state_dim * row;
    t.x = t.b + sets * state_dim * row;
    t.states = t.x + head_dim * row;
    t.bytes = t.states + int64_t{2} * directions * head_dim * state_dim;
    return t;
  }
};
static_assert(GroupTiles::of(128, 128, 128, 2, false).bytes <= kSharedSm90);
static_assert(GroupTiles::of(64, 128, 128, 2, true).bytes <= kSharedSm90);

template <class T, int kGroups>
__global__ void __launch_bounds__(kGroups* kGroup, 1)
    group_output_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Output o) {
#ifdef LINMU_GROUP_CODE
  LINMU_SHARED(memory);
  constexpr int Q = kGroups * 64, kThreads = kGroups * kGroup;
  const SsdScanParams& p = s.p;
  const int tid = threadIdx.x, own = tid / kWarp * 16;  // the first of the warp's rows
  const int64_t P = p.head_dim, N = p.state_dim, H = p.heads;
  const int64_t c = blockIdx.x % s.chunks, bh = blockIdx.x / s.chunks, b = bh / H, h = bh % H;
  const int first = p.forward.on ? 0 : 1, last = p.reverse.on ? 1 : 0;
  const GroupTiles tiles = GroupTiles::of(Q, o.head_dim, o.state_dim, last - first + 1, o.separate);
  Visit* visits = reinterpret_cast<Visit*>(memory + tiles.visits);
  int* segments = reinterpret_cast<int*>(memory + tiles.segments);
  int* tokens = reinterpret_cast<int*>(memory + tiles.tokens);
  T* c_tile = reinterpret_cast<T*>(memory + tiles.c);
  T* b_tile = reinterpret_cast<T*>(memory + tiles.b);
  T* x_tile = reinterpret_cast<T*>(memory + tiles.x);
  T* states = reinterpret_cast<T*>(memory + tiles.states);
  const int64_t size = group_tile<T>(Q, o.state_dim), state_size = group_tile<T>(o.head_dim, o.state_dim);

  read_visits(s, Q, b, h, c, first, last, tokens, segments, visits, tid, kThreads);
  __syncthreads();
  const auto load = [&](T* tile, const SsdScanTensor& t, int64_t groups, int columns, int64_t width, bool fast) {
    const T* from = group_of<T>(t, groups, b, h, H);
    load_group_tile<T>(tile, Q, columns, width, fast,
                       [&](int r) { return tokens[r] < 0 ? nullptr : from + tokens[r] * t.token_stride; });
  };
  for (int d = first; d <= (o.separate ? last : first); ++d) {
    const int64_t at = o.separate ? d * size : 0;
    load(b_tile + at, s.direction(d).B, p.groups_b, o.state_dim, N, o.fast_b[d]);
    load(c_tile + at, s.direction(d).C, p.groups_c, o.state_dim, N, o.fast_c[d]);
  }
  copy_commit();
  load(x_tile, p.x, p.groups_x, o.head_dim, P, o.fast_x);
  copy_commit();
  for (int d = first; d <= last; ++d) {
    const T* state = static_cast<const T*>(o.entering[d]) + (bh * s.chunks + c) * P * N;
    load_group_tile<T>(states + (d - first) * state_size, o.head_dim, o.state_dim, N, o.fast_state,
                       [&](int r) { return r < P ? state + r * N : nullptr; });
  }
  copy_commit();
  copy_wait<2>();
  group_publish();
  __syncthreads();

  const int row0 = own / 64 * 64;  // the first of the warpgroup's rows
  GroupSums y[2], sums, m;
  y[0].clear(), y[1].clear();
#pragma unroll
  for (int block = 0; block < kGroups; ++block) {
    const int j0 = block * kColumns;
    m.clear();
    bool scored = false;
    for (int d = first; d <= last; ++d) {
      if (d ? j0 < row0 : j0 > row0) continue;
      if (!scored || o.separate) {
        const int64_t at = o.separate ? d * size : 0;
        sums.clear();
        group_hold(sums);
        group_begin();
        for (int k = 0; k < o.state_dim; k += 16)
          group_mma<T, 0>(sums, by_row(c_tile + at, Q, row0, k), by_row(b_tile + at, Q, j0, k));
        group_end();
        group_hold(sums);
        scored = true;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = own + half * 8 + lane_row();
        const Visit to = visits[d * Q + i];
        const int mine = segments[d * Q + i];
#pragma unroll
        for (int l = 0; l < 16; ++l) {
          const int j = j0 + l / 2 * 8 + lane_column() + l % 2, e = half * 2 + l % 2;
          const Visit from = visits[d * Q + j];
          const bool on = (d ? j >= i : j <= i) && mine == segments[d * Q + j];
          m.v[0][l / 2][e] += sums.v[0][l / 2][e] * (decay(to, from, on) * from.step * to.weight);
        }
      }
    }
    if (block == 0) {
      copy_wait<1>();
      group_publish();
      __syncthreads();
    }
    if (!scored) continue;
    unsigned fragments[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) to_operand<T>(fragments[k], m, 0, k);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (part * kColumns >= o.head_dim) continue;
      group_hold(y[part]);
      group_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        group_mma<T, 1>(y[part], fragments[k], by_depth(x_tile, Q, j0 + k * 16, part * kColumns));
      group_end();
      group_hold(y[part]);
    }
  }

  copy_wait<0>();
  group_publish();
  __syncthreads();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    if (part * kColumns >= o.head_dim) continue;
    for (int d = first; d <= last; ++d) {
      sums.clear();
      group_hold(sums);
      group_begin();
      for (int k = 0; k < o.state_dim; k += 16)
        group_mma<T, 0>(sums, by_row(c_tile + (o.separate ? d * size : 0), Q, row0, k),
                        by_row(states + (d - first) * state_size, o.head_dim, part * kColumns, k));
      group_end();
      group_hold(sums);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = own + half * 8 + lane_row();
        const Visit to = visits[d * Q + i];
        const float arrive = decay(to, segments[d * Q + i] == 0) * to.weight;
#pragma unroll
        for (int l = 0; l < 16; ++l)
          y[part].v[0][l / 2][half * 2 + l % 2] += arrive * sums.v[0][l / 2][half * 2 + l % 2];
      }
    }
    const float skip = p.D ? static_cast<const float*>(p.D)[h] : 0.f;
    y[part].each_pair([&](float u, float v, int i, int j) {
      const int token = tokens[own + i], column = part * kColumns + j;
      if (token < 0 || column >= P) return;
      if (p.D) {
        const T* at = group_at(x_tile, Q, own + i, column);
        u += skip * to_float(at[0]), v += skip * to_float(at[1]);
      }
      store_pair(static_cast<T*>(p.y) + ((b * p.length + token) * H + h) * P + column, u, v, P - column);
    });
  }
#endif
}

}  // namespace

bool plan_group_output(const SsdScanParams& p, int& chunk, Output& o) {
  if (architecture("ssd_scan") != 90 || p.dtype == DType::f32) return false;
  if (p.head_dim > kMaxSize || p.state_dim > kMaxSize || p.head_dim < 1 || p.length <= 32) return false;
  o.head_dim = round_to(p.head_dim, kColumns), o.state_dim = round_to(std::max<int64_t>(p.state_dim, 1), 32);
  const int directions = p.forward.on && p.reverse.on ? 2 : 1;
  const int64_t wanted = std::min(p.chunk > 0 ? p.chunk : 128, p.length);
  chunk = wanted > 64 ? 128 : 64;
  if (GroupTiles::of(chunk, o.head_dim, o.state_dim, directions, o.separate).bytes > kSharedSm90) chunk = 64;
  return true;
}

void group_output(const ScanPlan& s, const Output& o, const CudaContext& context) {
  const SsdScanParams& p = s.p;
  const int directions = p.forward.on && p.reverse.on ? 2 : 1;
  const int64_t shared = GroupTiles::of(s.chunk, o.head_dim, o.state_dim, directions, o.separate).bytes;
  const dim3 blocks = blocks_of(p.batch * p.heads * s.chunks);
  const auto run = [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (s.chunk == 128)
      launch("ssd_scan", group_output_kernel<T, 2>, blocks, 2 * kGroup, shared, context, s, o);
    else
      launch("ssd_scan", group_output_kernel<T, 1>, blocks, kGroup, shared, context, s, o);
  };
  if (p.dtype == DType::bf16)
    run(static_cast<bf16*>(nullptr));
  else
    run(static_cast<half16*>(nullptr));
}

}  // namespace linmu
