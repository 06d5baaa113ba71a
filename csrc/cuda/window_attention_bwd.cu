// Backward of window_attention, without atomics: each gradient is summed by one warp, in a fixed order. Scores are
// recomputed and become weights through the stored log-sum-exp.
//
//     dq      a warp has queries of one head, the block the keys; also delta = sum over P of out * grad_out - grad_lse
//     dk, dv  a warp has keys, and meets the queries of all heads of the group
//
// Gradients are staged in float, so that the rotary embedding is undone before the one rounding.
#include "window_attention_seen.cuh"

namespace linmu {
namespace {

constexpr int kMaxWarps = 8;

template <class T, int D>
struct Shape {
  static constexpr int kPitch = padded<T>(D), kStage = D + 4;
  static constexpr int64_t kRow = kPitch * static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kInts = sizeof(int);

  // dq: rows of q and grad_out of a warp; they lie side by side, and become the stage.
  static constexpr int kQueries = sizeof(T) == 2 && D == 128 ? 32 : 16, kKeys = 32;
  static constexpr int64_t kPerKey = 2 * kRow + 2 * kInts;
  static constexpr int64_t kPerWarp = kQueries * (2 * kRow + 3 * kInts);

  // dk, dv: keys of a warp, k and v side by side; queries of a step, twice, so that the next come while these are used.
  static constexpr int kOwnKeys = 16, kStep = D <= 128 ? 32 : 16;
  static constexpr bool kTogether = D <= 128;  // both sums fit in registers
  static constexpr int64_t kPerKeyWarp = kOwnKeys * (2 * kRow + 2 * kInts);
  static constexpr int64_t kSteps = 2 * kStep * (2 * kRow + 4 * kInts);
};

template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps* kWarp, D <= 64 ? 2 : 1) dq_kernel(const __grid_constant__ WindowPlan s) {
  using Own = Shape<T, D>;
  constexpr int M = Own::kQueries, N = Own::kKeys, pitch = Own::kPitch;
  LINMU_SHARED(memory);
  const WindowAttentionParams& p = s.p;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t split = blockIdx.x % s.splits, pair = blockIdx.x / s.splits, group = pair % p.groups;
  const WindowSlots window = window_slots(p, pair / p.groups);
  const int share = static_cast<int>(p.heads / p.groups);

  T* k_tile = reinterpret_cast<T*>(memory);
  T* v_tile = k_tile + s.keys * pitch;
  T* q_tiles = v_tile + s.keys * pitch;
  T *q_tile = q_tiles + warp * 2 * M * pitch, *grad_tile = q_tile + M * pitch;
  int* key_tokens = reinterpret_cast<int*>(q_tiles + warps * 2 * M * pitch);
  int* key_coords = key_tokens + s.keys;
  int* tokens = key_coords + s.keys + warp * 3 * M;
  int* coords = tokens + M;
  float* deltas = reinterpret_cast<float*>(coords + M);

  const int items = (window.count + M - 1) / M * share;
  bool resident = false;
  for (int round = split * warps; round < items; round += s.splits * warps) {
    const int item = round + warp, head = static_cast<int>(group) * share + item % share;
    const bool active = item < items;
    const int first = item / share * M;
    float lse[M / 8];
    if (active) {
      sync_warp();
      read_slots(p, window, first, M, tokens, coords, lane, kWarp);
      sync_warp();
      gather(s, q_tile, M, D, tokens, s.q, head, true, lane, kWarp);
      gather(s, grad_tile, M, D, tokens, s.grad_out, head, false, lane, kWarp);
      read_lse<T>(lse, p, window, first, head, tokens);
    }
    Accumulator<M, D> dq;
    dq.clear();
    bool ready = false;

    for (int k0 = 0; k0 < window.count; k0 += s.keys) {
      const int rows = load_keys(s, window, k0, group, D, k_tile, v_tile, key_tokens, key_coords, resident);
      if (!active) continue;
      if (!ready) {
        out_dot_grad<RowPlace, T, D>(s, deltas, tokens, grad_tile, M, 0, M, head);
        sync_warp();
        for (int r = lane; r < M; r += kWarp) {
          const int64_t at = (window.begin + first + r) * p.heads + head;
          // The log-sum-exp's gradient by a score is the score's weight, as delta's factor is.
          if (s.grad_lse && tokens[r] >= 0) deltas[r] -= s.grad_lse[at];
          if (first + r < window.count) s.delta[at] = deltas[r];
        }
        sync_warp();
        ready = true;
      }

      for (int j = 0; j < rows; j += N) {
        const int parts = (rows - j < N ? rows - j : N) / 16;
        Accumulator<M, N> ds, dp;
        ds.clear(), dp.clear();
        multiply<Major::K, Major::K>(ds, q_tile, pitch, k_tile + j * pitch, pitch, D, parts);
        multiply<Major::K, Major::K>(dp, grad_tile, pitch, v_tile + j * pitch, pitch, D, parts);
        to_exponents<T, false>(ds, p, head, tokens, coords, key_tokens + j, key_coords + j);
        score_gradients<T>(ds, dp, lse, deltas);
        multiply_registers(dq, ds, k_tile + j * pitch, pitch, parts);
      }
    }
    if (!active) continue;
    sync_warp();
    float* stage = reinterpret_cast<float*>(q_tile);
    to_stage(stage, Own::kStage, dq, static_cast<float>(p.scale));
    sync_warp();
    if (p.causal && any_broken(dq)) redo_dq<T>(s, window, first, M, head, stage, Own::kStage);
    store_stage<T>(p, s.dq, p.heads, head, stage, Own::kStage, M, D, tokens, true, s.out.fast);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1) dkv_kernel(const __grid_constant__ WindowPlan s) {
  using Own = Shape<T, D>;
  constexpr int M = Own::kOwnKeys, N = Own::kStep, pitch = Own::kPitch, kPasses = Own::kTogether ? 1 : 2;
  LINMU_SHARED(memory);
  const WindowAttentionParams& p = s.p;
  const int threads = blockDim.x, warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t split = blockIdx.x % s.splits, pair = blockIdx.x / s.splits, group = pair % p.groups;
  const WindowSlots window = window_slots(p, pair / p.groups);
  const int share = static_cast<int>(p.heads / p.groups), blocks = (window.count + N - 1) / N;

  // Of each of the two steps: q, grad_out; tokens, coordinates, lse, delta.
  T* steps = reinterpret_cast<T*>(memory);
  T* key_tiles = steps + 2 * 2 * N * pitch;
  T *k_tile = key_tiles + warp * 2 * M * pitch, *v_tile = k_tile + M * pitch;
  int* step_ints = reinterpret_cast<int*>(key_tiles + warps * 2 * M * pitch);
  int *tokens = step_ints + 2 * 4 * N + warp * 2 * M, *coords = tokens + M;

  const int count = share * blocks;  // steps
  const auto head_of = [&](int step) { return static_cast<int>(group) * share + step / blocks; };
  const auto fetch = [&](int step) {
    if (step >= count) return;
    int* ints = step_ints + step % 2 * 4 * N;
    T* rows = steps + step % 2 * 2 * N * pitch;
    float *lse = reinterpret_cast<float*>(ints + 2 * N), *deltas = lse + N;
    const int head = head_of(step), first = step % blocks * N;
    read_slots(p, window, first, N, ints, ints + N, threadIdx.x, threads);
    for (int i = threadIdx.x; i < N; i += threads) {
      const bool inside = first + i < window.count;
      const int64_t at = (window.begin + first + i) * p.heads + head;
      lse[i] = inside ? exponent<T>(static_cast<const float*>(p.lse)[at]) : INFINITY;
      deltas[i] = inside ? s.delta[at] : 0.f;
    }
    __syncthreads();
    gather(s, rows, N, D, ints, s.q, head, true, threadIdx.x, threads);
    gather(s, rows + N * pitch, N, D, ints, s.grad_out, head, false, threadIdx.x, threads);
  };

  for (int block = split; block * warps * M < window.count; block += s.splits) {
    const int first = (block * warps + warp) * M;
    __syncthreads();
    read_slots(p, window, first, M, tokens, coords, lane, kWarp);
    sync_warp();
    gather(s, k_tile, M, D, tokens, s.k, group, true, lane, kWarp);
    gather(s, v_tile, M, D, tokens, s.v, group, false, lane, kWarp);
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool last = pass == kPasses - 1;
      Accumulator<M, D> dk;
      Accumulator<M, Own::kTogether ? D : 16> dv;  // in a pass of its own, dv is summed in dk's place
      dk.clear(), dv.clear();
      fetch(0);
      copy_commit();
      for (int step = 0; step < count; ++step) {
        copy_wait<0>();
        __syncthreads();  // this step has come, and the one before is done with
        fetch(step + 1);
        copy_commit();
        if (first >= window.count) continue;
        const int* ints = step_ints + step % 2 * 4 * N;
        const T *q_tile = steps + step % 2 * 2 * N * pitch, *grad_tile = q_tile + N * pitch;
        const float *lse = reinterpret_cast<const float*>(ints + 2 * N), *deltas = lse + N;
        const int left = window.count - step % blocks * N;
        const int parts = left < N ? (left + 15) / 16 : N / 16;
        Accumulator<M, N> weights;
        weights.clear();
        multiply<Major::K, Major::K>(weights, k_tile, pitch, q_tile, pitch, D, parts);
        to_exponents<T, true>(weights, p, head_of(step), tokens, coords, ints, ints + N);
        weights.each([&](float& x, int, int column) { x = ints[column] < 0 ? 0.f : power<T>(x - lse[column]); });
        if constexpr (Own::kTogether)
          multiply_registers(dv, weights, grad_tile, pitch, parts);
        else if (!last)
          multiply_registers(dk, weights, grad_tile, pitch, parts);
        if (!last) continue;
        Accumulator<M, N> dp;
        dp.clear();
        multiply<Major::K, Major::K>(dp, v_tile, pitch, grad_tile, pitch, D, parts);
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) weights.v[0][j][e] *= dp.v[0][j][e] - deltas[j * 8 + lane_column() + e % 2];
        multiply_registers(dk, weights, q_tile, pitch, parts);
      }
      if (first < window.count) {
        float* stage = reinterpret_cast<float*>(k_tile);
        const int P = static_cast<int>(p.head_dim);
        const auto store_dv = [&](float x, float y, int row, int column) {
          if (tokens[row] < 0 || column >= P) return;
          store_pair(static_cast<T*>(s.dv) + (static_cast<int64_t>(tokens[row]) * p.groups + group) * P + column, x, y,
                     P - column);
        };
        const bool broken = p.causal && (any_broken(dk) | any_broken(dv));
        if constexpr (Own::kTogether) dv.each_pair(store_dv);
        if (!last) {
          dk.each_pair(store_dv);
          if (broken) redo_dkv<T>(s, window, first, M, group, nullptr, 0);
        } else {
          sync_warp();
          to_stage(stage, Own::kStage, dk, static_cast<float>(p.scale));
          sync_warp();
          if (broken) redo_dkv<T>(s, window, first, M, group, stage, Own::kStage);
          store_stage<T>(p, s.dk, p.groups, group, stage, Own::kStage, M, D, tokens, true, s.out.fast);
        }
      }
      __syncthreads();
    }
  }
}

