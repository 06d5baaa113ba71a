// The scan's output on sm_90a, for 16-bit inputs with P and N up to 128. As in ssd_scan.cu, and: a warpgroup has 64
// rows of the chunk, and M goes from its accumulator to the next product in registers, 64 columns at a time.
#include <algorithm>

#include "ssd_scan_pipeline.cuh"

namespace linmu {
namespace {

constexpr int kColumns = 64;  // of a warpgroup's products
constexpr int kMaxSize = 128;

template <class T, int kWarpgroups, bool kTma>
__global__ void __launch_bounds__(kWarpgroups* kWarpgroup, 1)
    warpgroup_output_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Output o,
                            const __grid_constant__ PipelineTiles tiles, const __grid_constant__ TensorMaps maps) {
#ifdef LINMU_WGMMA_CODE
  LINMU_SHARED(memory);
  constexpr int Q = kWarpgroups * 64;
  const SsdScanParams& p = s.p;
  const int tid = threadIdx.x;
  const int64_t P = p.head_dim, H = p.heads;
  const int64_t size = swizzled_size<T>(Q, o.state_dim), state_size = swizzled_size<T>(o.head_dim, o.state_dim);
  Pipeline<T, Q, kTma> pipeline(s, o, tiles, maps, memory);
  const int first = pipeline.first, last = pipeline.last;

  for (; pipeline.current < pipeline.end; pipeline.advance()) {
    const int own = opaque(tid) / kWarp * 16;  // the first of the warp's rows
    const int row0 = own / 64 * 64;            // the first of the warpgroup's rows
    const int64_t b = pipeline.batch(pipeline.current), h = pipeline.head(pipeline.current);
    const Visit* visits = pipeline.template tile<Visit, kVisits>();
    const int* segments = pipeline.template tile<int, kVisits>(tiles.segments);
    const int* tokens = pipeline.template tile<int, kVisits>(tiles.tokens);
    T *b_tile = pipeline.template tile<T, kB>(), *c_tile = pipeline.template tile<T, kC>();
    T *x_tile = pipeline.template tile<T, kX>(), *states = pipeline.template tile<T, kStates>();

    pipeline.template wait<kC>();
    WarpgroupAccumulator y[2], acc, m;
    y[0].clear(), y[1].clear();
#pragma unroll 1
    for (int block = 0; block < kWarpgroups; ++block) {
      const int j0 = block * kColumns;
      m.clear();
      bool scored = false;
      for (int d = first; d <= last; ++d) {
        if (d ? j0 < row0 : j0 > row0) continue;
        if (!scored || o.separate) {
          const int64_t at = o.separate ? d * size : 0;
          acc.clear();
          warpgroup_fence_operand(acc);
          warpgroup_arrive();
          for (int k = 0; k < o.state_dim; k += 16)
            wgmma<T, Major::K>(acc, descriptor_at(c_tile + at, Q, row0, k), descriptor_at(b_tile + at, Q, j0, k));
          warpgroup_commit_and_wait();
          warpgroup_fence_operand(acc);
          scored = true;
        }
        each_pair_of_visits<16, kColumns>(visits + d * Q, segments + d * Q, d == 1, own, j0,
                                          [&](int half, int l, int, const Visit& to, int, const Visit& from, bool on) {
                                            const int e = half * 2 + l % 2;
                                            m.v[0][l / 2][e] +=
                                                acc.v[0][l / 2][e] * (decay(to, from, on) * from.step * to.weight);
                                          });
      }
      if (block == 0) pipeline.template wait<kX>();
      if (!scored) continue;
      unsigned fragments[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) to_a_fragment<T>(fragments[k], m, 0, k);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        if (part * kColumns >= o.head_dim) continue;
        warpgroup_fence_operand(y[part]);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          wgmma<T, Major::MN>(y[part], fragments[k], descriptor_at(x_tile, Q, j0 + k * 16, part * kColumns));
        warpgroup_commit_and_wait();
        warpgroup_fence_operand(y[part]);
      }
    }

    pipeline.template wait<kStates>();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (part * kColumns >= o.head_dim) continue;
      for (int d = first; d <= last; ++d) {
        acc.clear();
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        for (int k = 0; k < o.state_dim; k += 16)
          wgmma<T, Major::K>(acc, descriptor_at(c_tile + (o.separate ? d * size : 0), Q, row0, k),
                             descriptor_at(states + (d - first) * state_size, o.head_dim, part * kColumns, k));
        warpgroup_commit_and_wait();
        warpgroup_fence_operand(acc);
        const float scale = state_scale<T>(o, d, (b * H + h) * s.chunks + pipeline.chunk(pipeline.current));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = own + half * 8 + lane_row();
          const Visit to = visits[d * Q + i];
          const float arrive = decay(to, segments[d * Q + i] == 0) * to.weight * scale;
#pragma unroll
          for (int l = 0; l < 16; ++l)
            y[part].v[0][l / 2][half * 2 + l % 2] += arrive * acc.v[0][l / 2][half * 2 + l % 2];
        }
      }
      const float skip = p.D ? static_cast<const float*>(p.D)[h] : 0.f;
      y[part].each_pair([&](float u, float v, int i, int j) {
        const int token = tokens[own + i], column = part * kColumns + j;
        if (token < 0 || column >= P) return;
        if (p.D) {
          const T* at = swizzled_at(x_tile, Q, own + i, column);
          u += skip * to_float(at[0]), v += skip * to_float(at[1]);
        }
        store_pair(static_cast<T*>(p.y) + ((b * p.length + token) * H + h) * P + column, u, v, P - column);
      });
    }
    __syncthreads();
  }
