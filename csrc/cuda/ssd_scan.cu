// The scan's output. See ssd_scan.cuh. One block per (chunk, head):
//
//     Y = M X + sum over directions of [arrive] (C h),     M = sum of weight_i exp(S_i - S_j) dt_j C_i.B_j,     + D X
//
// M is one matrix for both directions: the forward one lies on and below the diagonal, the reverse one on and above it.
// With projections of its own the reverse direction costs no further product away from the diagonal.
#include <algorithm>

#include "ssd_scan_output.cuh"

namespace linmu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 32, kColumns = 16;  // of a warp's products

// Where things lie in shared memory, in bytes.
struct OutputTiles {
  int64_t tokens, segments, visits, c, b, m, x, bytes;

  template <class T>
  __host__ __device__ static constexpr OutputTiles of(int chunk, int state_dim, int columns, bool separate) {
    const int64_t row = padded<T>(state_dim) * static_cast<int64_t>(sizeof(T)), sets = separate ? 2 : 1;
    // The states take the place of B when M is done.
    const int64_t b_rows = sets * chunk > 2 * columns ? sets * chunk : 2 * columns;
    OutputTiles t{};
    t.visits = 0;
    t.segments = t.visits + 2 * chunk * static_cast<int64_t>(sizeof(Visit));
    t.tokens = t.segments + 2 * chunk * static_cast<int64_t>(sizeof(int));
    t.c = t.tokens + chunk * static_cast<int64_t>(sizeof(int));
    t.b = t.c + sets * chunk * row;
    t.m = t.b + b_rows * row;
    t.x = t.m + chunk * padded<T>(chunk) * static_cast<int64_t>(sizeof(T));
    t.bytes = t.x + chunk * padded<T>(columns) * static_cast<int64_t>(sizeof(T));
    return t;
  }
};
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    output_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Output o) {
  LINMU_SHARED(memory);
  const SsdScanParams& p = s.p;
  const int Q = s.chunk, tid = threadIdx.x, warp = tid / kWarp;
  const int64_t P = p.head_dim, N = p.state_dim, H = p.heads;
  const int64_t c = blockIdx.x % s.chunks, bh = blockIdx.x / s.chunks, b = bh / H, h = bh % H;
  const OutputTiles tiles = OutputTiles::of<T>(Q, o.state_dim, o.columns, o.separate);
  Visit* visits = reinterpret_cast<Visit*>(memory + tiles.visits);
  int* segments = reinterpret_cast<int*>(memory + tiles.segments);
  int* tokens = reinterpret_cast<int*>(memory + tiles.tokens);
  T* c_tile = reinterpret_cast<T*>(memory + tiles.c);
  T* b_tile = reinterpret_cast<T*>(memory + tiles.b);
  T* m_tile = reinterpret_cast<T*>(memory + tiles.m);
  T* x_tile = reinterpret_cast<T*>(memory + tiles.x);
  const int pitch = padded<T>(o.state_dim), pitch_m = padded<T>(Q), pitch_x = padded<T>(o.columns);
  const int64_t size = static_cast<int64_t>(Q) * pitch;  // of a tile of B or C
  const int first = p.forward.on ? 0 : 1, last = p.reverse.on ? 1 : 0;

  read_visits(s, Q, b, h, c, first, last, tokens, segments, visits, tid, kThreads);
  __syncthreads();
  const T* x = group_of<T>(p.x, p.groups_x, b, h, H);
  const auto load_x = [&](int64_t p0) {
    load_tile<T>(x_tile, Q, o.columns, P - p0, o.fast_x,
                 [&](int r) { return tokens[r] < 0 ? nullptr : x + tokens[r] * p.x.token_stride + p0; });
  };
  for (int d = first; d <= (o.separate ? last : first); ++d) {
    const SsdScanDirection& of = s.direction(d);
    const T *B = group_of<T>(of.B, p.groups_b, b, h, H), *C = group_of<T>(of.C, p.groups_c, b, h, H);
    const int64_t at = o.separate ? d * size : 0;
    load_tile<T>(b_tile + at, Q, o.state_dim, N, o.fast_b[d],
                 [&](int r) { return tokens[r] < 0 ? nullptr : B + tokens[r] * of.B.token_stride; });
    load_tile<T>(c_tile + at, Q, o.state_dim, N, o.fast_c[d],
                 [&](int r) { return tokens[r] < 0 ? nullptr : C + tokens[r] * of.C.token_stride; });
  }
  load_x(0);
  copy_commit();
  copy_wait<0>();
  __syncthreads();

  for (int tile = warp; tile < Q / kRows * (Q / kColumns); tile += kWarps) {
    const int i0 = tile / (Q / kColumns) * kRows, j0 = tile % (Q / kColumns) * kColumns;
    Accumulator<kRows, kColumns> scores, m;
    m.clear();
    bool scored = false;
    for (int d = first; d <= last; ++d) {
      if (d ? j0 + kColumns <= i0 : j0 >= i0 + kRows) continue;
      if (!scored || o.separate) {
        const int64_t at = o.separate ? d * size : 0;
        scores.clear();
        multiply<Major::K, Major::K>(scores, c_tile + at + i0 * pitch, pitch, b_tile + at + j0 * pitch, pitch,
                                     o.state_dim);
        scored = true;
      }
      each_pair_of_visits<kRows, kColumns>(visits + d * Q, segments + d * Q, d == 1, i0, j0,
                                           [&](int k, int l, int, const Visit& to, int, const Visit& from, bool on) {
                                             m.v[k / 2][l / 2][k % 2 * 2 + l % 2] +=
                                                 scores.v[k / 2][l / 2][k % 2 * 2 + l % 2] *
                                                 (decay(to, from, on) * from.step * to.weight);
                                           });
    }
    m.each_pair([&](float u, float v, int i, int j) { store_pair(m_tile + (i0 + i) * pitch_m + j0 + j, u, v, 2); });
  }
  __syncthreads();

  const int across = o.columns / kColumns;
  for (int64_t p0 = 0; p0 < P; p0 += o.columns) {
    if (p0 > 0) load_x(p0);
    for (int d = first; d <= last; ++d) {
      const T* state = static_cast<const T*>(o.entering[d]) + ((bh * s.chunks + c) * P + p0) * N;
      load_tile<T>(b_tile + d * static_cast<int64_t>(o.columns) * pitch, o.columns, o.state_dim, N, o.fast_state,
                   [&](int r) { return p0 + r < P ? state + r * N : nullptr; });
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    for (int tile = warp; tile < Q / kRows * across; tile += kWarps) {
      const int i0 = tile / across * kRows, j0 = tile % across * kColumns;
      Accumulator<kRows, kColumns> y, carried;
      y.clear();
      multiply<Major::K, Major::MN>(y, m_tile + i0 * pitch_m, pitch_m, x_tile + j0, pitch_x, Q);
      for (int d = first; d <= last; ++d) {
        carried.clear();
        multiply<Major::K, Major::K>(carried, c_tile + (o.separate ? d * size : 0) + i0 * pitch, pitch,
                                     b_tile + (d * static_cast<int64_t>(o.columns) + j0) * pitch, pitch, o.state_dim);
        const float scale = state_scale<T>(o, d, bh * s.chunks + c);
#pragma unroll
        for (int k = 0; k < kRows / 8; ++k) {
          const int i = i0 + k / 2 * 16 + k % 2 * 8 + lane_row();
          const Visit to = visits[d * Q + i];
          const float arrive = decay(to, segments[d * Q + i] == 0) * to.weight * scale;
#pragma unroll
          for (int l = 0; l < kColumns / 4; ++l)
            y.v[k / 2][l / 2][k % 2 * 2 + l % 2] += arrive * carried.v[k / 2][l / 2][k % 2 * 2 + l % 2];
        }
      }
      const float skip = p.D ? static_cast<const float*>(p.D)[h] : 0.f;
      y.each_pair([&](float u, float v, int i, int j) {
        const int token = tokens[i0 + i];
        const int64_t column = p0 + j0 + j;
        if (token < 0 || column >= P) return;
        if (p.D) {
          const T* at = x_tile + (i0 + i) * pitch_x + j0 + j;
          u += skip * to_float(at[0]), v += skip * to_float(at[1]);
        }
        store_pair(static_cast<T*>(p.y) + ((b * p.length + token) * H + h) * P + column, u, v, P - column);
      });
    }
    __syncthreads();
  }
}

// The output of a chunk that holds something odd, by the definition.
template <class T>
__device__ inline void exact_chunk(const ScanPlan& s, const Output& o, int64_t b, int64_t h, int64_t c,
                                   unsigned char* memory) {
  const SsdScanParams& p = s.p;
  const int Q = s.chunk, tid = threadIdx.x;
  const int64_t P = p.head_dim, N = p.state_dim, H = p.heads, bh = b * H + h;
  const int32_t* tokens = s.tokens + s.rows(b, c);
  float* pairs = reinterpret_cast<float*>(memory);  // of visit i with each other; meaningless where not seen
  int *seen = reinterpret_cast<int*>(pairs + Q), *spoiled = seen + Q;
  if (tid == 0) *spoiled = s.spoiled[bh * s.chunks + c];
  __syncthreads();
  if (p.reverse.mask) {  // what a masked visit asks for may be odd too
    const T* C = group_of<T>(p.reverse.C, p.groups_c, b, h, H);
    for (int64_t k = tid; k < Q * N; k += kThreads) {
      const int token = tokens[k / N];
      if (token < 0 || p.reverse.mask[b * p.length + token]) continue;
      if (odd(to_float(C[token * p.reverse.C.token_stride + k % N]))) *spoiled = 1;
    }
    __syncthreads();
  }
  if (!*spoiled) return;
  const T* x = group_of<T>(p.x, p.groups_x, b, h, H);
  for (int i = 0; i < Q; ++i) {
    const int token = tokens[i];
    if (token < 0) continue;
    __syncthreads();
    for (int j = tid; j < Q; j += kThreads) {
      float sum = 0.f;
      seen[j] = 0;
      for (int d = 0; d < 2; ++d) {
        const SsdScanDirection& of = s.direction(d);
        if (!of.on || tokens[j] < 0 || (d ? j < i : j > i)) continue;
        const int32_t* segments = s.segments[d] + s.rows(b, c);
        const Visit to = s.visits[d][s.rows(b, h, c) + i], from = s.visits[d][s.rows(b, h, c) + j];
        if (segments[i] != segments[j] || to.weight == 0.f || from.step == 0.f) continue;
        const T* B = group_of<T>(of.B, p.groups_b, b, h, H) + tokens[j] * of.B.token_stride;
        const T* C = group_of<T>(of.C, p.groups_c, b, h, H) + token * of.C.token_stride;
        float score = 0.f;
        for (int64_t n = 0; n < N; ++n) score += to_float(C[n]) * to_float(B[n]);
        sum += score * (decay(to, from, true) * from.step * to.weight);
        seen[j] = 1;
      }
      pairs[j] = sum;
    }
    __syncthreads();
    for (int64_t k = tid; k < P; k += kThreads) {
      float y = p.D ? static_cast<const float*>(p.D)[h] * to_float(x[token * p.x.token_stride + k]) : 0.f;
      for (int j = 0; j < Q; ++j)
        if (seen[j]) y += pairs[j] * to_float(x[tokens[j] * p.x.token_stride + k]);
      for (int d = 0; d < 2; ++d) {
        if (!s.direction(d).on) continue;
        const Visit to = s.visits[d][s.rows(b, h, c) + i];
        if (s.segments[d][s.rows(b, c) + i] != 0 || to.weight == 0.f) continue;
        const SsdScanTensor& of = s.direction(d).C;
        const T* C = group_of<T>(of, p.groups_c, b, h, H) + token * of.token_stride;
        const T* state = static_cast<const T*>(o.entering[d]) + ((bh * s.chunks + c) * P + k) * N;
        float carried = 0.f;
        for (int64_t n = 0; n < N; ++n) carried += to_float(C[n]) * to_float(state[n]);
        y += decay(to, true) * to.weight * state_scale<T>(o, d, bh * s.chunks + c) * carried;
      }
      static_cast<T*>(p.y)[((b * p.length + token) * H + h) * P + k] = from_float<T>(y);
    }
  }
}

// Blocks (head, of kExactBlocks that share its chunks): mostly there is nothing to do, and that soon.
constexpr int64_t kExactBlocks = 64;
template <class T>
__global__ void __launch_bounds__(kThreads)
    exact_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Output o) {
  LINMU_SHARED(memory);
  const int64_t bh = blockIdx.x;
  if (s.redo && !s.redo[bh]) return;
  for (int64_t c = blockIdx.y; c < s.chunks; c += gridDim.y) {
    __syncthreads();
    exact_chunk<T>(s, o, bh / s.p.heads, bh % s.p.heads, c, memory);
  }
}