template <class T, int D>
void backward(WindowPlan s, const CudaContext& context) {
  using Own = Shape<T, D>;
  const WindowAttentionParams& p = s.p;
  const int64_t expected = expected_tokens(p), limit = shared_limit(), pairs = p.num_windows * p.groups;
  const int64_t share = p.heads / p.groups;

  const int64_t items = ceil_div(expected, Own::kQueries) * share;
  int64_t warps = std::min<int64_t>(items, kMaxWarps);
  const int64_t wanted = ceil_div(expected, Own::kKeys) * Own::kKeys;
  const auto fitting = [&] { return (limit - warps * Own::kPerWarp) / Own::kPerKey / Own::kKeys * Own::kKeys; };
  while (warps > 1 && fitting() < std::min<int64_t>(wanted, 128)) warps = (warps + 1) / 2;
  s.keys = static_cast<int>(std::max<int64_t>(Own::kKeys, std::min(wanted, fitting())));
  s.splits = static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / pairs, 1, ceil_div(items, warps)));
  launch("window_attention_bwd", dq_kernel<T, D>, blocks_of(pairs * s.splits), static_cast<int>(warps * kWarp),
         s.keys * Own::kPerKey + warps * Own::kPerWarp, context, s);

  const int64_t key_blocks = ceil_div(expected, Own::kOwnKeys);
  warps = std::min<int64_t>(key_blocks, kMaxWarps);
  while (warps > 1 && warps * Own::kPerKeyWarp + Own::kSteps > limit) --warps;
  s.splits = static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / pairs, 1, ceil_div(key_blocks, warps)));
  launch("window_attention_bwd", dkv_kernel<T, D>, blocks_of(pairs * s.splits), static_cast<int>(warps * kWarp),
         warps * Own::kPerKeyWarp + Own::kSteps, context, s);
}

}  // namespace

void window_attention_bwd_cuda(const WindowAttentionBwdParams& b, const CudaContext& context) {
  const WindowAttentionParams& p = b.forward;
  WindowPlan s = plan_window(p);
  s.grad_out = gathered(p, b.grad_out);
  s.grad_lse = static_cast<const float*>(b.grad_lse);
  s.dq = b.dq, s.dk = b.dk, s.dv = b.dv;
  if (p.heads > 0) zero_uncovered(s, true, context);
  if (p.num_visual > 0 && p.heads > 0) {
    s.delta = static_cast<float*>(context.allocate(p.num_visual * p.heads * static_cast<int64_t>(sizeof(float))));
    if (!window_attention_bwd_sm90(s, context))
      dispatch_cuda("window_attention", p.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        with_head_dim(p.head_dim, [&](auto d) { backward<T, d()>(s, context); });
      });
  }
  if (b.dbias) window_bias_gradient(s, static_cast<float*>(b.dbias), context);
}

}  // namespace linmu
