// The forward scan of sm_90a in one walk, for bfloat16 in place with P and N up to 128. See ssd_scan.cuh.
//
// A warpgroup walks the chunks of a span with a slice of one head's state, 64 rows of P, in its accumulators all along;
// no state goes through memory. Two such warpgroups make a block, the two slices of a head or two heads, beside a warp
// that loads their tiles by TMA into a ring of stages:
//
//     h, rounded, to shared memory               where wgmma reads it
//     S = C B^T,  Y = C h^T                      C in registers
//     M = S decayed, while Y runs                Y *= arrive
//     Y += M X,   h = through h + (X^T leave) B  Y goes out while h runs
//
// Within a chunk a decay is a product of two factors of at most 1 each, of the row and of the column, about the last
// visit of every 16 columns; so only the 16 x 16 blocks on the diagonal take an exponential for every pair. A chunk
// with a restart, or with steps that grow, takes one for every pair (`uneven`).
//
// Where heads are too few to fill a GPU, L is cut into spans: a first walk, without output, finds what each span adds.
// What comes out not finite is left to the kernels that know what may see what (`redo`).
#include <algorithm>

#include "ssd_scan_output.cuh"
#include "tma.cuh"

namespace linmu {
namespace {

constexpr int kQ = 64, kRows = 64;  // visits of a chunk, rows of a slice
constexpr int kConsumers = 2, kSliceThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kPanel = kQ * 64 * 2;  // bytes of 64 columns
// Of 65,536 registers: 2 x 128 x 240 and 128 x 24.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;

// What a consumer needs to know of its chunk, in bytes from the record's begin.
constexpr int kLeave = kQ * static_cast<int>(sizeof(Visit)), kArrive = kLeave + kQ * 4, kColumn = kArrive + kQ * 4,
              kSegments = kColumn + kQ * 4, kRecord = kSegments + kQ * 4;

// Where things lie in shared memory, in bytes; B, C, x and records from their stage's begin.
struct SliceTiles {
  int stages, stage, b, x, records, h, y, barriers, bytes;

  static constexpr SliceTiles of(int panels, int sets, int stages) {
    SliceTiles t{};
    t.stages = stages;
    t.b = sets * panels * kPanel;
    t.x = 2 * t.b;
    t.records = t.x + kConsumers * kPanel;
    t.stage = t.records + kConsumers * kRecord;
    t.h = stages * t.stage;
    t.y = t.h + kConsumers * panels * kPanel;
    t.barriers = t.y + kConsumers * kPanel;
    t.bytes = t.barriers + 2 * stages * static_cast<int>(sizeof(Barrier));
    return t;
  }
  // As many stages as fit, up to 3.
  static constexpr SliceTiles of(int panels, int sets) {
    const SliceTiles t = of(panels, sets, 3);
    return t.bytes <= kSharedSm90 ? t : of(panels, sets, 2);
  }
};
static_assert(SliceTiles::of(2, 1).stages == 3 && SliceTiles::of(2, 2).bytes <= kSharedSm90);
static_assert(SliceTiles::of(2, 1).stage % 1024 == 0, "a swizzled tile is aligned to 1024 bytes");

struct Slices {
  TensorMap x, B, C;
  SliceTiles tiles;
  int sets;               // 1: both consumers read the same B and C
  int per_head;           // slices of a head, 1 or 2
  int64_t spans, chunks;  // spans, chunks of each
  float* states;          // (B, H, spans, P, N): what each adds, then the state that enters it; null for one span
  float* through;         // (B, H, spans)
};

#ifdef LINMU_WGMMA_CODE

// One block's place.
struct SlicePlace {
  int64_t b, span, head, first, count;  // its first head; its first chunk, and how many
  int consumers;

