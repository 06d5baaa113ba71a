// The visits of each chunk, and the states that enter it. See ssd_scan.cuh.
//
// A block of `states` keeps a 64 x 64 part of one head's state in registers and walks along a span of chunks, the next
// tiles of x and B on their way while it multiplies. Where a batch has too few heads to fill a GPU, L is cut into
// spans: a first walk finds what each span adds, a second one starts from their running sum.
#include <algorithm>

#include "ssd_scan.cuh"

namespace linmu {
namespace {

constexpr int kVisitThreads = 128, kStateThreads = 128;
constexpr int kState = 64;  // rows and columns of a block's part of the state
constexpr int kWarpTile = 32;
// Blocks that fill a GPU: two for each of 132 multiprocessors. Fixed, so that results are the same on every GPU.
constexpr int64_t kEnoughBlocks = 264;

constexpr int kHeads = 32;  // of a block of `visits`
// 2^-400 is 0 in float: a steeper step forgets no less, and would drown the other terms of its sum.
constexpr double kSteepest = 400;
// A decay that is taken apart is a product of two powers of 2. If it grows on the way by more than 2^60, one of them
// may be 0 or infinite where their product is not.
constexpr float kMostGrown = 60.f;

constexpr int64_t visit_bytes(int chunk) {
  return chunk * ((kHeads + 1) * static_cast<int64_t>(sizeof(float)) + 3 * static_cast<int64_t>(sizeof(int)));
}

// A block has a chunk of up to kHeads heads; a warp one of them at a time, its lanes the visits, in the direction's
// order.
__global__ void __launch_bounds__(kVisitThreads) visits_kernel(const __grid_constant__ ScanPlan s) {
  LINMU_SHARED(memory);
  const SsdScanParams& p = s.p;
  float* steps = reinterpret_cast<float*>(memory);  // of a direction, before bias and softplus
  int* tokens = reinterpret_cast<int*>(steps + s.chunk * (kHeads + 1));
  int* segments = tokens + s.chunk;  // per direction
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = kVisitThreads / kWarp;
  const int64_t c = blockIdx.x, b = blockIdx.y, h0 = blockIdx.z * int64_t{kHeads}, L = p.length;
  const int64_t t0 = (s.first_chunk + c) * s.chunk;
  const int heads = static_cast<int>(p.heads - h0 < kHeads ? p.heads - h0 : kHeads);
  const auto token_at = [&](int64_t t) -> int64_t {
    if (!p.token_order) return t;
    const int64_t at = p.token_order[b * L + t];
    return at < 0 ? 0 : at < L ? at : L - 1;
  };
  for (int i = threadIdx.x; i < s.chunk; i += kVisitThreads) {
    const int64_t t = t0 + i;
    tokens[i] = t < L ? static_cast<int>(token_at(t)) : -1;
    for (int d = 0; d < 2; ++d) {
      const int32_t* seq = s.direction(d).on ? s.direction(d).seq_idx : nullptr;
      const int64_t before = d ? t + 1 : t - 1;
      const bool differs =
          seq && t < L && before >= 0 && before < L && seq[b * L + token_at(t)] != seq[b * L + token_at(before)];
      segments[d * s.chunk + i] = differs;
    }
  }
  __syncthreads();
  if (warp < 2) {
    double restarts = 0;
    for (int k = lane; k < s.chunk; k += kWarp) {
      int& at = segments[warp * s.chunk + (warp ? s.chunk - 1 - k : k)];
      double sum = at;
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const double other = shuffle(sum, (lane - offset) & (kWarp - 1));
        if (lane >= offset) sum += other;
      }
      sum += restarts, restarts = shuffle(sum, kWarp - 1);
      at = static_cast<int>(sum);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; blockIdx.z == 0 && i < s.chunk; i += kVisitThreads) {
    const int64_t at = s.rows(b, c) + i;
    s.tokens[at] = tokens[i];
    for (int d = 0; d < 2; ++d)
      if (s.direction(d).on) s.segments[d][at] = segments[d * s.chunk + i];
  }

  const float* gate = static_cast<const float*>(p.gate);
  for (int d = 0; d < 2; ++d) {
    const SsdScanDirection& of = s.direction(d);
    if (!of.on) continue;
    __syncthreads();
    for (int i = threadIdx.x; i < s.chunk * heads; i += kVisitThreads) {
      const int r = i / heads, k = i % heads;
      steps[r * (kHeads + 1) + k] =
          tokens[r] < 0 ? 0.f : static_cast<const float*>(of.dt)[(b * L + tokens[r]) * p.heads + h0 + k];
    }
    __syncthreads();
    const int* segment = segments + d * s.chunk;
    const int leaving = segment[d ? 0 : s.chunk - 1];
    for (int k = warp; k < heads; k += warps) {
      const int64_t h = h0 + k, at = s.rows(b, h, c);
      const float bias = of.dt_bias ? static_cast<const float*>(of.dt_bias)[h] : 0.f;
      const double rate = static_cast<const float*>(of.A)[h] * 1.4426950408889634;  // 1 / ln 2
      double carry = 0;
      int carried = 0;  // the segment of carry
      bool spoiled = false;
      float grown = 0.f;
      for (int first = 0; first < s.chunk; first += kWarp) {
        const int i = d ? s.chunk - 1 - first - lane : first + lane, token = tokens[i];
        const bool keep = token >= 0 && (!p.reverse.mask || p.reverse.mask[b * L + token]);
        Visit v{};
        if (d ? keep : token >= 0) {
          v.step = steps[i * (kHeads + 1) + k] + bias;
          if (p.dt_softplus) v.step = softplus(v.step);
          v.weight = 1.f;
          if (gate && keep) {
            const float g = p.gate_per_token ? gate[(b * L + token) * p.heads + h] : gate[h];
            v.weight = d ? 1.f - g : g;
          }
        }
        double sum = v.step * rate;
        grown += sum > 0 ? static_cast<float>(sum) : 0.f;
        spoiled |= odd(v.step) || odd(static_cast<float>(sum));
        sum = sum < -kSteepest ? -kSteepest : sum > kSteepest ? kSteepest : sum;  // a NaN stays
        for (int offset = 1; offset < kWarp; offset *= 2) {
          const double other = shuffle(sum, (lane - offset) & (kWarp - 1));
          if (lane >= offset && segment[d ? i + offset : i - offset] == segment[i]) sum += other;
        }
        if (segment[i] == carried) sum += carry;
        carry = shuffle(sum, kWarp - 1), carried = segment[d ? s.chunk - first - kWarp : first + kWarp - 1];
        if (s.columns[d]) {
          sum += kRestart * segment[i];
          const double anchor = shuffle(sum, lane | 15);
          s.columns[d][at + i] = exp2f(static_cast<float>(anchor - sum)) * v.step;
        }
        v.high = static_cast<float>(sum), v.low = static_cast<float>(sum - v.high);
        s.visits[d][at + i] = v;
        if (!s.columns[d]) s.arrive[d][at + i] = segment[i] == 0 && v.weight != 0.f ? decay(v, true) * v.weight : 0.f;
      }
      if (s.columns[d]) carry += kRestart * leaving;
      Visit exit{};
      exit.high = static_cast<float>(carry), exit.low = static_cast<float>(carry - exit.high);
      for (int i = lane; i < s.chunk; i += kWarp) {
        const int own = d ? s.chunk - 1 - i : i;  // as this lane wrote it
        const Visit v = s.visits[d][at + own];
        s.leave[d][at + own] = segment[own] == leaving && v.step != 0.f ? decay(exit, v, true) * v.step : 0.f;
      }
      const int64_t chunk = (b * p.heads + h) * s.chunks + c;
      if (s.columns[d]) spoiled |= warp_sum(grown) > kMostGrown;
      spoiled = warp_any(spoiled);
      if (lane == 0) {
        s.through[d][chunk] = decay(exit, leaving == 0);
        if (s.redo && c == 0) s.redo[b * p.heads + h] = 0;
        if (d == 0 || !p.forward.on) s.spoiled[chunk] = 0;
        if (spoiled) s.spoiled[chunk] = 1;
      }
    }
  }
}

// What a walk of several spans needs besides.
struct Spans {
  int64_t count, chunks;      // spans, chunks per span
  float* states[2];           // (B, H, spans, P, N): what each span adds; then the state that enters it
  float* through[2];          // (B, H, spans)
  bool adding;                // the first of the two walks
  const unsigned char* only;  // (B, H) the heads to walk; null: all
};

struct Walks {
  Walk of[2];
};

constexpr int rows_per_step(int chunk) { return chunk % 64 ? 32 : 64; }

template <class T>
struct StateTiles {
  static constexpr int kPitch = padded<T>(kState);
  // In elements of T; two of each but the last are filled in turn.
  static constexpr int64_t tile(int rows) { return static_cast<int64_t>(rows) * kPitch; }
  static constexpr int64_t bytes(int rows) {
    return 5 * tile(rows) * static_cast<int64_t>(sizeof(T)) + 2 * rows * (sizeof(float) + sizeof(int));
  }
};
static_assert(StateTiles<float>::bytes(64) <= 99 * 1024, "states fits the smallest shared memory, that of sm_86");

// A warp's part of a state, from row p0 and column n0 on, to one of P x N.
template <class S>
__device__ inline void store_state(S* to, Accumulator<kWarpTile, kWarpTile>& state, int64_t p0, int64_t n0, int64_t P,
                                   int64_t N) {
  to += (p0 + lane_row()) * N + n0 + lane_column();
  if (p0 + kWarpTile <= P && n0 + kWarpTile <= N && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kWarpTile / 8; ++i)
#pragma unroll
      for (int j = 0; j < kWarpTile / 8; ++j) {
        const float* value = state.v[i / 2][j] + i % 2 * 2;
        *reinterpret_cast<Vec<S, 2>*>(to + i * 8 * N + j * 8) = {{from_float<S>(value[0]), from_float<S>(value[1])}};
      }
  } else {
    state.each_pair([&](float first, float second, int i, int j) {
      if (p0 + i < P) store_pair(to + (i - lane_row()) * N + j - lane_column(), first, second, N - n0 - j);
    });
  }
}

// A step's rows of the columns' tile, each times its factor and rounded; what `parts` such roundings left over, if
// there were any. Whether one of them is odd.
template <class T, int kRows>
__device__ inline bool scale_rows(T* to, const T* from, const float* factor, int parts) {
  constexpr int kPitch = StateTiles<T>::kPitch, kAcross = kState / kVec<T>;
  bool spoiled = false;
#pragma unroll
  for (int k = 0; k < kRows * kAcross / kStateThreads; ++k) {
    const int i = static_cast<int>(threadIdx.x) + k * kStateThreads, r = i / kAcross,
              at = r * kPitch + i % kAcross * kVec<T>;
    const float f = factor[r];
    float value[kVec<T>];
    read_as_float(value, from + at);
#pragma unroll
    for (int v = 0; v < kVec<T>; ++v) spoiled |= odd(value[v]), value[v] = f == 0.f ? 0.f : value[v] * f;
    for (int done = 0; done < parts; ++done) {
#pragma unroll
      for (int v = 0; v < kVec<T>; v += 2)
        if constexpr (sizeof(T) == 2) {
          const unsigned both = pack<T>(value[v], value[v + 1]);
          value[v] -= to_float(T{static_cast<uint16_t>(both)});
          value[v + 1] -= to_float(T{static_cast<uint16_t>(both >> 16)});
        }
    }
    write_rounded(to + at, value);
  }
  return spoiled;
}

template <class T, int kRows>
__global__ void __launch_bounds__(kStateThreads, std::is_same_v<T, float> ? 2 : 3)
    states_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Walks walks,
                  const __grid_constant__ Spans spans) {
  LINMU_SHARED(memory);
  using Tiles = StateTiles<T>;
  const Walk& w = walks.of[blockIdx.z];
  const SsdScanParams& p = s.p;
  constexpr int rows = kRows;
  const int parts = s.chunk / rows, d = w.direction;
  const int64_t P = p.head_dim, N = p.state_dim, tiles_p = (P + kState - 1) / kState,
                tiles_n = (N + kState - 1) / kState;
  const int64_t bh = blockIdx.x / (tiles_p * tiles_n), b = bh / p.heads, h = bh % p.heads;
  if (spans.only && !spans.only[bh]) return;
  const int64_t p0 = blockIdx.x / tiles_n % tiles_p * kState, n0 = blockIdx.x % tiles_n * kState;
  const int64_t span = blockIdx.y, first = span * spans.chunks;
  const int64_t count = s.chunks - first < spans.chunks ? s.chunks - first : spans.chunks;
  const bool backwards = (d == 1) != w.adjoint;
  T* x_tiles = reinterpret_cast<T*>(memory);
  T* b_tiles = x_tiles + 2 * Tiles::tile(rows);
  T* scaled = b_tiles + 2 * Tiles::tile(rows);
  float* factors = reinterpret_cast<float*>(scaled + Tiles::tile(rows));
  int* tokens = reinterpret_cast<int*>(factors + 2 * rows);
  const T* x = group_of<T>(w.rows, w.row_groups, b, h, p.heads) + p0;
  const T* k = group_of<T>(w.columns, w.column_groups, b, h, p.heads) + n0;
  // A step: part `part` of the span's chunk number `chunk`.
  struct Step {
    int64_t chunk;
    int part, stage;
  };
  const auto after = [&](const Step& step) {
    const bool last = step.part + 1 == parts;
    return Step{step.chunk + last, last ? 0 : step.part + 1, step.stage ^ 1};
  };
  const auto chunk_of = [&](const Step& step) {
    const int64_t c = first + step.chunk;
    return backwards ? s.chunks - 1 - c : c;
  };
  const auto copy_tokens = [&](const Step& step) {
    const int32_t* from = s.tokens + s.rows(b, chunk_of(step)) + step.part * rows;
    for (int i = threadIdx.x * 4; i < rows; i += kStateThreads * 4)
      copy_async(tokens + step.stage * rows + i, from + i, true);
  };
  const auto copy_step = [&](const Step& step) {
    const int* token = tokens + step.stage * rows;
    const float* factor = (w.adjoint ? s.arrive[d] : s.leave[d]) + s.rows(b, h, chunk_of(step)) + step.part * rows;
    for (int i = threadIdx.x * 4; i < rows; i += kStateThreads * 4)
      copy_async(factors + step.stage * rows + i, factor + i, true);
    load_tile<T, kStateThreads>(x_tiles + step.stage * Tiles::tile(rows), rows, kState, P - p0, w.fast_rows,
                                [&](int r) { return token[r] < 0 ? nullptr : x + token[r] * w.rows.token_stride; });
    load_tile<T, kStateThreads>(b_tiles + step.stage * Tiles::tile(rows), rows, kState, N - n0, w.fast_columns,
                                [&](int r) { return token[r] < 0 ? nullptr : k + token[r] * w.columns.token_stride; });
    if (const Step next = after(step); next.chunk < count) copy_tokens(next);
  };
  const float* through = s.through[d] + bh * s.chunks;
  const auto through_of = [&](const Step& step) {
    return step.chunk < count && step.part == 0 ? through[chunk_of(step)] : 1.f;
  };

  const int warp = threadIdx.x / kWarp, warp_p = warp / 2 * kWarpTile, warp_n = warp % 2 * kWarpTile;
  Accumulator<kWarpTile, kWarpTile> state, own;
  const float* start = spans.count == 1 ? (w.initial ? w.initial + bh * P * N : nullptr)
                       : spans.adding   ? nullptr
                                        : spans.states[blockIdx.z] + (bh * spans.count + span) * P * N;
  state.each([&](float& value, int i, int j) {
    const int64_t at_p = p0 + warp_p + i, at_n = n0 + warp_n + j;
    value = start && at_p < P && at_n < N ? start[at_p * N + at_n] : 0.f;
  });
  float passed = 1.f;  // through the whole span
  const auto note = [&](bool spoiled, const Step& step) {
    if (spoiled && !w.adjoint) s.spoiled[bh * s.chunks + chunk_of(step)] = 1;
  };
  const Step begin{0, 0, 0};
  if (count > 0) copy_tokens(begin);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  if (count > 0) copy_step(begin);
  copy_commit();
  float keep = through_of(begin);
  for (Step step = begin, next; step.chunk < count; step = next) {
    next = after(step);
    copy_wait<0>();
    __syncthreads();
    if (next.chunk < count) copy_step(next);
    copy_commit();
    const float next_keep = through_of(next);
    if (step.part == 0) {
      if (!spans.adding && w.entering) {
        const int64_t at = (bh * s.chunks + chunk_of(step)) * P * N;
        bool spoiled = false;
        state.each([&](float& value, int, int) { spoiled |= odd(value); });
        if (w.wide)
          store_state(static_cast<float*>(w.entering) + at, state, p0 + warp_p, n0 + warp_n, P, N);
        else
          store_state(static_cast<T*>(w.entering) + at, state, p0 + warp_p, n0 + warp_n, P, N);
        note(spoiled, step);
      }
      passed *= keep;
      state.each([&](float& value, int, int) { value = keep == 0.f ? 0.f : value * keep; });
    }
    keep = next_keep;
    own.clear();
    const T* k_tile = b_tiles + step.stage * Tiles::tile(rows);
    T* x_tile = x_tiles + step.stage * Tiles::tile(rows);
    const float* factor = factors + step.stage * rows;
    bool spoiled = false;
#pragma unroll
    for (int u = 0; u < rows * (kState / kVec<T>) / kStateThreads; ++u) {
      const int i = static_cast<int>(threadIdx.x) + u * kStateThreads, r = i / (kState / kVec<T>);
      Vec<T, kVec<T>>& values =
          *reinterpret_cast<Vec<T, kVec<T>>*>(x_tile + r * Tiles::kPitch + i % (kState / kVec<T>)*kVec<T>);
      bool here = false;
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) here |= odd(to_float(values.v[v]));
      spoiled |= here;
      if (here && factor[r] == 0.f) values = {};
    }
    // The scaled rows of B, and, to be exact, what rounding them left over.
    const int roundings = !w.exact || std::is_same_v<T, float> ? 1 : std::is_same_v<T, bf16> ? 3 : 2;
#pragma unroll 1
    for (int part = 0; part < roundings; ++part) {
      if (part > 0) __syncthreads();
      spoiled |= scale_rows<T, rows>(scaled, k_tile, factor, part);
      __syncthreads();
      multiply<Major::MN, Major::MN>(own, x_tile + warp_p, Tiles::kPitch, scaled + warp_n, Tiles::kPitch, rows);
    }
    note(spoiled, step);
    state.add(own);
  }
  float* out = spans.adding                           ? spans.states[blockIdx.z] + (bh * spans.count + span) * P * N
               : span + 1 < spans.count || !w.leaving ? nullptr
                                                      : w.leaving + bh * P * N;
  if (out)
    state.each([&](float& value, int i, int j) {
      const int64_t at_p = p0 + warp_p + i, at_n = n0 + warp_n + j;
      if (at_p < P && at_n < N) out[at_p * N + at_n] = value;
    });
  if (spans.adding && threadIdx.x == 0 && p0 == 0 && n0 == 0)
    spans.through[blockIdx.z][bh * spans.count + span] = passed;
}

