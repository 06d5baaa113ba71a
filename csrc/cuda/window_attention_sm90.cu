// Forward of window_attention on sm_90a, for 16-bit inputs with 32 < P <= 128. As in window_attention.cu, and: a
// warpgroup has 64 queries of one head, and goes its own way once the keys are there, so that one's softmax runs beside
// another's products.
#include "window_attention_seen.cuh"
#include "window_attention_warpgroup.cuh"

namespace linmu {
namespace {

constexpr int kMaxWarpgroups = 3, kQueries = kTileRows, kKeys = kTileRows;  // of a warpgroup; of a step

template <class T, int D>
struct Shape {
  static constexpr int64_t kPerKey = 2 * D * static_cast<int64_t>(sizeof(T)) + 2 * sizeof(int);
  static constexpr int64_t kPerWarpgroup = kQueries * (D * static_cast<int64_t>(sizeof(T)) + 2 * sizeof(int));
  static_assert(kKeys * kPerKey + kMaxWarpgroups * kPerWarpgroup <= kSharedSm90);
};

#ifdef LINMU_WGMMA_CODE

// A warpgroup's queries over the keys that are there. A step's scores become weights while the last step's weights
// multiply its values.
template <class T, int D>
__device__ inline void attend_plain(WarpgroupAccumulator (&out)[D / 64], OnlineSoftmax<T, 16>& softmax, float factor,
                                    T* q_tile, T* k_tile, T* v_tile, int keys, int here, const int* key_tokens) {
  WarpgroupAccumulator scores;
  unsigned weights[4][4];
  float rescale[2];
  const auto weigh = [&](int j) {
    hide_missing(scores, key_tokens + j);
    softmax.step_scaled(scores, factor, rescale);
  };
  const auto finish = [&] {
#pragma unroll
    for (int part = 0; part < D / 64; ++part) warpgroup_fence_operand(out[part]), multiply_rows(out[part], rescale);
#pragma unroll
    for (int k = 0; k < 4; ++k) to_a_fragment<T>(weights[k], scores, 0, k);
  };
  here = warp_uniform(here);  // or the loop would be one that lanes leave by themselves
  multiply_tiles<T, D>(scores, q_tile, k_tile, keys, 0);
  warpgroup_wait<0>();
  warpgroup_fence_operand(scores);
  weigh(0);
  finish();
  int j = kKeys;
  for (; j < here; j += kKeys) {
    multiply_tiles<T, D>(scores, q_tile, k_tile, keys, j);
    multiply_fragments<T, D>(out, weights, v_tile, keys, j - kKeys);
    warpgroup_wait<1>();
    warpgroup_fence_operand(scores);
    weigh(j);
    warpgroup_wait<0>();
    finish();
  }
  multiply_fragments<T, D>(out, weights, v_tile, keys, j - kKeys);
  warpgroup_wait<0>();
#pragma unroll
  for (int part = 0; part < D / 64; ++part) warpgroup_fence_operand(out[part]);
}

#endif

// kPlain: no bias, not causal, and a scale above 0.
template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(kMaxWarpgroups* kWarpgroup, 1)
    warpgroup_forward_kernel(const __grid_constant__ WindowPlan s) {
#ifdef LINMU_WGMMA_CODE
  LINMU_SHARED(memory);
  const WindowAttentionParams& p = s.p;
  const int warpgroups = blockDim.x / kWarpgroup, warpgroup = warp_uniform(threadIdx.x / kWarpgroup),
            thread = threadIdx.x % kWarpgroup;
  const int lane = threadIdx.x % kWarp, own = thread / kWarp * 16;  // the first of the warp's rows
  const int64_t split = blockIdx.x % s.splits, pair = blockIdx.x / s.splits, group = pair % p.groups;
  const WindowSlots window = window_slots(p, pair / p.groups);
  const int share = static_cast<int>(p.heads / p.groups);

  T* k_tile = reinterpret_cast<T*>(memory);
  T* v_tile = k_tile + s.keys * D;
  T* q_tiles = v_tile + s.keys * D;
  T* q_tile = q_tiles + warpgroup * kQueries * D;
  int* key_tokens = reinterpret_cast<int*>(q_tiles + warpgroups * kQueries * D);
  int* key_coords = key_tokens + s.keys;
  int* tokens = key_coords + s.keys + warpgroup * 2 * kQueries;
  int* coords = tokens + kQueries;

  const int items = (window.count + kQueries - 1) / kQueries * share;
  bool resident = false;
  for (int round = split * warpgroups; round < items; round += s.splits * warpgroups) {
    const int item = round + warpgroup, head = static_cast<int>(group) * share + item % share;
    const bool active = item < items;
    const int first = item / share * kQueries;
    if (active) {
      warpgroup_sync();
      read_slots(p, window, first, kQueries, tokens, coords, thread, kWarpgroup);
      warpgroup_sync();
      gather<SwizzledPlace>(s, q_tile, kQueries, D, tokens, s.q, head, true, thread, kWarpgroup);
    }
    WarpgroupAccumulator out[D / 64];
    OnlineSoftmax<T, 16> softmax;
#pragma unroll
    for (int part = 0; part < D / 64; ++part) out[part].clear();

    for (int k0 = 0; k0 < window.count; k0 += s.keys) {
      const int here = window.count - k0 < s.keys ? window.count - k0 : s.keys;
      resident = load_keys<T, D>(s, window, k0, group, k_tile, v_tile, key_tokens, key_coords, resident, active);
      if (!active) continue;

      if constexpr (kPlain) {
        attend_plain<T, D>(out, softmax, static_cast<float>(p.scale) * kPerE<T>, q_tile, k_tile, v_tile, s.keys, here,
                           key_tokens);
      } else {
        for (int j = 0; j < here; j += kKeys) {
          WarpgroupAccumulator scores;
          multiply_tiles<T, D>(scores, q_tile, k_tile, s.keys, j);
          warpgroup_wait<0>();
          warpgroup_fence_operand(scores);
          to_exponents<T, false>(scores, p, head, tokens + own, coords + own, key_tokens + j, key_coords + j);
          float rescale[2];
          if (softmax.step(scores, rescale)) {
#pragma unroll
            for (int part = 0; part < D / 64; ++part) multiply_rows(out[part], rescale);
          }
          unsigned weights[4][4];
#pragma unroll
          for (int k = 0; k < 4; ++k) to_a_fragment<T>(weights[k], scores, 0, k);
          multiply_fragments<T, D>(out, weights, v_tile, s.keys, j);
          warpgroup_wait<0>();
#pragma unroll
          for (int part = 0; part < D / 64; ++part) warpgroup_fence_operand(out[part]);
        }
      }
    }
    if (!active) continue;

    softmax.finish(p, window, first + own, head);
    const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
    warpgroup_sync();  // all products that read q are done
#pragma unroll
    for (int part = 0; part < D / 64; ++part) {
      multiply_rows(out[part], inverse);
      out[part].each_pair([&](float x, float y, int row, int column) {
        store_pair(swizzled_at(q_tile, kQueries, own + row, part * 64 + column), x, y, 2);
      });
    }
    sync_warp();
    for (int i = lane; i < 16 * (D / 8); i += kWarp) {
      const int r = own + i / kWarp / (D / 32) * 8 + i % 8, c = i / kWarp % (D / 32) * 32 + i % kWarp / 8 * 8;
      store_out(s, tokens[r], head, c, swizzled_at(q_tile, kQueries, r, c));
    }
    bool broken = false;
#pragma unroll
    for (int part = 0; p.causal && part < D / 64; ++part) broken |= any_broken(out[part]);
    if (broken) redo_out<T>(s, window, first + own, 16, head);
  }
#endif
}

template <class T, int D>
void forward(const WindowAttentionParams& p, const CudaContext& context) {
  using Own = Shape<T, D>;
  WindowPlan s = plan_window(p);
  const int64_t expected = expected_tokens(p), limit = shared_limit(), pairs = p.num_windows * p.groups;
  const int64_t items = ceil_div(expected, kQueries) * (p.heads / p.groups);
  const bool plain = !p.bias && !p.causal && p.scale > 0;
  int64_t warpgroups = std::min<int64_t>(items, kMaxWarpgroups);
  const int64_t wanted = ceil_div(expected, kKeys) * kKeys;
  const auto fitting = [&] { return (limit - warpgroups * Own::kPerWarpgroup) / Own::kPerKey / kKeys * kKeys; };
  while (warpgroups > 1 && fitting() < kKeys) --warpgroups;
  s.keys = static_cast<int>(std::max<int64_t>(kKeys, std::min(wanted, fitting())));
  s.splits = static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / pairs, 1, ceil_div(items, warpgroups)));
  const auto kernel = plain ? warpgroup_forward_kernel<T, D, true> : warpgroup_forward_kernel<T, D, false>;
  launch("window_attention", kernel, blocks_of(pairs * s.splits), static_cast<int>(warpgroups * kWarpgroup),
         s.keys * Own::kPerKey + warpgroups * Own::kPerWarpgroup, context, s);
}

}  // namespace

bool window_attention_sm90(const WindowAttentionParams& p, const CudaContext& context) {
  if (!warpgroups_serve("window_attention", p)) return false;
  const auto run = [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (p.head_dim <= 64)
      forward<T, 64>(p, context);
    else
      forward<T, 128>(p, context);
  };
  dispatch_16_bit("window_attention", p.dtype, run);
  return true;
}

}  // namespace linmu
