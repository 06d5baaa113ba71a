// Scans of sm_90a by slices, for bfloat16 with N up to 128. See ssd_scan.cuh.
//
// A warpgroup walks the chunks of a span with a slice of one head's state, 64 rows of P, in its accumulators all along.
// Two such warpgroups make a block, of neighbouring slices, beside a warpgroup that loads their tiles into a ring of
// stages:
//
//     h, rounded, to shared memory               where wgmma reads it
//     S = C B^T,  Y = C h^T                      C in registers
//     M = S decayed, while Y runs                Y *= arrive
//     Y += M X,   h = through h + (X^T leave) B  Y goes out while h runs
//
// Within a chunk a decay is a product of two factors of at most 1 each, of the row and of the column, about the visit
// of every 16 columns that is nearest to the row; so only the 16 x 16 blocks on the diagonal take an exponential for
// every pair. A restart is a step of S so steep that all of these are 0 across it (`kRestart`).
//
// Where heads are too few to fill a GPU, L is cut into spans: a first walk, without output, finds what each span adds.
// What comes out not finite is left to the kernels that know what may see what (`redo`).
#pragma once
#include "ssd_scan_output.cuh"
#include "tma.cuh"

namespace linmu {

// What a walk by slices makes.
enum class Make {
  kAdded,     // what a span adds to the state
  kEntering,  // the reverse state that enters each pair of chunks
  kOutput,    // y of one direction
  kPart,      // the reverse direction's part of y, in float
  kRest,      // y: that part, and the forward direction's
  kBoth,      // y of both directions, with the states that enter each pair of chunks
};
constexpr bool has_output(Make make) { return make >= Make::kOutput; }

namespace slices {

constexpr int kQ = 64, kRows = 64;  // visits of a chunk, rows of a slice
constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * kWarpgroup, kGatherers = 64;
constexpr int kPanel = kQ * 64 * 2;  // bytes of 64 columns

// What a consumer needs to know of its chunk in one direction, in bytes from the record's begin.
constexpr int kLeave = kQ * static_cast<int>(sizeof(Visit)), kColumn = kLeave + kQ * 4, kRecord = kColumn + kQ * 4;

constexpr int kTokens = kQ * 4, kBlock = 128;  // bytes of a chunk's tokens, and of a Block

// Where things lie in shared memory, in bytes; B, C, x and records from their stage's begin.
struct Tiles {
  int stages, stage, b, x, records, h, entering, tokens, barriers, block, bytes;

  static constexpr Tiles of(int panels, int sets, bool both, int stages) {
    Tiles t{};
    t.stages = stages;
    t.b = sets * panels * kPanel;
    t.x = 2 * t.b;
    t.records = t.x + kConsumers * kPanel;
    t.stage = t.records + kConsumers * (both ? 2 : 1) * kRecord;
    t.h = stages * t.stage;
    t.entering = t.h + kConsumers * panels * kPanel;
    t.tokens = t.entering + (both ? kConsumers * panels * kPanel : 0);
    t.barriers = t.tokens + stages * kTokens;
    t.block = t.barriers + 2 * (stages + 1) * static_cast<int>(sizeof(Barrier));
    t.bytes = t.block + kBlock;
    return t;
  }
  // As many stages as fit, up to 3.
  static constexpr Tiles of(int panels, int sets, bool both) {
    const Tiles t = of(panels, sets, both, 3);
    return t.bytes <= kSharedSm90 ? t : of(panels, sets, both, 2);
  }
};
static_assert(Tiles::of(2, 1, false).stages == 3 && Tiles::of(2, 2, false).bytes <= kSharedSm90);
static_assert(Tiles::of(2, 1, true).stages == 3 && Tiles::of(1, 2, true).stages == 3);
static_assert(Tiles::of(2, 1, false).stage % 1024 == 0 && Tiles::of(2, 1, true).stage % 1024 == 0,
              "a swizzled tile is aligned to 1024 bytes");

struct Plan {
  TensorMap x, B[2], C[2];  // per direction
  Tiles tiles;
  int sets;                 // 1: both consumers read the same B and C
  int per_head;             // slices of a head
  bool gathered;            // rows come one by one, because tokens are visited in an order
  int64_t spans, chunks;    // spans, chunks of each
  float* states[2];         // (B, H, spans, P, N): what each adds, then the state that enters it; null for one span
  float* through[2];        // (B, H, spans)
  unsigned char* entering;  // (B, H, pairs of chunks, slices) of panels as they lie in shared memory
  float* part;              // (B, H, chunks, slices) of 64 x 64 as they lie in the accumulators
};

// y of both directions, in one walk each way, or `fused`.
void scan_both(const ScanPlan& s, Plan o, bool fused, const CudaContext& context);

// The stages' barriers, and those of the states that enter a pair of chunks.
struct Ring {
  Barrier *full, *empty, *entering_full, *entering_empty;