// Turns what each span adds into the state that enters it.
__global__ void __launch_bounds__(256)
    spans_kernel(const __grid_constant__ Walks walks, const __grid_constant__ Spans spans, int64_t size) {
  const int64_t bh = blockIdx.y, at = blockIdx.x * int64_t{256} + threadIdx.x;
  if (at >= size || (spans.only && !spans.only[bh])) return;
  const int z = blockIdx.z;
  const float* initial = walks.of[z].initial;
  float* states = spans.states[z] + bh * spans.count * size + at;
  float carry = initial ? initial[bh * size + at] : 0.f;
  for (int64_t i = 0; i < spans.count; ++i) {
    const float added = i + 1 < spans.count ? states[i * size] : 0.f;
    states[i * size] = carry;
    if (i + 1 == spans.count) return;
    const float through = spans.through[z][bh * spans.count + i];
    carry = through == 0.f ? added : carry * through + added;
  }
}

// One block per state.
__global__ void __launch_bounds__(256) narrow_kernel(const float* wide, half16* narrow, float* scale, int64_t size) {
  LINMU_SHARED(memory);
  float* parts = reinterpret_cast<float*>(memory);
  const float* from = wide + blockIdx.x * size;
  float most = 0.f;
  for (int64_t i = threadIdx.x; i < size; i += 256)
    most = fmaxf(most, fabsf(from[i]) < INFINITY ? fabsf(from[i]) : 0.f);
  most = warp_max(most);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = most;
  __syncthreads();
  for (int k = 0; k < 256 / kWarp; ++k) most = fmaxf(most, parts[k]);
  // Room for sums of what is rounded up; and as large as that allows, for what is small beside the largest.
  const float factor = most > 32768.f ? exp2f(ceilf(log2f(most)) - 15.f) : 1.f;
  if (threadIdx.x == 0) scale[blockIdx.x] = factor;
  for (int64_t i = threadIdx.x; narrow && i < size; i += 256)
    narrow[blockIdx.x * size + i] = from_float<half16>(from[i] / factor);
}

}  // namespace