  __device__ SlicePlace(const ScanPlan& s, const Slices& o, int64_t spans) {
    const int64_t units = ceil_div(s.p.heads * o.per_head, kConsumers), unit = blockIdx.x % units;
    span = blockIdx.x / units % spans, b = blockIdx.x / units / spans;
    head = unit * kConsumers / o.per_head;
    consumers = (unit + 1) * kConsumers <= s.p.heads * o.per_head ? kConsumers : 1;
    first = span * o.chunks;
    count = s.chunks - first < o.chunks ? s.chunks - first : o.chunks;
  }
};

// By one thread: all loads of the block.
template <int kPanels, bool kOutput>
__device__ inline void produce(const ScanPlan& s, const Slices& o, const SlicePlace& at, unsigned char* memory,
                               Barrier* full, Barrier* empty) {
  const SsdScanParams& p = s.p;
  const int sets = o.sets < at.consumers ? o.sets : at.consumers;
  const int bytes =
      (kOutput ? 2 : 1) * sets * kPanels * kPanel + at.consumers * (kPanel + (kOutput ? kRecord : kQ * 4));
  const int b = static_cast<int>(at.b), share_b = static_cast<int>(p.heads / p.groups_b),
            share_c = static_cast<int>(p.heads / p.groups_c), share_x = static_cast<int>(p.heads / p.groups_x);
  int stage = 0, round = 0;
  for (int64_t c = at.first; c < at.first + at.count; ++c) {
    unsigned char* to = memory + stage * o.tiles.stage;
    if (round > 0) barrier_wait(&empty[stage], round - 1);
    barrier_expect_tx(&full[stage], bytes);
    const int row = static_cast<int>(c) * kQ;
    for (int i = 0; i < at.consumers; ++i) {
      const int head = static_cast<int>(at.head) + (o.per_head == 1 ? i : 0);
      if (i < sets)
#pragma unroll
        for (int k = 0; k < kPanels; ++k) {
          unsigned char* panel = to + (i * kPanels + k) * kPanel;
          if constexpr (kOutput) tma_load_box(panel, o.C, k * 64, row, head / share_c, b, &full[stage]);
          tma_load_box(panel + o.tiles.b, o.B, k * 64, row, head / share_b, b, &full[stage]);
        }
      tma_load_box(to + o.tiles.x + i * kPanel, o.x, o.per_head == 1 ? 0 : i * kRows, row, head / share_x, b,
                   &full[stage]);
      unsigned char* record = to + o.tiles.records + i * kRecord;
      const int64_t visit = s.rows(at.b, head, c);
      tma_load_1d(record + kLeave, s.leave[0] + visit, kQ * 4, &full[stage]);
      if constexpr (kOutput) {
        tma_load_1d(record, s.visits[0] + visit, kQ * static_cast<int>(sizeof(Visit)), &full[stage]);
        tma_load_1d(record + kArrive, s.arrive[0] + visit, kQ * 4, &full[stage]);
        tma_load_1d(record + kColumn, s.columns + visit, kQ * 4, &full[stage]);
        tma_load_1d(record + kSegments, s.segments[0] + s.rows(at.b, c), kQ * 4, &full[stage]);
      }
    }
    if (++stage == o.tiles.stages) stage = 0, ++round;
  }
}

// Scores become M, as A fragments: rows row0 to row0 + 15 of the chunk, on and below the diagonal.
template <class T>
__device__ inline void decay_scores(unsigned (&m)[4][4], WarpgroupAccumulator& scores, const unsigned char* record,
                                    int warp, bool uneven) {
  const Visit* visits = reinterpret_cast<const Visit*>(record);
  const int row0 = warp * 16;
  if (uneven) {
    each_pair_of_visits<16, kQ>(visits, reinterpret_cast<const int*>(record + kSegments), false, row0, 0,
                                [&](int half, int l, int, const Visit& to, int, const Visit& from, bool on) {
                                  float& value = scores.v[0][l / 2][half * 2 + l % 2];
                                  value = on ? value * (decay(to, from, true) * from.step * to.weight) : 0.f;
                                });
#pragma unroll
    for (int k = 0; k < 4; ++k) to_a_fragment<T>(m[k], scores, 0, k);
    return;
  }
  const float* column = reinterpret_cast<const float*>(record + kColumn);
  const Visit to[2] = {visits[row0 + lane_row()], visits[row0 + lane_row() + 8]};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < warp) {
      const Visit anchor = visits[k * 16 + 15];
      const float row[2] = {fast_exp2((to[0].high - anchor.high) + (to[0].low - anchor.low)) * to[0].weight,
                            fast_exp2((to[1].high - anchor.high) + (to[1].low - anchor.low)) * to[1].weight};
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const Vec<float, 2> by = *reinterpret_cast<const Vec<float, 2>*>(column + k * 16 + q / 2 * 8 + lane_column());
        const float* value = scores.v[0][2 * k + q / 2] + q % 2 * 2;
        m[k][q] = pack<T>(value[0] * (row[q % 2] * by.v[0]), value[1] * (row[q % 2] * by.v[1]));
      }
    } else if (k == warp) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int j = part * 8 + lane_column();
        const Visit from[2] = {visits[row0 + j], visits[row0 + j + 1]};
        float out[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Visit &i = to[e / 2], &other = from[e % 2];
          const float exponent = (i.high - other.high) + (i.low - other.low);
          const bool on = j + e % 2 <= lane_row() + e / 2 * 8;
          out[e] = scores.v[0][2 * k + part][e] * (fast_exp2(on ? exponent : -INFINITY) * other.step * i.weight);
        }
        m[k][part * 2] = pack<T>(out[0], out[1]), m[k][part * 2 + 1] = pack<T>(out[2], out[3]);
      }
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) m[k][q] = 0;
    }
  }
}

