// Forward of window_attention. See window_attention.cuh. A warp takes one block of queries of one head at a time, over
// all keys, with a running maximum (Dao et al. 2022, arXiv:2205.14135). Where a window's keys do not fit in shared
// memory they come in parts, and the block's warps stay in step.
#include "window_attention_seen.cuh"

namespace linmu {
namespace {

constexpr int kMaxWarps = 8;

template <class T, int D>
struct Shape {
  // A warp's queries at a time, and the keys of a step: at D=128 what registers allow, so that a key read from shared
  // memory meets many queries; below, less, so that two blocks share a multiprocessor.
  static constexpr int kQueries = sizeof(T) == 2 && D == 128 ? 32 : 16;
  static constexpr int kKeys = D <= 32 ? 64 : 32;
  static constexpr int kPitch = padded<T>(D);

  static constexpr int64_t kPerKey = 2 * kPitch * static_cast<int64_t>(sizeof(T)) + 2 * sizeof(int);
  static constexpr int64_t kPerWarp = kQueries * (kPitch * static_cast<int64_t>(sizeof(T)) + 2 * sizeof(int));
};

template <class T, int D>
__global__ void __launch_bounds__(kMaxWarps* kWarp, D <= 64 ? 2 : 1)
    forward_kernel(const __grid_constant__ WindowPlan s) {
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
  T* q_tile = q_tiles + warp * M * pitch;
  int* key_tokens = reinterpret_cast<int*>(q_tiles + warps * M * pitch);
  int* key_coords = key_tokens + s.keys;
  int* tokens = key_coords + s.keys + warp * 2 * M;
  int* coords = tokens + M;

  // Warps that work at the same time take the same queries of different heads: those read the same angles.
  const int items = (window.count + M - 1) / M * share;
  bool resident = false;
  for (int round = split * warps; round < items; round += s.splits * warps) {
    const int item = round + warp, head = static_cast<int>(group) * share + item % share;
    const bool active = item < items;
    const int first = item / share * M;
    if (active) {
      sync_warp();
      read_slots(p, window, first, M, tokens, coords, lane, kWarp);
      sync_warp();
      gather(s, q_tile, M, D, tokens, s.q, head, true, lane, kWarp);
    }
    Accumulator<M, D> out;
    OnlineSoftmax<T, M> softmax;
    out.clear();

    for (int k0 = 0; k0 < window.count; k0 += s.keys) {
      const int rows = load_keys(s, window, k0, group, D, k_tile, v_tile, key_tokens, key_coords, resident);
      if (!active) continue;

      for (int j = 0; j < rows; j += N) {
        const int parts = (rows - j < N ? rows - j : N) / 16;
        Accumulator<M, N> scores;
        scores.clear();
        multiply<Major::K, Major::K>(scores, q_tile, pitch, k_tile + j * pitch, pitch, D, parts);
        to_exponents<T, false>(scores, p, head, tokens, coords, key_tokens + j, key_coords + j);
        float rescale[M / 8];
        if (softmax.step(scores, rescale)) multiply_rows(out, rescale);
        multiply_registers(out, scores, v_tile + j * pitch, pitch, parts);
      }
    }
    if (!active) continue;

    softmax.finish(p, window, first, head);
    float inverse[M / 8];
#pragma unroll
    for (int r = 0; r < M / 8; ++r) inverse[r] = softmax.inverse(r);
    multiply_rows(out, inverse);
    sync_warp();
    out.each_pair([&](float x, float y, int row, int column) { store_pair(q_tile + row * pitch + column, x, y, 2); });
    sync_warp();
    constexpr int V = kVec<T>;
    for (int i = lane; i < M * (D / V); i += kWarp) {
      const int r = i / (D / V), c = i % (D / V) * V;
      store_out(s, tokens[r], head, c, q_tile + r * pitch + c);
    }
    if (p.causal && any_broken(out)) redo_out<T>(s, window, first, M, head);
  }
}

__global__ void clear_kernel(unsigned char* covered, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) covered[i] = 0;
}
__global__ void mark_kernel(const __grid_constant__ WindowPlan s, unsigned char* covered) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= s.p.num_visual) return;
  const int token = window_token(s.p, slot);
  if (token >= 0) covered[token] = 1;
}
// One block per token.
template <class T>
__global__ void zero_kernel(const __grid_constant__ WindowPlan s, const unsigned char* covered, bool gradients) {
  const int64_t token = blockIdx.x, q = s.p.heads * s.p.head_dim, k = s.p.groups * s.p.head_dim;
  if (covered[token]) return;
  T* rows = static_cast<T*>(gradients ? s.dq : s.p.out) + token * q;
  for (int64_t i = threadIdx.x; i < q; i += blockDim.x) rows[i] = T{};
  for (int64_t i = threadIdx.x; gradients && i < k; i += blockDim.x)
    static_cast<T*>(s.dk)[token * k + i] = static_cast<T*>(s.dv)[token * k + i] = T{};
}

template <class T, int D>
void forward(const WindowAttentionParams& p, const CudaContext& context) {
  using Own = Shape<T, D>;
  WindowPlan s = plan_window(p);
  const int64_t expected = expected_tokens(p), limit = shared_limit();
  const int64_t items = ceil_div(expected, Own::kQueries) * (p.heads / p.groups);
  int64_t warps = std::min<int64_t>(items, kMaxWarps);
  const int64_t wanted = ceil_div(expected, Own::kKeys) * Own::kKeys;
  const auto fitting = [&] { return (limit - warps * Own::kPerWarp) / Own::kPerKey / Own::kKeys * Own::kKeys; };
  while (warps > 1 && fitting() < std::min<int64_t>(wanted, 128)) warps = (warps + 1) / 2;
  s.keys = static_cast<int>(std::max<int64_t>(Own::kKeys, std::min(wanted, fitting())));
  const int64_t pairs = p.num_windows * p.groups;
  s.splits = static_cast<int>(std::clamp<int64_t>(kEnoughBlocks / pairs, 1, ceil_div(items, warps)));
  launch("window_attention", forward_kernel<T, D>, blocks_of(pairs * s.splits), static_cast<int>(warps * kWarp),
         s.keys * Own::kPerKey + warps * Own::kPerWarp, context, s);
}

}  // namespace

void zero_uncovered(const WindowPlan& plan, bool gradients, const CudaContext& context) {
  const WindowAttentionParams& p = plan.p;
  // A table as long as the tokens may still hold one of them twice, or none: only what is marked is covered.
  const int64_t count = p.batch * p.length;
  auto* covered = static_cast<unsigned char*>(context.allocate(count));
  constexpr int kThreads = 256;
  launch("window_attention", clear_kernel, blocks_of(ceil_div(count, kThreads)), kThreads, 0, context, covered, count);
  launch("window_attention", mark_kernel, blocks_of(ceil_div(p.num_visual, kThreads)), kThreads, 0, context, plan,
         covered);
  dispatch_cuda("window_attention", p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch("window_attention", zero_kernel<T>, blocks_of(count), 128, 0, context, plan, covered, gradients);
  });
}

void window_attention_cuda(const WindowAttentionParams& p, const CudaContext& context) {
  if (p.heads == 0) return;
  zero_uncovered(plan_window(p), false, context);
  if (p.num_visual == 0 || window_attention_sm90(p, context)) return;
  dispatch_cuda("window_attention", p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    with_head_dim(p.head_dim, [&](auto d) { forward<T, d()>(p, context); });
  });
}

}  // namespace linmu