ScanPlan plan_scan(const SsdScanParams& p, int chunk, const CudaContext& context) {
  return plan_scan(p, chunk, 0, ceil_div(p.length, chunk), context);
}

namespace {

ScanPlan lay_out(const SsdScanParams& p, int chunk, int64_t first, int64_t chunks, const CudaContext& context) {
  ScanPlan s{};
  s.p = p, s.chunk = chunk, s.chunks = chunks, s.first_chunk = first;
  const int64_t visits = p.batch * s.chunks * chunk;
  s.tokens = allocate<int32_t>(context, visits);
  for (int d = 0; d < 2; ++d) {
    if (!s.direction(d).on) continue;
    s.segments[d] = allocate<int32_t>(context, visits);
    s.visits[d] = allocate<Visit>(context, visits * p.heads);
    s.leave[d] = allocate<float>(context, visits * p.heads);
    s.arrive[d] = allocate<float>(context, visits * p.heads);
    s.through[d] = allocate<float>(context, p.batch * s.chunks * p.heads);
  }
  s.spoiled = allocate<unsigned char>(context, p.batch * s.chunks * p.heads);
  return s;
}

void launch_visits(const ScanPlan& s, const CudaContext& context) {
  const dim3 blocks(static_cast<unsigned>(s.chunks), static_cast<unsigned>(s.p.batch),
                    static_cast<unsigned>(ceil_div(s.p.heads, kHeads)));
  launch("ssd_scan", visits_kernel, blocks, kVisitThreads, visit_bytes(s.chunk), context, s);
}

}  // namespace