  __device__ Ring(const Tiles& tiles, unsigned char* memory)
      : full(reinterpret_cast<Barrier*>(memory + tiles.barriers)),
        empty(full + tiles.stages),
        entering_full(empty + tiles.stages),
        entering_empty(entering_full + 1) {}
};

// What the loading warpgroup needs to know of a consumer.
struct Source {
  const bf16 *C, *B, *x;  // the first token's row, of its group and slice
  int c_group, b_group, x_group, x_column;
  int64_t bh;
};

// One block's place. It lies in shared memory, for registers are few. Chunks are numbered as they are walked.
struct Block {
  Source sources[kConsumers];
  int direction, consumers, b, span, unit, first, count, chunks;

  __device__ void place(const ScanPlan& s, const Plan& o, int spans, int walked) {
    direction = walked;
    const SsdScanParams& p = s.p;
    const int units = static_cast<int>(ceil_div(p.heads * o.per_head, kConsumers)), number = blockIdx.x;
    unit = number % units, span = number / units % spans, b = number / units / spans;
    consumers = (unit + 1) * kConsumers <= p.heads * o.per_head ? kConsumers : 1;
    chunks = static_cast<int>(s.chunks), first = span * static_cast<int>(o.chunks);
    count = chunks - first < o.chunks ? chunks - first : static_cast<int>(o.chunks);
    const SsdScanDirection& of = s.direction(direction);
    for (int i = 0; i < consumers; ++i) {
      const int h = head(o, i), column = slice(o, i) * kRows;
      sources[i] = {group_of<bf16>(of.C, p.groups_c, b, h, p.heads),
                    group_of<bf16>(of.B, p.groups_b, b, h, p.heads),
                    group_of<bf16>(p.x, p.groups_x, b, h, p.heads) + column,
                    static_cast<int>(h / (p.heads / p.groups_c)),
                    static_cast<int>(h / (p.heads / p.groups_b)),
                    static_cast<int>(h / (p.heads / p.groups_x)),
                    column,
                    b * p.heads + h};
    }
  }
  __device__ int chunk(int walked) const { return direction ? chunks - 1 - first - walked : first + walked; }
  __device__ int head(const Plan& o, int consumer) const { return (unit * kConsumers + consumer) / o.per_head; }
  __device__ int slice(const Plan& o, int consumer) const { return (unit * kConsumers + consumer) % o.per_head; }
};
static_assert(sizeof(Block) == kBlock);

#ifdef LINMU_WGMMA_CODE

constexpr bool stores_y(Make make) { return has_output(make) && make != Make::kPart; }

// The records of a chunk into a stage, by one thread.
template <Make kMake>
__device__ inline void load_records(const ScanPlan& s, const Plan& o, const Block& at, int c, int stage,
                                    unsigned char* memory, Barrier* full) {
  constexpr int kRecords = kMake == Make::kBoth ? 2 : 1;
  unsigned char* to = memory + stage * o.tiles.stage + o.tiles.records;
#pragma unroll 1
  for (int i = 0; i < at.consumers; ++i) {
    const int64_t visit = (at.sources[i].bh * at.chunks + c) * kQ;
#pragma unroll
    for (int k = 0; k < kRecords; ++k, to += kRecord) {
      const int d = kMake == Make::kBoth ? k : at.direction;
      tma_load_1d(to + kLeave, s.leave[d] + visit, kQ * 4, full);
      if constexpr (has_output(kMake)) {
        tma_load_1d(to, s.visits[d] + visit, kQ * static_cast<int>(sizeof(Visit)), full);
        tma_load_1d(to + kColumn, s.columns[d] + visit, kQ * 4, full);
      }
    }
  }
  if constexpr (stores_y(kMake))
    tma_load_1d(memory + o.tiles.tokens + stage * kTokens, s.tokens + (at.b * at.chunks + c) * int64_t{kQ}, kTokens,
                full);
}

template <Make kMake>
constexpr int record_bytes(int consumers) {
  return consumers * (!has_output(kMake)     ? kQ * 4
                      : kMake == Make::kBoth ? 2 * kRecord
                                             : kRecord) +
         (stores_y(kMake) ? kTokens : 0);
}

// Of `entering`, a slice of the state of the pair that chunk c is in.
template <int kPanels>
__device__ inline unsigned char* entering_at(const Plan& o, int64_t bh, int chunks, int c, int slice) {
  return o.entering + ((bh * ((chunks + 1) / 2) + c / 2) * o.per_head + slice) * kPanels * kPanel;
}

// The states that enter chunk c's pair, by one thread.
template <int kPanels>
__device__ inline void load_entering(const Plan& o, const Block& at, int c, int round, unsigned char* memory,
                                     const Ring& ring) {
  if (round > 0) barrier_wait(ring.entering_empty, round - 1);
  barrier_expect_tx(ring.entering_full, at.consumers * kPanels * kPanel);
  for (int i = 0; i < at.consumers; ++i)
    tma_load_1d(memory + o.tiles.entering + i * kPanels * kPanel,
                entering_at<kPanels>(o, at.sources[i].bh, at.chunks, c, at.sources[i].x_column / kRows),
                kPanels * kPanel, ring.entering_full);
}

// By one thread: all loads of the block, or, where rows are gathered, all others.
template <int kPanels, Make kMake>
__device__ inline void produce(const ScanPlan& s, const Plan& o, const Block& at, unsigned char* memory,
                               const Ring& ring) {
  constexpr bool kOutput = has_output(kMake);
  const int sets = o.sets < at.consumers ? o.sets : at.consumers;
  const int tiles = o.gathered ? 0 : (kOutput ? 2 : 1) * sets * kPanels * kPanel + at.consumers * kPanel;
  int stage = 0, round = 0;
  for (int w = 0; w < at.count; ++w) {
    const int c = at.chunk(w), row = c * kQ;
    unsigned char* to = memory + stage * o.tiles.stage;
    Barrier* full = &ring.full[stage];
    if (round > 0) barrier_wait(&ring.empty[stage], round - 1);
    barrier_expect_tx(full, tiles + record_bytes<kMake>(at.consumers));
    for (int i = 0; !o.gathered && i < at.consumers; ++i) {
      const Source& from = at.sources[i];
      if (i < sets)
#pragma unroll
        for (int k = 0; k < kPanels; ++k) {
          unsigned char* panel = to + (i * kPanels + k) * kPanel;
          if constexpr (kOutput) tma_load_box(panel, o.C[at.direction], k * 64, row, from.c_group, at.b, full);
          tma_load_box(panel + o.tiles.b, o.B[at.direction], k * 64, row, from.b_group, at.b, full);
        }
      tma_load_box(to + o.tiles.x + i * kPanel, o.x, from.x_column, row, from.x_group, at.b, full);
    }
    load_records<kMake>(s, o, at, c, stage, memory, full);
    if (++stage == o.tiles.stages) stage = 0, ++round;
    if constexpr (kMake == Make::kBoth)
      if (w % 2 || w + 1 == at.count) load_entering<kPanels>(o, at, c, w / 2, memory, ring);
  }
}

// A thread's rows of a tile's panel; a row's eight pieces of 16 bytes are with eight threads.
__device__ inline void gather_panel(unsigned char* panel, const bf16* from, int64_t token_stride, const int* tokens,
                                    bool inside) {
  const int thread = threadIdx.x % kGatherers, first = thread / 8;
  panel += first * 128 + (thread % 8 ^ first % 8) * 16, from += thread % 8 * 8;
#pragma unroll 4
  for (int row = 0; row < kQ; row += kGatherers / 8) {
    const int token = tokens[row + first];
    const bool valid = inside && token >= 0;
    copy_async(panel + row * 128, valid ? from + token * token_stride : nullptr, valid);
  }
}

// By kGatherers threads: tiles of tokens that are visited in an order.
template <int kPanels, Make kMake>
__device__ inline void gather(const ScanPlan& s, const Plan& o, const Block& at, unsigned char* memory,
                              const Ring& ring) {
  const int sets = o.sets < at.consumers ? o.sets : at.consumers, column = threadIdx.x % 8 * 8;
  int stage = 0, round = 0, before = -1;
#pragma unroll 1
  for (int w = 0; w < at.count; ++w) {
    const int* tokens = s.tokens + (at.b * at.chunks + at.chunk(w)) * int64_t{kQ};
    unsigned char* to = memory + stage * o.tiles.stage;
    if (round > 0) barrier_wait(&ring.empty[stage], round - 1);
#pragma unroll 1
    for (int i = 0; i < at.consumers; ++i) {
      const Source& from = at.sources[i];
#pragma unroll 1
      for (int k = 0; i < sets && k < kPanels; ++k) {
        unsigned char* panel = to + (i * kPanels + k) * kPanel;
        const bool inside = k * 64 + column < s.p.state_dim;
        if constexpr (has_output(kMake))
          gather_panel(panel, from.C + k * 64, s.direction(at.direction).C.token_stride, tokens, inside);
        gather_panel(panel + o.tiles.b, from.B + k * 64, s.direction(at.direction).B.token_stride, tokens, inside);
      }
      gather_panel(to + o.tiles.x + i * kPanel, from.x, s.p.x.token_stride, tokens,
                   from.x_column + column < s.p.head_dim);
    }
    copy_commit();
    if (before >= 0) {  // what the thread copied before has come
      copy_wait<1>();
      fence_proxy_async();
      barrier_arrive(&ring.full[before]);
    }
    before = stage;
    if (++stage == o.tiles.stages) stage = 0, ++round;
  }
  copy_wait<0>();
  fence_proxy_async();
  if (before >= 0) barrier_arrive(&ring.full[before]);
}

// A direction's record of a chunk.
struct Side {
  const unsigned char* record;