template <class T>
void make_exact(const ScanPlan& s, const Output& o, const CudaContext& context) {
  const dim3 blocks(static_cast<unsigned>(s.p.head_dim ? s.p.batch * s.p.heads : 0),
                    static_cast<unsigned>(std::min(s.chunks, kExactBlocks)));
  launch("ssd_scan", exact_kernel<T>, blocks, kThreads, (2 * s.chunk + 1) * static_cast<int64_t>(sizeof(int)), context,
         s, o);
}

static_assert(OutputTiles::of<bf16>(64, 128, 64, true).bytes <= kSharedSm80);
static_assert(OutputTiles::of<bf16>(128, 128, 64, false).bytes <= kSharedSm80);
static_assert(OutputTiles::of<bf16>(32, 256, 32, true).bytes <= kSharedSm80);
static_assert(OutputTiles::of<float>(32, 256, 32, true).bytes <= kSharedSm80);

// The largest chunk, and slice of P, whose tiles fit the shared memory of sm_80: 64 visits unless the caller wants
// others. The smallest may take all that this GPU has.
template <class T>
void fit(const SsdScanParams& p, bool separate, int& chunk, Output& o) {
  o.state_dim = round_to(std::max<int64_t>(p.state_dim, 1), 32);
  o.columns = p.head_dim > 32 ? 64 : 32;
  chunk = round_to(std::clamp<int64_t>(std::min(p.chunk > 0 ? p.chunk : 64, p.length), 1, 128), 32);
  const int64_t most = shared_limit(), limit = std::min(kSharedSm80, most);
  const auto bytes = [&] { return OutputTiles::of<T>(chunk, o.state_dim, o.columns, separate).bytes; };
  if (bytes() > limit) o.columns = 32;
  while (bytes() > limit && chunk > 32) chunk -= 32;
  check_shared("ssd_scan", bytes(), most);
}

}  // namespace