// X^T times leave, as A fragments; of that what `part` roundings leave over.
template <class T>
__device__ inline void weigh_inputs(unsigned (&fragments)[4][4], const T* x_tile, const float* leave, int row0,
                                    int part) {
  const int lane = threadIdx.x % kWarp, low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ldmatrix_transposed(fragments[k], swizzled_at(x_tile, kQ, k * 16 + low + high, row0 + middle));
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      unsigned& both = fragments[k][q];
      const Vec<float, 2> by = *reinterpret_cast<const Vec<float, 2>*>(leave + k * 16 + q / 2 * 8 + lane_column());
      float first = to_float(T{static_cast<uint16_t>(both)}) * by.v[0];
      float second = to_float(T{static_cast<uint16_t>(both >> 16)}) * by.v[1];
      both = pack<T>(first, second);
#pragma unroll
      for (int done = 0; done < part; ++done) {
        first -= to_float(T{static_cast<uint16_t>(both)}), second -= to_float(T{static_cast<uint16_t>(both >> 16)});
        both = pack<T>(first, second);
      }
    }
  }
}

// The warpgroup's 64 x 64 values, rounded, to a tile.
template <class T>
__device__ inline void store_accumulator(T* tile, const WarpgroupAccumulator& from, int row0) {
  const int lane = threadIdx.x % kWarp, row = row0 + lane % 8 + lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float *left = from.v[0][2 * k], *right = from.v[0][2 * k + 1];
    stmatrix(swizzled_at(tile, kRows, row, k * 16 + high), pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
             pack<T>(right[0], right[1]), pack<T>(right[2], right[3]));
  }
}

// f(lane's value, its place in a state of P x N) of the slice from row p0 on.
template <int kPanels, class F>
__device__ inline void each_of_state(WarpgroupAccumulator (&h)[kPanels], int p0, int64_t P, int64_t N, F&& f) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    h[panel].each([&](float& value, int i, int j) {
      const int64_t row = p0 + i, column = panel * 64 + j;
      if (row < P && column < N) f(value, row * N + column);
    });
}

