// What the scan and its gradient share. A chunk is `chunk` visits; three kinds of kernels work on it:
//
//     visits             per chunk           their tokens; per head the step, the cumulative log-decay, the weight
//     states             per head, in order  the state that enters each chunk, in either direction; or its adjoint
//     output, gradients  per (chunk, head)   from the chunk's tiles and the states that enter it
//
// Within a chunk, direction d weighs visit j in visit i's output by exp(S_i - S_j), S the cumulative log-decay from the
// side where the direction enters, or the visit's segment begins. S is summed in double and kept as high + low floats,
// in base 2, so that a difference is as exact as the steps between, however long or steep the chunk is; exponents above
// 0 are never taken.
//
// What is not finite may reach only the visits that see it, but a product over visits spreads 0 * NaN to all of them.
// The kernels note, per (chunk, head), where such a value is, and `exact` makes the output of those chunks anew,
// without tensor cores. A visit without step or weight has no part.
#pragma once
#include "../linmu/ssd_scan.h"
#include "tile.cuh"

namespace linmu {

// One head, direction and visit. 16 bytes, so that it can be copied asynchronously.
struct alignas(16) Visit {
  float high, low;  // S_i / ln 2
  float step;       // dt after bias and softplus; 0 where the visit is skipped
  float weight;     // of this direction in the output
};

// A chunk of 64 visits can forget less (see kSteepest), so that decays across a restart are exactly 0.
constexpr double kRestart = -0x1p16;

struct ScanPlan {
  SsdScanParams p;
  int chunk;               // a multiple of 32
  int64_t chunks;          // per row
  int64_t first_chunk;     // of the row; a plan may be for a range of its chunks
  int32_t* tokens;         // (B, chunks, chunk) position visited, -1 beyond L
  int32_t* segments[2];    // (B, chunks, chunk) restarts between the chunk's entry and the visit, per direction
  Visit* visits[2];        // (B, H, chunks, chunk)
  float* leave[2];         // (B, H, chunks, chunk) what flows from the visit's input into the state that leaves
  float* arrive[2];        // (B, H, chunks, chunk) what flows from the state that enters into the visit's output
  float* through[2];       // (B, H, chunks) what flows from one into the other
  unsigned char* spoiled;  // (B, H, chunks) whether something in it, or in the state that enters, is odd
  // Only of a scan by slices, else null. There S steps by kRestart at a restart.
  float* columns[2];    // (B, H, chunks, chunk) the step, decayed up to the visit of its 16 where the direction leaves
  unsigned char* redo;  // (B, H) whether the states and the spoiled chunks are to be made anew