ScanPlan plan_scan(const SsdScanParams& p, int chunk, int64_t first, int64_t chunks, const CudaContext& context) {
  const ScanPlan s = lay_out(p, chunk, first, chunks, context);
  launch_visits(s, context);
  return s;
}

ScanPlan plan_slices(const SsdScanParams& p, const CudaContext& context) {
  constexpr int kChunk = 64;
  ScanPlan s = lay_out(p, kChunk, 0, ceil_div(p.length, kChunk), context);
  const int64_t chunks = p.batch * p.heads * s.chunks;
  for (int d = 0; d < 2; ++d)
    if (s.direction(d).on) s.columns[d] = allocate<float>(context, chunks * kChunk);
  s.redo = allocate<unsigned char>(context, p.batch * p.heads);
  launch_visits(s, context);
  return s;
}

void enter_spans(const ScanPlan& s, int direction, float* states, float* through, int64_t spans,
                 const CudaContext& context) {
  const int64_t size = s.p.head_dim * s.p.state_dim;
  Walks walks{};
  if (callers_states(s.p, direction)) walks.of[0].initial = static_cast<const float*>(s.p.initial_state);
  Spans of{};
  of.count = spans, of.states[0] = states, of.through[0] = through;
  launch("ssd_scan", spans_kernel,
         dim3(static_cast<unsigned>(ceil_div(size, 256)), static_cast<unsigned>(s.p.batch * s.p.heads)), 256, 0,
         context, walks, of, size);
}

