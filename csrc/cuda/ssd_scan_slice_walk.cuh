// A walk of a slice: the kernel of ssd_scan_slice.cuh. Its instances are spread over two files, for their compile time.
#pragma once
#include "ssd_scan_slice.cuh"

namespace linmu {
namespace slices {

#ifdef LINMU_WGMMA_CODE

// d = or += a b over 64 columns of each of kPanels panels; a in registers, b K-major.
template <class T, int kPanels>
__device__ inline void multiply_panels(WarpgroupAccumulator& d, const unsigned (&a)[kPanels * 4][4], const T* b) {
  const Descriptor columns = make_descriptor(b);
#pragma unroll
  for (int k = 0; k < kPanels * 4; ++k)
    wgmma<T, Major::K>(d, a[k], advance(columns, k / 4 * kPanel + k % 4 * 32), k > 0);
  warpgroup_commit();
}

// y += m x over 64 visits.
template <class T>
__device__ inline void multiply_inputs(WarpgroupAccumulator& y, const unsigned (&m)[4][4], const T* x_tile) {
  const Descriptor inputs = make_descriptor(x_tile);
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma<T, Major::MN>(y, m[k], advance(inputs, k * 16 * 128), true);
  warpgroup_commit();
}

// A warp's 16 rows of a tile of 64, as A fragments.
template <class T, int kPanels>
__device__ inline void load_rows(unsigned (&rows)[kPanels * 4][4], const T* tile, int row0) {
  const int lane = threadIdx.x % kWarp, low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kPanels * 4; ++k) ldmatrix(rows[k], swizzled_at(tile, kQ, row0 + low + middle, k * 16 + high));
}

template <class T, int kPanels, Make kMake, bool kReverse, int kParts>
__device__ inline void consume(const ScanPlan& s, const Plan& o, const Block& at, unsigned char* memory,
                               const Ring& ring, int consumer) {
  constexpr bool kOutput = has_output(kMake), kBothWays = kMake == Make::kBoth;
  constexpr bool kStoresY = stores_y(kMake);
  const SsdScanParams& p = s.p;
  const int64_t P = p.head_dim, N = p.state_dim;
  const int bh = static_cast<int>(p.heads) * at.b + at.head(o, consumer), by_chunk = bh * at.chunks;
  const int warp = warp_uniform(threadIdx.x % kWarpgroup / kWarp), lane = threadIdx.x % kWarp;
  const int d = kMake == Make::kAdded ? at.direction : kReverse, slice = at.slice(o, consumer), p0 = slice * kRows,
            set = o.sets == 1 ? 0 : consumer * kPanels * kPanel;
  const bool callers = callers_states(p, d);
  T* h_tile = reinterpret_cast<T*>(memory + o.tiles.h + consumer * kPanels * kPanel);
  const T* r_tile = reinterpret_cast<const T*>(memory + o.tiles.entering + consumer * kPanels * kPanel);
  const float skip = kStoresY && p.D ? static_cast<const float*>(p.D)[bh - at.b * p.heads] : 0.f;

  WarpgroupAccumulator h[kPanels], y, m;
#pragma unroll
  for (int k = 0; k < kPanels; ++k) h[k].clear();
  const float* start = kMake == Make::kAdded        ? nullptr
                       : o.states[d]                ? o.states[d] + (bh * o.spans + at.span) * P * N
                       : callers && p.initial_state ? static_cast<const float*>(p.initial_state) + bh * P * N
                                                    : nullptr;
  if (start) each_of_state(h, p0 + warp * 16, P, N, [&](float& value, int64_t place) { value = start[place]; });

  float passed = 1.f;
  int stage = 0, round = 0;
  float next_keep = 1.f;
  int next_spoiled = 0;
  const auto ask = [&](int chunk) {
    next_keep = s.through[d][by_chunk + at.chunk(chunk)];
    if constexpr (kOutput) next_spoiled = s.spoiled[by_chunk + at.chunk(chunk)];
  };
  if constexpr (!kBothWays) ask(0);
  for (int w = 0; w < at.count;) {
    // Both directions take two chunks a round: the left one's reverse part comes from the right one's visits, and
    // from the state that enters that.
#pragma unroll
    for (int half = kBothWays ? 0 : 1; half < 2; ++half) {
      const bool left = half == 0;
      if (left && w + 1 == at.count) continue;
      const int c = at.chunk(w);
      // Both directions have few registers: there, places in tiles are found anew for every chunk, and what comes from
      // memory is not asked for a chunk ahead.
      const int row0 = kBothWays ? opaque(warp * 16) : warp * 16;
      float keep = next_keep, back_keep, back_by[2];
      bool broken = next_spoiled != 0;
      if (!kBothWays && w + 1 < at.count) ask(w + 1);
      const unsigned char* tiles = memory + stage * o.tiles.stage;
      const T *c_tile = reinterpret_cast<const T*>(tiles + set), *b_tile = c_tile + o.tiles.b / 2,
              *x_tile = reinterpret_cast<const T*>(tiles + o.tiles.x + consumer * kPanel);
      const unsigned char* record = tiles + o.tiles.records + consumer * (kBothWays ? 2 : 1) * kRecord;
      // The record of a direction that is alone is the first.
      const Side forward{record}, reverse{kBothWays ? record + kRecord : record};
      if constexpr (kOutput) {
#pragma unroll
        for (int k = 0; k < kPanels; ++k) store_accumulator(h_tile + k * kRows * 64, h[k], row0);
        fence_proxy_async();
        warpgroup_sync<kConsumers>(consumer);
      } else if constexpr (kMake == Make::kEntering) {
        if (c % 2 || c + 1 == at.chunks) {
          unsigned char* to = entering_at<kPanels>(o, bh, at.chunks, c, slice);
#pragma unroll
          for (int k = 0; k < kPanels; ++k) store_accumulator(h_tile + k * kRows * 64, h[k], row0);
          sync_warp();
#pragma unroll
          for (int k = 0; k < kPanels * 4; ++k) {  // the warp's own rows
            const int place = k / 4 * kPanel + row0 * 128 + (k % 4 * kWarp + lane) * 16;
            *reinterpret_cast<Vec<T, 8>*>(to + place) =
                *reinterpret_cast<const Vec<T, 8>*>(reinterpret_cast<unsigned char*>(h_tile) + place);
          }
          sync_warp();
        }
      }
      barrier_wait(&ring.full[stage], round);
      const int after = stage + 1 == o.tiles.stages ? 0 : stage + 1;
      const unsigned char* tiles_after = memory + after * o.tiles.stage;

      if constexpr (kOutput) {
        if constexpr (kBothWays) barrier_wait(ring.entering_full, w / 2);
        unsigned rows[kPanels * 4][4];
        load_rows<T, kPanels>(rows, c_tile, row0);
        warpgroup_arrive();
        multiply_panels<T, kPanels>(m, rows, b_tile);
        multiply_panels<T, kPanels>(y, rows, h_tile);
        if constexpr (kBothWays)
          keep = s.through[0][by_chunk + c], back_keep = left ? s.through[1][by_chunk + c + 1] : 1.f;
        float by[2];
        (kReverse ? reverse : forward).arrive(by, row0);
        warpgroup_wait<1>();
        warpgroup_fence_operand(m);
        unsigned fragments[4][4];
        decay_scores<T, !kReverse, kReverse || kBothWays>(fragments, m, forward, reverse, warp);
        if constexpr (kBothWays) {
          warpgroup_fence_operand(m);
          warpgroup_arrive();
          multiply_panels<T, kPanels>(m, rows, r_tile);
          reverse.arrive(back_by, row0);
        }
        warpgroup_wait<kBothWays ? 1 : 0>();
        warpgroup_fence_operand(y);
        multiply_rows(y, by);
        if constexpr (kBothWays) {
          warpgroup_wait<0>();
          warpgroup_fence_operand(m);
          const float from_right[2] = {back_by[0] * back_keep, back_by[1] * back_keep};
          multiply_rows(m, from_right);
          y.add(m);
          if (left) {
            barrier_wait(&ring.full[after], round + (after == 0));
          } else {
            sync_warp();
            if (lane == 0) barrier_arrive(ring.entering_empty);
          }
        }
        warpgroup_fence_operand(y);
        warpgroup_arrive();
        multiply_inputs(y, fragments, x_tile);
        if (left) {  // what this chunk asks of the right one's visits
          load_rows<T, kPanels>(rows, c_tile, row0);
          warpgroup_fence_operand(m);
          warpgroup_arrive();
          multiply_panels<T, kPanels>(m, rows, reinterpret_cast<const T*>(tiles_after + set) + o.tiles.b / 2);
        }
      }

      // What the output needs besides comes while the state takes this chunk in.
      Vec<float, 4>* part = nullptr;  // as the accumulators lie: 16 bytes a lane
      Vec<float, 4> others[8];
      if constexpr (kBothWays) broken = s.spoiled[by_chunk + c] != 0;
      if constexpr (kMake == Make::kPart || kMake == Make::kRest)
        part = reinterpret_cast<Vec<float, 4>*>(o.part) +
               (int64_t{by_chunk + c} * o.per_head + slice) * kRows * kQ / 4 + threadIdx.x % kWarpgroup;
      if constexpr (kMake == Make::kRest)
#pragma unroll
        for (int j = 0; j < 8; ++j) others[j] = part[j * kWarpgroup];
      passed *= keep;
#pragma unroll
      for (int k = 0; k < kPanels; ++k) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) h[k].v[0][j][e] *= keep;
      }
      const Descriptor columns = make_descriptor(b_tile);
      unsigned inputs[kParts][4][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        weigh_inputs<T>(inputs[part], x_tile, reinterpret_cast<const float*>(record + kLeave), row0, part);
        if (left && part == 0) {
          const Side right{tiles_after + o.tiles.records + (consumer * 2 + 1) * kRecord};
          warpgroup_wait<0>();
          warpgroup_fence_operand(m);
          warpgroup_fence_operand(y);
          unsigned fragments[4][4];
#pragma unroll
          for (int k = 0; k < 8; ++k)
            decay_block<T>(fragments[k / 2] + k % 2 * 2, m.v[0][k], back_by, right.leave() + k * 8);
          warpgroup_fence_operand(y);
          warpgroup_arrive();
          multiply_inputs(y, fragments, reinterpret_cast<const T*>(tiles_after + o.tiles.x + consumer * kPanel));
        }
#pragma unroll
        for (int k = 0; k < kPanels; ++k) warpgroup_fence_operand(h[k]);
        warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel)
            wgmma<T, Major::MN>(h[panel], inputs[part][k], advance(columns, panel * kPanel + k * 16 * 128), true);
        warpgroup_commit();
        if (part + 1 < kParts) warpgroup_wait<0>();
      }