  __host__ __device__ const SsdScanDirection& direction(int d) const { return d ? p.reverse : p.forward; }
  __host__ __device__ int64_t rows(int64_t b, int64_t c) const { return (b * chunks + c) * chunk; }
  __host__ __device__ int64_t rows(int64_t b, int64_t h, int64_t c) const { return rows(b * p.heads + h, c); }
};

// Whether the caller's initial and final state are this direction's: the forward one's where it runs.
__host__ __device__ inline bool callers_states(const SsdScanParams& p, int direction) {
  return direction == 0 || !p.forward.on;
}

// What a block needs to know of its chunk of Q visits, for directions first to last.
__device__ inline void read_visits(const ScanPlan& s, int Q, int64_t b, int64_t h, int64_t c, int first, int last,
                                   int* tokens, int* segments, Visit* visits, int thread, int threads) {
  for (int i = thread; i < Q; i += threads) {
    tokens[i] = s.tokens[s.rows(b, c) + i];
    for (int d = first; d <= last; ++d) {
      segments[d * Q + i] = s.segments[d][s.rows(b, c) + i];
      visits[d * Q + i] = s.visits[d][s.rows(b, h, c) + i];
    }
  }
}

// Plans and launches `visits`, for a range of the chunks or for all.
ScanPlan plan_scan(const SsdScanParams& p, int chunk, int64_t first, int64_t chunks, const CudaContext& context);
ScanPlan plan_scan(const SsdScanParams& p, int chunk, const CudaContext& context);
ScanPlan plan_slices(const SsdScanParams& p, const CudaContext& context);

// One direction of `states`: along its visits, or, for the adjoint, against them.
struct Walk {
  SsdScanTensor rows, columns;  // x and B; for the adjoint the gradient of y, and C
  int64_t row_groups, column_groups;
  bool fast_rows, fast_columns;  // aligned to 16 bytes
  int direction;
  bool adjoint;
  const float* initial;  // (B, H, P, N), or null
  float* leaving;        // the state after the last visit (B, H, P, N), or null
  void* entering;        // (B, H, chunks, P, N) of float if wide, else of the inputs' type
  bool wide;
  bool exact;  // the state's sums take more than one rounding to the inputs' type
};

// Where the plan has `redo`, only of the heads that it names.
void walk_states(const ScanPlan& plan, const Walk* walks, int count, const CudaContext& context);

// What each span but the last adds to a direction's state (B, H, spans, P, N), and what is left of it by then
// (B, H, spans): the first becomes the state that enters each span.
void enter_spans(const ScanPlan& plan, int direction, float* states, float* through, int64_t spans,
                 const CudaContext& context);

// The state entering each chunk, in each direction that is on.
Walk forward_walk(const ScanPlan& plan, int direction, bool wide, bool exact, const CudaContext& context);

template <class T>
T* allocate(const CudaContext& context, int64_t count) {
  return static_cast<T*>(context.allocate((count > 0 ? count : 1) * static_cast<int64_t>(sizeof(T))));
}

// Whether each row of each token can be read in pieces of 16 bytes.
inline bool fast_rows(const SsdScanTensor& t, int64_t width, DType dtype) {
  const int64_t size = element_size(dtype);
  for (int64_t n : {width, t.batch_stride, t.token_stride, t.group_stride})
    if (n * size % 16) return false;
  return aligned(t.data, 16);
}

// Half precision ends at 65504. Wide states (B, H, chunks, P, N) become halves, each divided by the power of two that
// comes back for it (B, H, chunks); narrow may be null.
const float* narrow_states(const ScanPlan& plan, const float* wide, half16* narrow, const CudaContext& context);

// First element of (batch, group) of a tensor of T.
template <class T>
__device__ inline const T* group_of(const SsdScanTensor& t, int64_t groups, int64_t b, int64_t h, int64_t heads) {
  return static_cast<const T*>(t.data) + b * t.batch_stride + h / (heads / groups) * t.group_stride;
}

// exp(S_i - S_j) where on, else 0.
__device__ inline float decay(const Visit& to, const Visit& from, bool on) {
  return exp2f(on ? (to.high - from.high) + (to.low - from.low) : -INFINITY);
}
__device__ inline float decay(const Visit& to, bool on) { return exp2f(on ? to.high + to.low : -INFINITY); }

// A lane's pairs of visits in an M x N accumulator that begins at (i0, j0), in one direction of a chunk: visit i, a
// row, sees visit j, a column, where that was visited before it, or is itself, with no restart between. f(value's row
// part, column, element; i, to; j, from; whether i sees j)
template <int M, int N, class F>
__device__ inline void each_pair_of_visits(const Visit* visits, const int* segments, bool reverse, int i0, int j0,
                                           F&& f) {
  const auto row = [&](int k) { return i0 + k / 2 * 16 + k % 2 * 8 + lane_row(); };
  const auto column = [&](int l) { return j0 + l / 2 * 8 + lane_column() + l % 2; };
  const auto pair = [&](int k, int l, const Visit& to, int to_segment, const Visit& from, int from_segment) {
    const int i = row(k), j = column(l);
    f(k, l, i, to, j, from, (reverse ? j >= i : j <= i) && to_segment == from_segment);
  };
  if constexpr (M / 8 < N / 4) {  // what there is less of stays in registers
    Visit to[M / 8];
    int mine[M / 8];
#pragma unroll
    for (int k = 0; k < M / 8; ++k) to[k] = visits[row(k)], mine[k] = segments[row(k)];
#pragma unroll
    for (int l = 0; l < N / 4; ++l) {
      const Visit from = visits[column(l)];
      const int other = segments[column(l)];
#pragma unroll
      for (int k = 0; k < M / 8; ++k) pair(k, l, to[k], mine[k], from, other);
    }
  } else {
#pragma unroll
    for (int k = 0; k < M / 8; ++k) {
      const Visit to = visits[row(k)];
      const int mine = segments[row(k)];
#pragma unroll
      for (int l = 0; l < N / 4; ++l) pair(k, l, to, mine, visits[column(l)], segments[column(l)]);
    }
  }
}

}  // namespace linmu