  __device__ const Visit* visits() const { return reinterpret_cast<const Visit*>(record); }
  __device__ const float* columns() const { return reinterpret_cast<const float*>(record + kColumn); }
  __device__ const float* leave() const { return reinterpret_cast<const float*>(record + kLeave); }
  // What flows from the state that enters into each of the two rows that a lane has.
  __device__ void arrive(float (&by)[2], int row0) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Visit to = visits()[row0 + lane_row() + k * 8];
      by[k] = fast_exp2(to.high + to.low) * to.weight;
    }
  }
};

// Four scores of a 16 x 8 block by the product of a row's and a column's factor: A's registers q and q + 1.
template <class T>
__device__ inline void decay_block(unsigned* m, const float (&value)[4], const float (&row)[2], const float* column) {
  const Vec<float, 2> by = *reinterpret_cast<const Vec<float, 2>*>(column + lane_column());
  m[0] = pack<T>(value[0] * (row[0] * by.v[0]), value[1] * (row[0] * by.v[1]));
  m[1] = pack<T>(value[2] * (row[1] * by.v[0]), value[3] * (row[1] * by.v[1]));
}

// Scores become M, as A fragments: rows row0 to row0 + 15 of the chunk; the forward direction on and below the
// diagonal, the reverse one on and above it.
template <class T, bool kForward, bool kReverse>
__device__ inline void decay_scores(unsigned (&m)[4][4], WarpgroupAccumulator& scores, const Side& forward,
                                    const Side& reverse, int warp) {
  const int row0 = warp * 16;
  const auto rows_of = [&](Visit(&to)[2], const Side& side) {
    to[0] = side.visits()[row0 + lane_row()], to[1] = side.visits()[row0 + lane_row() + 8];
  };
  const auto beside = [&](int k, const Visit(&to)[2], const Visit& anchor, const float* column) {
    float row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      row[i] = fast_exp2((to[i].high - anchor.high) + (to[i].low - anchor.low)) * to[i].weight;
#pragma unroll
    for (int part = 0; part < 2; ++part)
      decay_block<T>(m[k] + part * 2, scores.v[0][2 * k + part], row, column + k * 16 + part * 8);
  };
  Visit to[2], back[2];
  if constexpr (kForward) rows_of(to, forward);
  if constexpr (kReverse) rows_of(back, reverse);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k == warp) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int j = part * 8 + lane_column();
        float out[4] = {};
#pragma unroll
        for (int d = 0; d < 2; ++d) {
          if (d ? !kReverse : !kForward) continue;
          const Visit* visits = (d ? reverse : forward).visits();
          const Visit from[2] = {visits[row0 + j], visits[row0 + j + 1]};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const Visit &i = (d ? back : to)[e / 2], &other = from[e % 2];
            const float exponent = (i.high - other.high) + (i.low - other.low);
            const int from_row = j + e % 2, to_row = lane_row() + e / 2 * 8;
            const bool on = d ? from_row >= to_row : from_row <= to_row;
            out[e] += fast_exp2(on ? exponent : -INFINITY) * other.step * i.weight;
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) out[e] *= scores.v[0][2 * k + part][e];
        m[k][part * 2] = pack<T>(out[0], out[1]), m[k][part * 2 + 1] = pack<T>(out[2], out[3]);
      }
    } else if (k < warp && kForward) {
      beside(k, to, forward.visits()[k * 16 + 15], forward.columns());
    } else if (k > warp && kReverse) {
      beside(k, back, reverse.visits()[k * 16], reverse.columns());
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

#endif

}  // namespace slices
}  // namespace linmu