      if constexpr (kOutput) {
        warpgroup_wait<1>();
        warpgroup_fence_operand(y);
        warpgroup_sync<kConsumers>(consumer);  // no warp of the group reads the tile of the state any more
        if constexpr (kMake == Make::kPart) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float* value = y.v[0][j];
            part[j * kWarpgroup] = {{value[0], value[1], value[2], value[3]}};
          }
        } else {
          if constexpr (kMake == Make::kRest)
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) y.v[0][j][e] += others[j].v[e];
          if (p.D)
            y.each_pair([&](float& u, float& v, int i, int j) {
              const unsigned both = *reinterpret_cast<const unsigned*>(swizzled_at(x_tile, kQ, row0 + i, j));
              u += skip * to_float(T{static_cast<uint16_t>(both)}),
                  v += skip * to_float(T{static_cast<uint16_t>(both >> 16)});
            });
          y.each([&](float& value, int, int) { broken |= !(fabsf(value) < INFINITY); });
          store_accumulator(h_tile, y, row0);
          sync_warp();
          const int* tokens = reinterpret_cast<const int*>(memory + o.tiles.tokens + stage * kTokens) + row0 + lane / 8;
          const int column = p0 + lane % 8 * 8, row = static_cast<int>(p.heads * P);  // 16 bytes are with each lane
          T* out = static_cast<T*>(p.y) + (at.b * (p.length - 1) * p.heads + bh) * P + column;
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (const int token = tokens[k * 4]; token >= 0 && column < P)
              *reinterpret_cast<Vec<T, 8>*>(out + int64_t{token} * row) = *reinterpret_cast<const Vec<T, 8>*>(
                  swizzled_at(h_tile, kRows, row0 + k * 4 + lane / 8, lane % 8 * 8));
        }
        if (warp_any(broken) && lane == 0) s.spoiled[by_chunk + c] = 1, s.redo[bh] = 1;
      }
      warpgroup_wait<0>();