const float* narrow_states(const ScanPlan& s, const float* wide, half16* narrow, const CudaContext& context) {
  const int64_t states = s.p.batch * s.p.heads * s.chunks, size = s.p.head_dim * s.p.state_dim;
  float* scale = allocate<float>(context, states);
  launch("ssd_scan", narrow_kernel, blocks_of(states), 256, 256 / kWarp * static_cast<int64_t>(sizeof(float)), context,
         wide, narrow, scale, size);
  return scale;
}

Walk forward_walk(const ScanPlan& s, int direction, bool wide, bool exact, const CudaContext& context) {
  const SsdScanParams& p = s.p;
  const SsdScanTensor& B = s.direction(direction).B;
  Walk w{};
  w.rows = p.x, w.row_groups = p.groups_x, w.fast_rows = fast_rows(p.x, p.head_dim, p.dtype);
  w.columns = B, w.column_groups = p.groups_b, w.fast_columns = fast_rows(B, p.state_dim, p.dtype);
  w.direction = direction;
  if (callers_states(p, direction))
    w.initial = static_cast<const float*>(p.initial_state), w.leaving = static_cast<float*>(p.final_state);
  const int64_t size = p.batch * p.heads * s.chunks * p.head_dim * p.state_dim;
  w.entering = allocate<unsigned char>(context, size * (wide ? 4 : element_size(p.dtype)));
  w.wide = wide, w.exact = exact;
  return w;
}