template <class T, int kPanels, bool kOutput, int kParts>
__device__ inline void consume(const ScanPlan& s, const Slices& o, const SlicePlace& at, unsigned char* memory,
                               Barrier* full, Barrier* empty, int consumer) {
  const SsdScanParams& p = s.p;
  const int64_t P = p.head_dim, N = p.state_dim;
  const int warp = warp_uniform(threadIdx.x % kWarpgroup / kWarp), row0 = warp * 16, lane = threadIdx.x % kWarp;
  const int64_t head = at.head + (o.per_head == 1 ? consumer : 0), bh = at.b * p.heads + head;
  const int p0 = o.per_head == 1 ? 0 : consumer * kRows, set = o.sets == 1 ? 0 : consumer * kPanels * kPanel;
  T* h_tile = reinterpret_cast<T*>(memory + o.tiles.h + consumer * kPanels * kPanel);
  T* y_tile = reinterpret_cast<T*>(memory + o.tiles.y + consumer * kPanel);
  const float skip = kOutput && p.D ? static_cast<const float*>(p.D)[head] : 0.f;
  const Passing* passing = s.passing + bh * s.chunks + at.first;

  WarpgroupAccumulator h[kPanels], y, m;
#pragma unroll
  for (int k = 0; k < kPanels; ++k) h[k].clear();
  const float* start = !kOutput          ? nullptr
                       : o.states        ? o.states + (bh * o.spans + at.span) * P * N
                       : p.initial_state ? static_cast<const float*>(p.initial_state) + bh * P * N
                                         : nullptr;
  if (start) each_of_state(h, p0 + row0, P, N, [&](float& value, int64_t place) { value = start[place]; });

  // The lane's first piece of 16 bytes of the first chunk's output, and the tokens from there on.
  const int64_t row = p.heads * P, token0 = at.first * kQ + row0 + lane / 8;
  T* out = static_cast<T*>(p.y) + (at.b * p.length + token0) * row + head * P + p0 + lane % 8 * 8;
  int64_t tokens = p0 + lane % 8 * 8 < P ? p.length - token0 : 0;

  float passed = 1.f;
  int stage = 0, round = 0;
  Passing next = *passing;
  for (int64_t c = 0; c < at.count; ++c) {
    const Passing now = next;
    if (c + 1 < at.count) next = *++passing;
    const unsigned char* tiles = memory + stage * o.tiles.stage;
    const T *c_tile = reinterpret_cast<const T*>(tiles + set), *b_tile = c_tile + o.tiles.b / 2,
            *x_tile = reinterpret_cast<const T*>(tiles + o.tiles.x + consumer * kPanel);
    const unsigned char* record = tiles + o.tiles.records + consumer * kRecord;
    if constexpr (kOutput) {
#pragma unroll
      for (int k = 0; k < kPanels; ++k) store_accumulator(h_tile + k * kRows * 64, h[k], row0);
      fence_proxy_async();
      warpgroup_sync<kConsumers>(consumer);
    }
    barrier_wait(&full[stage], round);

    if constexpr (kOutput) {
      const int low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
      unsigned rows[kPanels * 4][4];
#pragma unroll
      for (int k = 0; k < kPanels * 4; ++k)
        ldmatrix(rows[k], swizzled_at(c_tile, kQ, row0 + low + middle, k * 16 + high));
      warpgroup_arrive();
      const Descriptor columns = make_descriptor(b_tile), state = make_descriptor(h_tile);
#pragma unroll
      for (int k = 0; k < kPanels * 4; ++k)
        wgmma<T, Major::K>(m, rows[k], advance(columns, k / 4 * kPanel + k % 4 * 32), k > 0);
      warpgroup_commit();
#pragma unroll
      for (int k = 0; k < kPanels * 4; ++k)
        wgmma<T, Major::K>(y, rows[k], advance(state, k / 4 * kPanel + k % 4 * 32), k > 0);
      warpgroup_commit();
      const float* arrive = reinterpret_cast<const float*>(record + kArrive) + row0 + lane_row();
      const float by[2] = {arrive[0], arrive[8]};
      warpgroup_wait<1>();
      warpgroup_fence_operand(m);
      unsigned fragments[4][4];
      decay_scores<T>(fragments, m, record, warp, now.uneven != 0);
      warpgroup_wait<0>();
      warpgroup_fence_operand(y);
      multiply_rows(y, by);
      warpgroup_fence_operand(y);
      warpgroup_arrive();
      const Descriptor inputs = make_descriptor(x_tile);
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma<T, Major::MN>(y, fragments[k], advance(inputs, k * 16 * 128), true);
      warpgroup_commit();
    }

    // The state takes this chunk in.
    const float keep = now.through;
    passed *= keep;
#pragma unroll
    for (int k = 0; k < kPanels; ++k) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) h[k].v[0][j][e] *= keep;
    }
    const float* leave = reinterpret_cast<const float*>(record + kLeave);
    const Descriptor columns = make_descriptor(b_tile);
    unsigned inputs[kParts][4][4];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      weigh_inputs<T>(inputs[part], x_tile, leave, row0, part);
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
      if (p.D)
        y.each_pair([&](float& u, float& v, int i, int j) {
          const unsigned both = *reinterpret_cast<const unsigned*>(swizzled_at(x_tile, kQ, row0 + i, j));
          u += skip * to_float(T{static_cast<uint16_t>(both)}),
              v += skip * to_float(T{static_cast<uint16_t>(both >> 16)});
        });
      bool broken = now.spoiled != 0;
      y.each([&](float& value, int, int) { broken |= !(fabsf(value) < INFINITY); });
      store_accumulator(y_tile, y, row0);
      sync_warp();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k * 4 < tokens)
          *reinterpret_cast<Vec<T, 8>*>(out + k * 4 * row) =
              *reinterpret_cast<const Vec<T, 8>*>(swizzled_at(y_tile, kRows, row0 + k * 4 + lane / 8, lane % 8 * 8));
      out += kQ * row, tokens -= kQ;
      if (warp_any(broken) && lane == 0) s.spoiled[bh * s.chunks + at.first + c] = 1, s.redo[bh] = 1;
    }
    warpgroup_wait<0>();