void redo_spoiled(const ScanPlan& s, const CudaContext& context) {
  Output o{};
  o.separate = s.p.forward.on && s.p.reverse.on && !s.p.shared_projections;
  Walk walks[2];
  int count = 0;
  for (int d = 0; d < 2; ++d) {
    if (!s.direction(d).on) continue;
    walks[count] = forward_walk(s, d, false, s.p.final_state != nullptr, context);
    o.entering[d] = walks[count++].entering;
  }
  walk_states(s, walks, count, context);
  make_exact<bf16>(s, o, context);
}

void ssd_scan_cuda(const SsdScanParams& p, const CudaContext& context) {
  if (ssd_scan_slices(p, context)) return;
  dispatch_cuda("ssd_scan", p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    Output o{};
    int chunk = 0;
    o.separate = p.forward.on && p.reverse.on && !p.shared_projections;
    const bool sm90 = plan_output_sm90(p, chunk, o);
    if (!sm90) fit<T>(p, o.separate, chunk, o);
    const ScanPlan s = plan_scan(p, chunk, context);
    Walk walks[2];
    int count = 0;
    for (int d = 0; d < 2; ++d) {
      if (!s.direction(d).on) continue;
      walks[count] = forward_walk(s, d, std::is_same_v<T, half16>, p.final_state != nullptr, context);
      o.entering[d] = walks[count++].entering;
      o.fast_b[d] = fast_rows(s.direction(d).B, p.state_dim, p.dtype);
      o.fast_c[d] = fast_rows(s.direction(d).C, p.state_dim, p.dtype);
    }
    o.fast_x = fast_rows(p.x, p.head_dim, p.dtype);
    o.fast_state = p.state_dim * element_size(p.dtype) % 16 == 0;
    walk_states(s, walks, count, context);
    const int64_t states = p.batch * p.heads * s.chunks;
    for (int d = 0; d < 2 && std::is_same_v<T, half16>; ++d) {
      if (!s.direction(d).on) continue;
      half16* halves = allocate<half16>(context, states * p.head_dim * p.state_dim);
      o.scale[d] = narrow_states(s, static_cast<const float*>(o.entering[d]), halves, context);
      o.entering[d] = halves;
    }
    const dim3 blocks = blocks_of(p.head_dim ? states : 0);
    if (sm90) {
      output_sm90(s, o, context);
    } else {
      const int64_t shared = OutputTiles::of<T>(chunk, o.state_dim, o.columns, o.separate).bytes;
      launch("ssd_scan", output_kernel<T>, blocks, kThreads, shared, context, s, o);
    }
    make_exact<T>(s, o, context);
  });
}

}  // namespace linmu