void walk_states(const ScanPlan& s, const Walk* walks, int count, const CudaContext& context) {
  const SsdScanParams& p = s.p;
  const int64_t heads = p.batch * p.heads, size = p.head_dim * p.state_dim;
  const int64_t tiles = ceil_div(p.head_dim, kState) * ceil_div(p.state_dim, kState);
  if (heads * tiles == 0) return;
  Walks both{};
  std::copy(walks, walks + count, both.of);
  Spans spans{};
  spans.count = 1, spans.chunks = std::max<int64_t>(s.chunks, 1), spans.only = s.redo;
  const int64_t wanted = std::min(kEnoughBlocks / (heads * tiles * count), s.chunks / 8);
  if (wanted > 1) {
    spans.chunks = ceil_div(s.chunks, wanted), spans.count = ceil_div(s.chunks, spans.chunks);
    for (int i = 0; i < count; ++i) {
      spans.states[i] = allocate<float>(context, heads * spans.count * size);
      spans.through[i] = allocate<float>(context, heads * spans.count);
    }
  }
  const dim3 blocks(static_cast<unsigned>(heads * tiles), static_cast<unsigned>(spans.count), count);
  dispatch_cuda("ssd_scan", p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int rows = rows_per_step(s.chunk);
    const int64_t shared = StateTiles<T>::bytes(rows);
    auto* kernel = rows == 64 ? states_kernel<T, 64> : states_kernel<T, 32>;
    if (spans.count > 1) {
      spans.adding = true;
      launch("ssd_scan", kernel, blocks, kStateThreads, shared, context, s, both, spans);
      spans.adding = false;
      launch("ssd_scan", spans_kernel,
             dim3(static_cast<unsigned>(ceil_div(size, 256)), static_cast<unsigned>(heads), count), 256, 0, context,
             both, spans, size);
    }
    launch("ssd_scan", kernel, blocks, kStateThreads, shared, context, s, both, spans);
  });
}

}  // namespace linmu
