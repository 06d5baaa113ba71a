// Backward of window_attention on sm_90a, for 16-bit inputs with 32 < P <= 128. As in window_attention_bwd.cu, on
// wgmma; all sums are a warpgroup's own, in a fixed order.
//
//     dq      a warpgroup has 64 queries of one head, the block the keys; also delta, and q as it was rotated
//     dk, dv  a warpgroup has 64 keys; a third one loads the queries of all heads of the group, 64 a step, into a ring
//             of stages
//
// Scores of a step become weights, and these gradients of scores, while other products run.
#include "tma.cuh"
#include "window_attention_seen.cuh"
#include "window_attention_warpgroup.cuh"

namespace linmu {
namespace {

constexpr int kConsumers = 2, kStages = 3;  // of dk, dv

// What a block of dk and dv has to do: two tiles of keys a pass, and all steps for each. The queries of each head come
// after those of the one before. It lies in shared memory, for registers are few.
struct Work {
  WindowSlots window;
  int64_t group;
  int split, first_head, last_head, blocks, steps, passes, loads;  // blocks: steps of a head; loads: of all passes

  __device__ explicit Work(const WindowPlan& s) {
    const WindowAttentionParams& p = s.p;
    const int64_t pair = blockIdx.x / s.splits;
    const int share = static_cast<int>(p.heads / p.groups);
    split = static_cast<int>(blockIdx.x % s.splits), group = pair % p.groups;
    window = window_slots(p, pair / p.groups);
    first_head = static_cast<int>(group) * share, last_head = first_head + share;
    blocks = (window.count + kTileRows - 1) / kTileRows, steps = share * blocks;
    passes = (window.count + kConsumers * kTileRows - 1) / (kConsumers * kTileRows);
    loads = split < passes ? (passes - split + s.splits - 1) / s.splits * steps : 0;
  }
};

template <class T, int D>
struct Shape {
  static constexpr int kPitch = D + 4;  // of a stage of floats, which takes the place of a warpgroup's two tiles
  static constexpr int64_t kOwn = int64_t{kTileRows} * kPitch * 4, kTile = int64_t{kTileRows} * D * 2;
  static constexpr int64_t kInts = kTileRows * static_cast<int64_t>(sizeof(int));
  static_assert(sizeof(T) == 2 && kOwn >= 2 * kTile && kOwn % 1024 == 0);

  // dq: registers and shared memory hold so many. Tokens, coordinates, deltas.
  static constexpr int kMaxWarpgroups = D == 128 ? 2 : 3;
  static constexpr int64_t kPerKey = 2 * D * 2 + 2 * sizeof(int), kPerWarpgroup = kOwn + 3 * kInts;

  // dk, dv: a step's q and grad_out; tokens, coordinates, log-sum-exps, deltas.
  static constexpr int64_t kSteps = kConsumers * kOwn, kStepInts = kSteps + kStages * 2 * kTile,
                           kOwnInts = kStepInts + kStages * 4 * kInts, kBarriers = kOwnInts + kConsumers * 2 * kInts,
                           kWork = kBarriers + 2 * kStages * 8, kBytes = kWork + static_cast<int64_t>(sizeof(Work));
  static_assert(kBytes <= kSharedSm90 && kTileRows * kPerKey + kMaxWarpgroups * kPerWarpgroup <= kSharedSm90);
};

#ifdef LINMU_WGMMA_CODE

template <class T>
__device__ inline void to_fragments(unsigned (&to)[4][4], const WarpgroupAccumulator& from) {
#pragma unroll
  for (int k = 0; k < 4; ++k) to_a_fragment<T>(to[k], from, 0, k);
}

// What a warpgroup's queries take from the keys that are there.
template <class T, int D, bool kPlain>
struct Queries {
  const WindowAttentionParams& p;
  T *q_tile, *grad_tile;
  const int *tokens, *coords;  // of the warp's rows
  int64_t head;
  float lse[2], delta[2];