#pragma unroll
      for (int k = 0; k < kPanels; ++k) warpgroup_fence_operand(h[k]);
      sync_warp();
      if (lane == 0) barrier_arrive(&ring.empty[stage]);
      if (++stage == o.tiles.stages) stage = 0, ++round;
      ++w;
    }
  }

  if constexpr (kMake == Make::kAdded) {
    float* added = o.states[d] + (bh * o.spans + at.span) * P * N;
    each_of_state(h, p0 + warp * 16, P, N, [&](float& value, int64_t place) { added[place] = value; });
    if (threadIdx.x % kWarpgroup == 0 && p0 == 0) o.through[d][bh * o.spans + at.span] = passed;
  } else if (kStoresY && callers && p.final_state && at.span + 1 == o.spans) {
    float* last = static_cast<float*>(p.final_state) + bh * P * N;
    bool broken = false;
    each_of_state(h, p0 + warp * 16, P, N, [&](float& value, int64_t place) {
      broken |= !(fabsf(value) < INFINITY);
      last[place] = value;
    });
    if (broken) s.redo[bh] = 1;
  }
}

#endif

// kParts: of the inputs of the state, each what rounding the ones before left over. kAdded walks the direction of
// blockIdx.y, or the only one; the others that of kReverse.
template <class T, int kPanels, Make kMake, bool kReverse, int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    slice_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Plan o) {
#ifdef LINMU_WGMMA_CODE
  // Of 65,536 registers: 2 x 128 x 232 and 128 x 40.
  constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
  LINMU_SHARED(memory);
  const int group = warp_uniform(threadIdx.x / kWarpgroup);
  const int walked = kMake != Make::kAdded ? kReverse : s.p.forward.on ? static_cast<int>(blockIdx.y) : 1;
  Block& at = *reinterpret_cast<Block*>(memory + o.tiles.block);
  const Ring ring(o.tiles, memory);
  if (threadIdx.x == 0) {
    at.place(s, o, static_cast<int>(kMake == Make::kAdded ? o.spans - 1 : o.spans), walked);
    const int warps = at.consumers * kWarpgroup / kWarp;
    for (int i = 0; i < o.tiles.stages; ++i)
      barrier_init(&ring.full[i], o.gathered ? 1 + kGatherers : 1), barrier_init(&ring.empty[i], warps);
    barrier_init(ring.entering_full), barrier_init(ring.entering_empty, warps);
  }
  fence_proxy_async();
  __syncthreads();
  if (group == kConsumers) {
    warpgroup_give_registers<kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0)
      produce<kPanels, kMake>(s, o, at, memory, ring);
    else if (o.gathered && threadIdx.x % kWarpgroup >= kWarpgroup - kGatherers)
      gather<kPanels, kMake>(s, o, at, memory, ring);
  } else {
    warpgroup_take_registers<kConsumerRegisters>();
    if (group < at.consumers) consume<T, kPanels, kMake, kReverse, kParts>(s, o, at, memory, ring, group);
  }
#endif
}

// Launches it, with one or two panels, and with three parts where the state is handed out.
template <Make kMake, bool kReverse, bool kHandsOut>
void launch_slices(const ScanPlan& s, const Plan& o, const CudaContext& context) {
  const int64_t units = s.p.batch * ceil_div(s.p.heads * o.per_head, kConsumers);
  dim3 blocks = blocks_of(units * (kMake == Make::kAdded ? o.spans - 1 : o.spans));
  if (kMake == Make::kAdded && s.p.forward.on && s.p.reverse.on) blocks.y = 2;
  const auto run = [&](auto panels, auto parts) {
    launch("ssd_scan", slice_kernel<bf16, decltype(panels)::value, kMake, kReverse, decltype(parts)::value>, blocks,
           kThreads, o.tiles.bytes, context, s, o);
  };
  const auto with_parts = [&](auto panels) {
    if constexpr (kHandsOut)
      if (s.p.final_state) return run(panels, std::integral_constant<int, 3>{});
    run(panels, std::integral_constant<int, 1>{});
  };
  if (s.p.state_dim > 64)
    with_parts(std::integral_constant<int, 2>{});
  else
    with_parts(std::integral_constant<int, 1>{});
}

}  // namespace slices
}  // namespace linmu