#pragma unroll
    for (int k = 0; k < kPanels; ++k) warpgroup_fence_operand(h[k]);
    sync_warp();
    if (lane == 0) barrier_arrive(&empty[stage]);
    if (++stage == o.tiles.stages) stage = 0, ++round;
  }

  if constexpr (!kOutput) {
    float* added = o.states + (bh * o.spans + at.span) * P * N;
    each_of_state(h, p0 + row0, P, N, [&](float& value, int64_t place) { added[place] = value; });
    if (threadIdx.x % kWarpgroup == 0 && p0 == 0) o.through[bh * o.spans + at.span] = passed;
  } else if (p.final_state && at.span + 1 == o.spans) {
    float* last = static_cast<float*>(p.final_state) + bh * P * N;
    bool broken = false;
    each_of_state(h, p0 + row0, P, N, [&](float& value, int64_t place) {
      broken |= !(fabsf(value) < INFINITY);
      last[place] = value;
    });
    if (broken) s.redo[bh] = 1;
  }
}

#endif

// kParts: of the inputs of the state, each what rounding the ones before left over.
template <class T, int kPanels, bool kOutput, int kParts>
__global__ void __launch_bounds__(kSliceThreads, 1)
    slice_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Slices o) {
#ifdef LINMU_WGMMA_CODE
  LINMU_SHARED(memory);
  const int group = warp_uniform(threadIdx.x / kWarpgroup);
  const SlicePlace at(s, o, kOutput ? o.spans : o.spans - 1);
  Barrier *full = reinterpret_cast<Barrier*>(memory + o.tiles.barriers), *empty = full + o.tiles.stages;
  if (threadIdx.x == 0)
    for (int i = 0; i < o.tiles.stages; ++i)
      barrier_init(&full[i]), barrier_init(&empty[i], at.consumers * kWarpgroup / kWarp);
  fence_proxy_async();
  __syncthreads();
  if (group == kConsumers) {
    warpgroup_give_registers<kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) produce<kPanels, kOutput>(s, o, at, memory, full, empty);
  } else {
    warpgroup_take_registers<kConsumerRegisters>();
    if (group < at.consumers) consume<T, kPanels, kOutput, kParts>(s, o, at, memory, full, empty, group);
  }