  __device__ void weigh(WarpgroupAccumulator& scores, const int* key_tokens, const int* key_coords) const {
    if constexpr (kPlain) {
      const float factor = static_cast<float>(p.scale) * kPerE<T>;
      hide_missing(scores, key_tokens);
#pragma unroll
      for (int c = 0; c < 8; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores.v[0][c][e] = fast_exp2(fmaf(scores.v[0][c][e], factor, -lse[e / 2]));
    } else {
      to_exponents<T, false>(scores, p, head, tokens, coords, key_tokens, key_coords);
#pragma unroll
      for (int c = 0; c < 8; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores.v[0][c][e] = power<T>(scores.v[0][c][e] - lse[e / 2]);
    }
  }

  // Weights become the gradients of their scores.
  __device__ void to_gradients(WarpgroupAccumulator& weights, const WarpgroupAccumulator& change) const {
#pragma unroll
    for (int c = 0; c < 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) weights.v[0][c][e] *= change.v[0][c][e] - delta[e / 2];
  }

  __device__ void take(WarpgroupAccumulator (&dq)[D / 64], T* k_tile, T* v_tile, int keys, int here,
                       const int* key_tokens, const int* key_coords) const {
    WarpgroupAccumulator scores, change;
    unsigned grads[4][4];
    here = warp_uniform(here);  // or the loop would be one that lanes leave by themselves
    multiply_tiles<T, D>(scores, q_tile, k_tile, keys, 0);
    multiply_tiles<T, D>(change, grad_tile, v_tile, keys, 0);
    warpgroup_wait<1>();
    warpgroup_fence_operand(scores);
    weigh(scores, key_tokens, key_coords);
    warpgroup_wait<0>();
    warpgroup_fence_operand(change);
    to_gradients(scores, change);
    to_fragments<T>(grads, scores);
    int j = kTileRows;
    for (; j < here; j += kTileRows) {
      multiply_tiles<T, D>(scores, q_tile, k_tile, keys, j);
      multiply_tiles<T, D>(change, grad_tile, v_tile, keys, j);
      multiply_fragments<T, D>(dq, grads, k_tile, keys, j - kTileRows);
      warpgroup_wait<2>();
      warpgroup_fence_operand(scores);
      weigh(scores, key_tokens + j, key_coords + j);
      warpgroup_wait<1>();
      warpgroup_fence_operand(change);
      to_gradients(scores, change);
      warpgroup_wait<0>();
#pragma unroll
      for (int part = 0; part < D / 64; ++part) warpgroup_fence_operand(dq[part]);
      to_fragments<T>(grads, scores);
    }
    multiply_fragments<T, D>(dq, grads, k_tile, keys, j - kTileRows);
    warpgroup_wait<0>();
#pragma unroll
    for (int part = 0; part < D / 64; ++part) warpgroup_fence_operand(dq[part]);
  }
};

// Where a step lies in shared memory.
template <class T, int D>
struct Step {
  T *q_tile, *grad_tile;
  int *tokens, *coords;
  float *lse, *deltas;

  __device__ Step(unsigned char* memory, int stage) {
    using Own = Shape<T, D>;
    q_tile = reinterpret_cast<T*>(memory + Own::kSteps + stage * 2 * Own::kTile), grad_tile = q_tile + kTileRows * D;
    tokens = reinterpret_cast<int*>(memory + Own::kStepInts + stage * 4 * Own::kInts), coords = tokens + kTileRows;
    lse = reinterpret_cast<float*>(coords + kTileRows), deltas = lse + kTileRows;
  }
};

// The barriers of the stages, and which one is next.
struct StepRing {
  Barrier* barriers;  // of the stages that are full, then of those that are empty
  int stage = 0, round = 0;

  __device__ explicit StepRing(unsigned char* memory) : barriers(reinterpret_cast<Barrier*>(memory)) {}
  __device__ Barrier* full(int of) const { return barriers + of; }
  __device__ Barrier* empty(int of) const { return barriers + kStages + of; }
  __device__ bool begun() const { return stage + round > 0; }
  __device__ int before() const { return stage > 0 ? stage - 1 : kStages - 1; }
  __device__ void advance() {
    if (++stage == kStages) stage = 0, ++round;
  }
  // Until the stage may be written, or read; by a whole warp, which has read it: the next is next.
  __device__ void wait_empty() const {
    if (round > 0) barrier_wait(empty(stage), round - 1);
  }
  __device__ void wait() const { barrier_wait(full(stage), round); }
  __device__ void release() {
    sync_warp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty(stage));
    advance();
  }
};

// The rows of a step's queries, whole pieces of 16 bytes, by a warpgroup. A warp takes 8 rows at a time.
template <class T, int D>
__device__ inline void copy_rows(const WindowPlan& s, const Step<T, D>& to, int head, int thread) {
  const int lane = thread % kWarp, P = static_cast<int>(s.p.head_dim);
#pragma unroll 1
  for (int r = thread / kWarp * 8 + lane % 8; r < kTileRows; r += kWarpgroup / kWarp * 8) {
    const int token = to.tokens[r];
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      const TokenRows<const void*>& rows = which ? s.grad_out.at : s.q.at;
      const T* row = static_cast<const T*>(rows.data) + (token < 0 ? 0 : row_offset(rows, s.p.length, token, head));
      T* tile = which ? to.grad_tile : to.q_tile;
#pragma unroll 2  // more would take more registers than this warpgroup kept
      for (int c = lane / 8 * 8; c < D; c += 32) {
        const bool valid = token >= 0 && c < P;
        copy_async(swizzled_at(tile, kTileRows, r, c), valid ? row + c : nullptr, valid);
      }
    }
  }
}

// By the third warpgroup: all steps of all passes.
template <class T, int D>
__device__ inline void load_steps(const WindowPlan& s, unsigned char* memory, StepRing ring) {
  const WindowAttentionParams& p = s.p;
  const Work& work = *reinterpret_cast<const Work*>(memory + Shape<T, D>::kWork);
  const int thread = threadIdx.x % kWarpgroup;
  int head = work.first_head, first = 0;
#pragma unroll 1
  for (int left = work.loads; left > 0; --left) {
    const Step<T, D> to(memory, ring.stage);
    ring.wait_empty();
    read_slots(p, work.window, first, kTileRows, to.tokens, to.coords, thread, kWarpgroup);
    if (thread < kTileRows) {
      const bool inside = first + thread < work.window.count;
      const int64_t at = (work.window.begin + first + thread) * p.heads + head;
      to.lse[thread] = inside ? exponent<T>(static_cast<const float*>(p.lse)[at]) : INFINITY;
      to.deltas[thread] = inside ? s.delta[at] : 0.f;
    }
    warpgroup_sync(kConsumers);
    copy_rows<T, D>(s, to, head, thread);
    copy_commit();
    if (ring.begun()) {  // what the thread copied before has come
      copy_wait<1>();
      fence_proxy_async();
      barrier_arrive(ring.full(ring.before()));
    }
    ring.advance();
    first += kTileRows;
    if (first < work.window.count) continue;
    first = 0;
    if (++head == work.last_head) head = work.first_head;
  }
  copy_wait<0>();
  fence_proxy_async();
  if (ring.begun()) barrier_arrive(ring.full(ring.before()));
}

// What a warpgroup's keys take from the queries of all steps.
template <class T, int D, bool kPlain>
struct Keys {
  const WindowAttentionParams& p;
  T *k_tile, *v_tile;
  const int *tokens, *coords;  // of the warp's rows