#endif
}

// Whether TMA can load all of it; then the maps that it takes.
bool encode_tensor_maps(const ScanPlan& s, const Output& o, TensorMaps& maps) {
  const SsdScanParams& p = s.p;
  if (p.token_order || !o.fast_x || !o.fast_state) return false;
  const auto tokens = [&](TensorMap& to, const SsdScanTensor& t, int64_t groups, int64_t width) {
    return encode_tensor_map(to, t.data, {width, p.length, groups, p.batch},
                             {t.token_stride, t.group_stride, t.batch_stride}, s.chunk);
  };
  bool all = tokens(maps.x, p.x, p.groups_x, p.head_dim);
  for (int d = 0; d < 2; ++d) {
    if (!s.direction(d).on) continue;
    const int64_t P = p.head_dim, N = p.state_dim, chunks = p.batch * p.heads * s.chunks;
    all = all && o.fast_b[d] && o.fast_c[d] && tokens(maps.B[d], s.direction(d).B, p.groups_b, N) &&
          tokens(maps.C[d], s.direction(d).C, p.groups_c, N) &&
          encode_tensor_map(maps.states[d], o.entering[d], {N, P, chunks, 1}, {N, P * N, chunks * P * N}, o.head_dim);
  }
  return all;
}

}  // namespace

bool plan_output_sm90(const SsdScanParams& p, int& chunk, Output& o) {
  if (architecture("ssd_scan") != 90 || p.dtype == DType::f32) return false;
  if (p.head_dim > kMaxSize || p.state_dim > kMaxSize || p.head_dim < 1 || p.length <= 32) return false;
  o.head_dim = round_to(p.head_dim, kColumns), o.state_dim = round_to(std::max<int64_t>(p.state_dim, 1), kColumns);
  const int directions = p.forward.on && p.reverse.on ? 2 : 1;
  const int64_t wanted = std::min(p.chunk > 0 ? p.chunk : 128, p.length);
  chunk = wanted > 64 ? 128 : 64;
  if (PipelineTiles::of(chunk, o.head_dim, o.state_dim, directions, o.separate).bytes > kSharedSm90) chunk = 64;
  return true;
}

void output_sm90(const ScanPlan& s, const Output& o, const CudaContext& context) {
  const SsdScanParams& p = s.p;
  const int directions = p.forward.on && p.reverse.on ? 2 : 1;
  PipelineTiles tiles = PipelineTiles::of(s.chunk, o.head_dim, o.state_dim, directions, o.separate);
  const auto heads_of = [&](int64_t groups) { return static_cast<int>(p.heads / groups); };
  tiles.sharing[kVisits] = tiles.sharing[kStates] = 1;
  tiles.sharing[kB] = heads_of(p.groups_b), tiles.sharing[kC] = heads_of(p.groups_c);
  tiles.sharing[kX] = heads_of(p.groups_x);
  tiles.add_stages();
  const int64_t items = p.batch * p.heads * s.chunks;
  if (items == 0) return;
  if (items > INT32_MAX) throw std::invalid_argument("ssd_scan: B * H * chunks must be below 2^31 on CUDA");
  const dim3 blocks = blocks_of(std::min(items, multiprocessors()));
  TensorMaps maps{};
  const bool tma = encode_tensor_maps(s, o, maps);
  const auto run = [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    auto* kernel = tma ? warpgroup_output_kernel<T, 2, true> : warpgroup_output_kernel<T, 2, false>;
    if (s.chunk == 64) kernel = tma ? warpgroup_output_kernel<T, 1, true> : warpgroup_output_kernel<T, 1, false>;
    launch("ssd_scan", kernel, blocks, s.chunk / 64 * kWarpgroup, tiles.bytes, context, s, o, tiles, maps);
  };
  dispatch_16_bit("ssd_scan", p.dtype, run);
}

}  // namespace linmu
