// What the kernels of window_attention for sm_90a share: a warpgroup's products of 64 rows of a tile.
#pragma once
#include "wgmma.cuh"
#include "window_attention.cuh"

namespace linmu {

constexpr int kTileRows = 64;  // of a warpgroup, and of a step

// Whether they take the call. Of few queries or short rows most of a warpgroup's product would be empty.
inline bool warpgroups_serve(const char* op, const WindowAttentionParams& p) {
  return p.dtype != DType::f32 && p.head_dim > 32 && p.head_dim <= 128 && expected_tokens(p) > 32 &&
         architecture(op) == 90;
}

#ifdef LINMU_WGMMA_CODE

// A step's keys and values in shared memory, unless they lie there already, and what each thread copies, arrived. All
// threads call it, also those of a warpgroup that is not `active`. Whether they lie there for the next round too.
template <class T, int D>
__device__ inline bool load_keys(const WindowPlan& s, const WindowSlots& window, int k0, int64_t group, T* k_tile,
                                 T* v_tile, int* tokens, int* coords, bool resident, bool active) {
  if (!resident) {
    __syncthreads();
    read_slots(s.p, window, k0, s.keys, tokens, coords, threadIdx.x, blockDim.x);
    __syncthreads();
    gather<SwizzledPlace>(s, k_tile, s.keys, D, tokens, s.k, group, true, threadIdx.x, blockDim.x);
    gather<SwizzledPlace>(s, v_tile, s.keys, D, tokens, s.v, group, false, threadIdx.x, blockDim.x);
  }
  copy_commit();
  copy_wait<0>();
  fence_proxy_async();
  if (!resident)
    __syncthreads();
  else if (active)
    warpgroup_sync();
  return window.count <= s.keys;
}

// scores = A B^T over D, or, kAdd, more by that: A a tile of 64 rows, B the 64 rows from j of a tile of `rows`. Its own
// group of products.
template <class T, int D, bool kAdd = false>
__device__ inline void multiply_tiles(WarpgroupAccumulator& scores, T* a_tile, T* b_tile, int rows, int j) {
  // One descriptor for each tile, and what is added to it: each of its own would take a register throughout.
  const Descriptor a = make_descriptor(a_tile), b = make_descriptor(b_tile + j * 64);
  warpgroup_fence_operand(scores);
  warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < D; k += 16)
    wgmma<T, Major::K>(scores, advance(a, k / 64 * kTileRows * 128 + k % 64 * 2),
                       advance(b, k / 64 * rows * 128 + k % 64 * 2), kAdd || k > 0);
  warpgroup_commit();
}

// out += A B: A in fragments, B the 64 rows from j of a tile of `rows`. Its own group of products.
template <class T, int D>
__device__ inline void multiply_fragments(WarpgroupAccumulator (&out)[D / 64], const unsigned (&a)[4][4], T* b_tile,
                                          int rows, int j) {
  const Descriptor b = make_descriptor(b_tile + j * 64);
#pragma unroll
  for (int part = 0; part < D / 64; ++part) warpgroup_fence_operand(out[part]);
  warpgroup_arrive();
#pragma unroll
  for (int part = 0; part < D / 64; ++part)
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, Major::MN>(out[part], a[k], advance(b, part * rows * 128 + k * 16 * 128));
  warpgroup_commit();
}

// A step's scores where columns of them, numbered by `tokens`, may be missing.
__device__ inline void hide_missing(WarpgroupAccumulator& scores, const int* tokens) {
  const int lane = threadIdx.x % kWarp;
  if (warp_any(tokens[lane] < 0 || tokens[kWarp + lane] < 0))
    scores.each([&](float& value, int, int column) {
      if (tokens[column] < 0) value = -INFINITY;
    });
}

#endif

}  // namespace linmu