#endif
}

// The fewest spans of at least 8 chunks whose blocks fill nine tenths of whole waves of 132: a fixed number, so that
// results are the same on every GPU.
int64_t choose_spans(int64_t blocks, int64_t chunks) {
  const int64_t most = std::max<int64_t>(chunks / 8, 1);
  if (blocks >= 120) return 1;
  for (int64_t n = 1; n <= most; ++n)
    if (blocks * n * 10 >= ceil_div(blocks * n, 132) * 132 * 9) return n;
  return most;
}

}  // namespace

bool ssd_scan_slices(const SsdScanParams& p, const CudaContext& context) {
  using T = bf16;
  if (p.dtype != DType::bf16 || !p.forward.on || p.reverse.on || p.token_order) return false;
  if (p.head_dim < 1 || p.state_dim < 1 || p.head_dim > 128 || p.state_dim > 128 || p.length <= 32) return false;
  if (p.head_dim % 8 || p.state_dim % 8 || !aligned(p.y, 16) || (p.chunk > 0 && p.chunk != kQ)) return false;
  if (p.batch * p.heads == 0 || architecture("ssd_scan") != 90) return false;
  Slices o{};
  const auto map = [&](TensorMap& to, const SsdScanTensor& t, int64_t groups, int64_t width) {
    return encode_tensor_map(to, t.data, {width, p.length, groups, p.batch},
                             {t.token_stride, t.group_stride, t.batch_stride}, kQ);
  };
  if (!map(o.x, p.x, p.groups_x, p.head_dim) || !map(o.B, p.forward.B, p.groups_b, p.state_dim) ||
      !map(o.C, p.forward.C, p.groups_c, p.state_dim))
    return false;
  const int panels = p.state_dim > 64 ? 2 : 1;
  o.per_head = p.head_dim > kRows ? 2 : 1;
  o.sets = o.per_head == 2 || (p.heads / p.groups_b % 2 == 0 && p.heads / p.groups_c % 2 == 0) ? 1 : 2;
  o.tiles = SliceTiles::of(panels, o.sets);

  const ScanPlan s = plan_slices(p, context);
  const int64_t units = p.batch * ceil_div(p.heads * o.per_head, kConsumers), size = p.head_dim * p.state_dim;
  o.chunks = ceil_div(s.chunks, choose_spans(units, s.chunks)), o.spans = ceil_div(s.chunks, o.chunks);
  const auto run = [&](auto panels_of, auto parts_of) {
    constexpr int kPanels = decltype(panels_of)::value, kParts = decltype(parts_of)::value;
    if (o.spans > 1) {
      o.states = allocate<float>(context, p.batch * p.heads * o.spans * size);
      o.through = allocate<float>(context, p.batch * p.heads * o.spans);
      launch("ssd_scan", slice_kernel<T, kPanels, false, kParts>, blocks_of(units * (o.spans - 1)), kSliceThreads,
             o.tiles.bytes, context, s, o);
      enter_spans(s, o.states, o.through, o.spans, context);
    }
    launch("ssd_scan", slice_kernel<T, kPanels, true, kParts>, blocks_of(units * o.spans), kSliceThreads, o.tiles.bytes,
           context, s, o);
  };
  const auto with_parts = [&](auto panels_of) {
    if (p.final_state)
      run(panels_of, std::integral_constant<int, 3>{});
    else
      run(panels_of, std::integral_constant<int, 1>{});
  };
  if (panels == 2)
    with_parts(std::integral_constant<int, 2>{});
  else
    with_parts(std::integral_constant<int, 1>{});
  redo_spoiled(s, context);
  return true;
}

}  // namespace linmu
