// Gradient of the bias of window_attention: the gradients of all scores, by relative position. One block per (part of
// the windows, head). Within a warp a query's keys fall on different entries of the table, so the lanes can add them
// side by side (in turn where a caller's table has two keys in one place); queries follow each other, each warp has a
// table of its own, and tables are added in order.
#include "window_attention_bwd.cuh"

namespace linmu {
namespace {

constexpr int kMaxWarps = 4;
constexpr int kQueries = 16, kKeys = 32, kStage = kKeys + 1;  // of a warp at a time
constexpr int kReduceThreads = 128;

struct BiasPlan {
  int64_t parts;
  int columns;    // P rounded up to 32
  bool shared;    // whether the warps' tables lie in shared memory
  float* tables;  // (parts, H, warps, bias_size) else
  float* sums;    // (parts, H, bias_size)

  template <class T>
  int64_t per_key() const {
    return 2 * padded<T>(columns) * static_cast<int64_t>(sizeof(T)) + 8;
  }
  template <class T>
  int64_t per_warp() const {
    return kQueries * (2 * padded<T>(columns) * static_cast<int64_t>(sizeof(T)) + 12 + 4 * kStage);
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2)
    dbias_kernel(const __grid_constant__ WindowPlan s, const __grid_constant__ BiasPlan o) {
  constexpr int M = kQueries, N = kKeys;
  LINMU_SHARED(memory);
  const WindowAttentionParams& p = s.p;
  const int threads = blockDim.x, warps = threads / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int pitch = padded<T>(o.columns);
  const int64_t part = blockIdx.x / p.heads, head = blockIdx.x % p.heads, group = head / (p.heads / p.groups);
  const int64_t size = p.bias_size;

  T* k_tile = reinterpret_cast<T*>(memory);
  T* v_tile = k_tile + s.keys * pitch;
  T* q_tiles = v_tile + s.keys * pitch;
  T *q_tile = q_tiles + warp * 2 * M * pitch, *grad_tile = q_tile + M * pitch;
  int* key_tokens = reinterpret_cast<int*>(q_tiles + warps * 2 * M * pitch);
  int* key_coords = key_tokens + s.keys;
  int* tokens = key_coords + s.keys + warp * M * (3 + kStage);
  int* coords = tokens + M;
  float *deltas = reinterpret_cast<float*>(coords + M), *stage = deltas + M;
  float* tables = o.shared ? reinterpret_cast<float*>(key_coords + s.keys + warps * M * (3 + kStage))
                           : o.tables + blockIdx.x * warps * size;
  float* table = tables + warp * size;
  for (int64_t i = lane; i < size; i += kWarp) table[i] = 0.f;

  for (int64_t w = part; w < p.num_windows; w += o.parts) {
    const WindowSlots window = window_slots(p, w);
    for (int k0 = 0; k0 < window.count; k0 += s.keys) {
      const int here = window.count - k0 < s.keys ? window.count - k0 : s.keys, rows = (here + 15) / 16 * 16;
      __syncthreads();
      read_slots(p, window, k0, s.keys, key_tokens, key_coords, threadIdx.x, threads);
      __syncthreads();
      gather(s, k_tile, rows, o.columns, key_tokens, s.k, group, true, threadIdx.x, threads);
      gather(s, v_tile, rows, o.columns, key_tokens, s.v, group, false, threadIdx.x, threads);
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      for (int first = warp * M; first < window.count; first += warps * M) {
        sync_warp();
        read_slots(p, window, first, M, tokens, coords, lane, kWarp);
        for (int r = lane; r < M; r += kWarp)
          deltas[r] = first + r < window.count ? s.delta[(window.begin + first + r) * p.heads + head] : 0.f;
        sync_warp();
        gather(s, q_tile, M, o.columns, tokens, s.q, head, true, lane, kWarp);
        gather(s, grad_tile, M, o.columns, tokens, s.grad_out, head, false, lane, kWarp);
        float lse[M / 8];
        read_lse<T>(lse, p, window, first, head, tokens);
        copy_commit();
        copy_wait<0>();
        sync_warp();
        for (int j = 0; j < rows; j += N) {
          const int parts = (rows - j < N ? rows - j : N) / 16;
          Accumulator<M, N> ds, dp;
          ds.clear(), dp.clear();
          multiply<Major::K, Major::K>(ds, q_tile, pitch, k_tile + j * pitch, pitch, o.columns, parts);
          multiply<Major::K, Major::K>(dp, grad_tile, pitch, v_tile + j * pitch, pitch, o.columns, parts);
          to_exponents<T, false>(ds, p, head, tokens, coords, key_tokens + j, key_coords + j);
          score_gradients<T>(ds, dp, lse, deltas);
          sync_warp();
          ds.each([&](float& x, int row, int column) { stage[row * kStage + column] = x; });
          sync_warp();
          const int key = key_tokens[j + lane], coord = key_coords[j + lane];
          const bool apart = all_differ(key >= 0 ? coord : (int64_t{1} << 40) + lane);
          for (int r = 0; r < M && first + r < window.count; ++r) {
            const int64_t at = bias_index(p, coords[r], coord);
            const bool seen = at >= 0 && tokens[r] >= 0 && key >= 0 && !(p.causal && key > tokens[r]);
            for (int turn = apart ? kWarp - 1 : 0; turn < kWarp; ++turn) {
              add_apart(seen && (apart || turn == lane) ? table + at : nullptr, stage[r * kStage + lane]);
              sync_warp();
            }
          }
        }
      }
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < size; i += threads) {
    float sum = 0.f;
    for (int k = 0; k < warps; ++k) sum += tables[k * size + i];
    o.sums[blockIdx.x * size + i] = sum;
  }
}

__global__ void reduce_kernel(const float* sums, int64_t parts, int64_t count, float* dbias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[part * count + i];
  dbias[i] = static_cast<float>(sum);
}

}  // namespace

void window_bias_gradient(const WindowPlan& plan, float* dbias, const CudaContext& context) {
  const WindowAttentionParams& p = plan.p;
  const int64_t count = p.heads * p.bias_size, table = p.bias_size * static_cast<int64_t>(sizeof(float));
  if (count == 0) return;
  BiasPlan o{};
  // Parts enough to fill a chip, unless their tables took more than 64 MiB.
  const int64_t most = std::max<int64_t>(1, (int64_t{64} << 20) / (p.heads * kMaxWarps * table));
  o.parts = p.num_visual == 0 ? 0 : std::min({p.num_windows, ceil_div(2 * kEnoughBlocks, p.heads), most});
  o.columns = round_to(p.head_dim, 32);
  o.sums = static_cast<float*>(context.allocate(std::max<int64_t>(1, o.parts * count) * sizeof(float)));
  dispatch_cuda("window_attention", p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    WindowPlan s = plan;
    const int64_t limit = shared_limit(), own = o.per_warp<T>();
    int64_t warps = kMaxWarps;
    while (warps > 1 && warps * own + kKeys * o.per_key<T>() > limit) --warps;
    o.shared = warps * (own + table) + kKeys * o.per_key<T>() <= std::min<int64_t>(limit, 96 * 1024);
    if (!o.shared)
      o.tables = static_cast<float*>(context.allocate(std::max<int64_t>(1, o.parts * p.heads) * warps * table));
    const int64_t taken = warps * (own + (o.shared ? table : 0));
    const int64_t wanted = ceil_div(expected_tokens(p), kKeys) * kKeys;
    const int64_t fitting = (limit - taken) / o.per_key<T>() / kKeys * kKeys;
    s.keys = static_cast<int>(std::max<int64_t>(kKeys, std::min(wanted, fitting)));
    launch("window_attention_bwd", dbias_kernel<T>, blocks_of(o.parts * p.heads), static_cast<int>(warps * kWarp),
           taken + s.keys * o.per_key<T>(), context, s, o);
  });
  launch("window_attention_bwd", reduce_kernel, blocks_of(ceil_div(count, kReduceThreads)), kReduceThreads, 0, context,
         o.sums, o.parts, count, dbias);
}

}  // namespace linmu