  __device__ void weigh(WarpgroupAccumulator& scores, const Step<T, D>& of, int64_t head) const {
    if constexpr (kPlain) {
      const float factor = static_cast<float>(p.scale) * kPerE<T>;
      hide_missing(scores, of.tokens);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const Vec<float, 2> lse = *reinterpret_cast<const Vec<float, 2>*>(of.lse + c * 8 + lane_column());
#pragma unroll
        for (int e = 0; e < 4; ++e) scores.v[0][c][e] = fast_exp2(fmaf(scores.v[0][c][e], factor, -lse.v[e % 2]));
      }
    } else {
      to_exponents<T, true>(scores, p, head, tokens, coords, of.tokens, of.coords);
      scores.each([&](float& x, int, int column) { x = of.tokens[column] < 0 ? 0.f : power<T>(x - of.lse[column]); });
    }
  }

  __device__ void take(WarpgroupAccumulator (&dk)[D / 64], WarpgroupAccumulator (&dv)[D / 64], const Work& work,
                       unsigned char* memory, StepRing& ring) const {
    int head = work.first_head, block = 0;
    const int count = warp_uniform(work.steps);  // or the loop would be one that lanes leave by themselves
    for (int step = 0; step < count; ++step) {
      WarpgroupAccumulator scores, change;
      unsigned weights[4][4], grads[4][4];
      const Step<T, D> of(memory, ring.stage);
      ring.wait();
      // Less delta from the start: later there are no registers for it; and before all products, which
      // would wait for it.
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const Vec<float, 2> delta = *reinterpret_cast<const Vec<float, 2>*>(of.deltas + c * 8 + lane_column());
#pragma unroll
        for (int e = 0; e < 4; ++e) change.v[0][c][e] = -delta.v[e % 2];
      }
      warpgroup_fence_operand(change);
      multiply_tiles<T, D>(scores, k_tile, of.q_tile, kTileRows, 0);
      multiply_tiles<T, D, true>(change, v_tile, of.grad_tile, kTileRows, 0);
      warpgroup_wait<1>();
      warpgroup_fence_operand(scores);
      weigh(scores, of, head);
      to_fragments<T>(weights, scores);
      multiply_fragments<T, D>(dv, weights, of.grad_tile, kTileRows, 0);
      warpgroup_wait<1>();
      warpgroup_fence_operand(change);
#pragma unroll
      for (int c = 0; c < 8; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores.v[0][c][e] *= change.v[0][c][e];
      to_fragments<T>(grads, scores);
      multiply_fragments<T, D>(dk, grads, of.q_tile, kTileRows, 0);
      warpgroup_wait<0>();
#pragma unroll
      for (int part = 0; part < D / 64; ++part) warpgroup_fence_operand(dk[part]), warpgroup_fence_operand(dv[part]);
      ring.release();
      if (!kPlain && ++block == work.blocks) block = 0, ++head;
    }
  }
};

template <int D>
__device__ inline bool broken(WarpgroupAccumulator (&sums)[D / 64]) {
  bool found = false;
#pragma unroll
  for (int part = 0; part < D / 64; ++part) found |= any_broken(sums[part]);
  return found;
}

// By a warpgroup of two: dk and dv of its keys, 64 in a pass.
template <class T, int D, bool kPlain>
__device__ inline void key_gradients(const WindowPlan& s, unsigned char* memory, StepRing ring) {
  using Own = Shape<T, D>;
  const WindowAttentionParams& p = s.p;
  const Work& work = *reinterpret_cast<const Work*>(memory + Own::kWork);
  const int warpgroup = warp_uniform(threadIdx.x / kWarpgroup), thread = threadIdx.x % kWarpgroup;
  const int own = thread / kWarp * 16;  // the first of the warp's rows
  unsigned char* own_tiles = memory + warpgroup * Own::kOwn;
  T *k_tile = reinterpret_cast<T*>(own_tiles), *v_tile = k_tile + kTileRows * D;
  int *tokens = reinterpret_cast<int*>(memory + Own::kOwnInts) + warpgroup * 2 * kTileRows,
      *coords = tokens + kTileRows;
  float* stage = reinterpret_cast<float*>(own_tiles) + own * Own::kPitch;
  for (int pass = work.split; pass < work.passes; pass += s.splits) {
    const int first = (pass * kConsumers + warpgroup) * kTileRows;
    if (first >= work.window.count) {  // the last tile of an odd number: the other warpgroup's stages pass by
      for (int step = 0; step < work.steps; ++step) {
        ring.wait();
        ring.release();
      }
      continue;
    }
    warpgroup_sync<kConsumers>();
    read_slots(p, work.window, first, kTileRows, tokens, coords, thread, kWarpgroup);
    warpgroup_sync<kConsumers>();
    gather<SwizzledPlace>(s, k_tile, kTileRows, D, tokens, s.k, work.group, true, thread, kWarpgroup);
    gather<SwizzledPlace>(s, v_tile, kTileRows, D, tokens, s.v, work.group, false, thread, kWarpgroup);
    copy_commit();
    copy_wait<0>();
    fence_proxy_async();
    warpgroup_sync<kConsumers>();
    WarpgroupAccumulator dk[D / 64], dv[D / 64];
#pragma unroll
    for (int part = 0; part < D / 64; ++part) dk[part].clear(), dv[part].clear();
    Keys<T, D, kPlain>{p, k_tile, v_tile, tokens + own, coords + own}.take(dk, dv, work, memory, ring);

    warpgroup_sync<kConsumers>();  // all products that read k and v are done
#pragma unroll
    for (int part = 0; part < D / 64; ++part) to_stage(stage + part * 64, Own::kPitch, dv[part], 1.f);
    sync_warp();
    store_stage<T>(p, s.dv, p.groups, work.group, stage, Own::kPitch, 16, D, tokens + own, false, s.out.fast);
    sync_warp();
#pragma unroll
    for (int part = 0; part < D / 64; ++part)
      to_stage(stage + part * 64, Own::kPitch, dk[part], static_cast<float>(p.scale));
    sync_warp();
    if (p.causal && (broken<D>(dk) | broken<D>(dv)))
      redo_dkv<T>(s, work.window, first + own, 16, work.group, stage, Own::kPitch);
    store_stage<T>(p, s.dk, p.groups, work.group, stage, Own::kPitch, 16, D, tokens + own, true, s.out.fast);
  }
}

#endif

// kPlain, here and below: no bias, not causal, and a scale above 0.
template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(Shape<T, D>::kMaxWarpgroups* kWarpgroup, 1)
    warpgroup_dq_kernel(const __grid_constant__ WindowPlan s) {
#ifdef LINMU_WGMMA_CODE
  using Own = Shape<T, D>;
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
  unsigned char* own_tiles = reinterpret_cast<unsigned char*>(v_tile + s.keys * D) + warpgroup * Own::kOwn;
  T *q_tile = reinterpret_cast<T*>(own_tiles), *grad_tile = q_tile + kTileRows * D;
  int* key_tokens = reinterpret_cast<int*>(memory + s.keys * 4 * D + warpgroups * Own::kOwn);
  int* key_coords = key_tokens + s.keys;
  int *tokens = key_coords + s.keys + warpgroup * 3 * kTileRows, *coords = tokens + kTileRows;
  float* deltas = reinterpret_cast<float*>(coords + kTileRows);

  const int items = (window.count + kTileRows - 1) / kTileRows * share;
  bool resident = false;
  for (int round = split * warpgroups; round < items; round += s.splits * warpgroups) {
    const int item = round + warpgroup, head = static_cast<int>(group) * share + item % share;
    const bool active = item < items;
    const int first = item / share * kTileRows;
    Queries<T, D, kPlain> mine{p, q_tile, grad_tile, tokens + own, coords + own, head, {}, {}};
    if (active) {
      warpgroup_sync();
      read_slots(p, window, first, kTileRows, tokens, coords, thread, kWarpgroup);
      warpgroup_sync();
      gather<SwizzledPlace>(s, q_tile, kTileRows, D, tokens, s.q, head, true, thread, kWarpgroup);
      gather<SwizzledPlace>(s, grad_tile, kTileRows, D, tokens, s.grad_out, head, false, thread, kWarpgroup);
      read_lse<T>(mine.lse, p, window, first + own, head, tokens + own);
    }
    WarpgroupAccumulator dq[D / 64];
#pragma unroll
    for (int part = 0; part < D / 64; ++part) dq[part].clear();

    for (int k0 = 0; k0 < window.count; k0 += s.keys) {
      const int here = window.count - k0 < s.keys ? window.count - k0 : s.keys;
      resident = load_keys<T, D>(s, window, k0, group, k_tile, v_tile, key_tokens, key_coords, resident, active);
      if (!active) continue;

      if (k0 == 0) {
        out_dot_grad<SwizzledPlace, T, D>(s, deltas + own, tokens + own, grad_tile, kTileRows, own, 16, head);
        sync_warp();
        if (lane < 16) {
          const int64_t at = (window.begin + first + own + lane) * p.heads + head;
          float& delta = deltas[own + lane];
          // The log-sum-exp's gradient by a score is the score's weight, as delta's factor is.
          if (s.grad_lse && tokens[own + lane] >= 0) delta -= s.grad_lse[at];
          if (first + own + lane < window.count) s.delta[at] = delta;
        }
        sync_warp();
        if (s.rotated_q)
          for (int i = lane; i < 16 * (D / 8); i += kWarp) {
            const int r = own + i / kWarp / (D / 32) * 8 + i % 8, c = i / kWarp % (D / 32) * 32 + i % kWarp / 8 * 8;
            if (tokens[r] >= 0)
              piece(static_cast<T*>(s.rotated_q) + (static_cast<int64_t>(tokens[r]) * p.heads + head) * D + c) =
                  piece(swizzled_at(q_tile, kTileRows, r, c));
          }
#pragma unroll
        for (int r = 0; r < 2; ++r) mine.delta[r] = deltas[own + row_of(r)];
      }
      mine.take(dq, k_tile, v_tile, s.keys, here, key_tokens, key_coords);
    }
    if (!active) continue;

    float* stage = reinterpret_cast<float*>(own_tiles) + own * Own::kPitch;
    warpgroup_sync();  // all products that read q and grad_out are done
#pragma unroll
    for (int part = 0; part < D / 64; ++part)
      to_stage(stage + part * 64, Own::kPitch, dq[part], static_cast<float>(p.scale));
    sync_warp();
    if (p.causal && broken<D>(dq)) redo_dq<T>(s, window, first + own, 16, head, stage, Own::kPitch);
    store_stage<T>(p, s.dq, p.heads, head, stage, Own::kPitch, 16, D, tokens + own, true, s.out.fast);
  }
#endif
}

template <class T, int D, bool kPlain>
__global__ void __launch_bounds__((kConsumers + 1) * kWarpgroup, 1)
    warpgroup_dkv_kernel(const __grid_constant__ WindowPlan s) {
#ifdef LINMU_WGMMA_CODE
  using Own = Shape<T, D>;
  // Of 65,536 registers: 2 x 128 x 240 and 128 x 24.
  constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  LINMU_SHARED(memory);
  StepRing ring(memory + Own::kBarriers);
  if (threadIdx.x == 0) {
    *reinterpret_cast<Work*>(memory + Own::kWork) = Work(s);
    for (int i = 0; i < kStages; ++i)
      barrier_init(ring.full(i), kWarpgroup), barrier_init(ring.empty(i), kConsumers * kWarpgroup / kWarp);
  }
  fence_proxy_async();
  __syncthreads();
  if (warp_uniform(threadIdx.x / kWarpgroup) == kConsumers) {
    warpgroup_give_registers<kProducerRegisters>();
    load_steps<T, D>(s, memory, ring);
  } else {
    warpgroup_take_registers<kConsumerRegisters>();
    key_gradients<T, D, kPlain>(s, memory, ring);
  }
#endif
}

template <class T, int D, bool kPlain>
void backward(WindowPlan s, const CudaContext& context) {
  using Own = Shape<T, D>;
  const WindowAttentionParams& p = s.p;
  const int64_t expected = expected_tokens(p), limit = shared_limit(), pairs = p.num_windows * p.groups;
  const int64_t items = ceil_div(expected, kTileRows) * (p.heads / p.groups);
  int64_t warpgroups = std::min<int64_t>(items, Own::kMaxWarpgroups);
  const int64_t wanted = round_to(expected, kTileRows);
  const auto fitting = [&] { return (limit - warpgroups * Own::kPerWarpgroup) / Own::kPerKey / kTileRows * kTileRows; };
  while (warpgroups > 1 && fitting() < kTileRows) --warpgroups;
  s.keys = static_cast<int>(std::max<int64_t>(kTileRows, std::min(wanted, fitting())));
  s.splits = static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / pairs, 1, ceil_div(items, warpgroups)));
  if (p.cos || !s.q.fast)
    s.rotated_q = context.allocate(p.batch * p.length * p.heads * D * static_cast<int64_t>(sizeof(T)));
  launch("window_attention_bwd", warpgroup_dq_kernel<T, D, kPlain>, blocks_of(pairs * s.splits),
         static_cast<int>(warpgroups * kWarpgroup), s.keys * Own::kPerKey + warpgroups * Own::kPerWarpgroup, context,
         s);

  if (s.rotated_q) s.q.at = {s.rotated_q, p.length * p.heads * D, p.heads * D, D};
  s.splits = static_cast<int>(
      std::clamp<int64_t>(kEnoughBlocks / pairs, 1, ceil_div(expected, int64_t{kConsumers} * kTileRows)));
  launch("window_attention_bwd", warpgroup_dkv_kernel<T, D, kPlain>, blocks_of(pairs * s.splits),
         (kConsumers + 1) * kWarpgroup, Own::kBytes, context, s);
}

template <class T, int D>
bool backward_if_it_fits(const WindowPlan& s, const CudaContext& context) {
  if (!s.grad_out.fast || shared_limit() < Shape<T, D>::kBytes) return false;
  const WindowAttentionParams& p = s.p;
  if (!p.bias && !p.causal && p.scale > 0)
    backward<T, D, true>(s, context);
  else
    backward<T, D, false>(s, context);
  return true;
}

}  // namespace

bool window_attention_bwd_sm90(const WindowPlan& s, const CudaContext& context) {
  if (!warpgroups_serve("window_attention_bwd", s.p)) return false;
  const auto run = [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return s.p.head_dim <= 64 ? backward_if_it_fits<T, 64>(s, context) : backward_if_it_fits<T, 128>(s, context);
  };
  return dispatch_16_bit("window_attention_bwd", s.p.dtype, run);
}

}  // namespace linmu
