// The pipeline that loads the tiles of the scan's output on sm_90a.
//
// Blocks are persistent and work through items: (chunk, head), the heads of a chunk after each other, so that what
// heads share stays where it is. The tiles of the next item are loaded while this one multiplies: into a stage of their
// own where shared memory has room for two, else as soon as this item is done with the one. Where tokens are visited in
// place one thread loads them by TMA; where an order scatters them, or rows are no whole pieces of 16 bytes, all
// threads gather rows with cp.async.
//
//     wait visits, B, C        M = C B^T, decayed   | loads of the next item
//     wait x                   Y = M X              | into free stages
//     wait states              Y += arrive C h      |
//     __syncthreads, advance                        | loads into the stages that this item had
#pragma once
#include "ssd_scan_output.cuh"
#include "tma.cuh"

namespace linmu {

enum Kind { kVisits, kB, kC, kX, kStates, kKinds };

// Where things lie in shared memory, in bytes.
struct PipelineTiles {
  int stages[kKinds];            // 1 or 2
  int at[kKinds], size[kKinds];  // of the first stage, of each
  int barriers, bytes;           // of each stage, side by side
  int segments, tokens;          // within the visits
  int sharing[kKinds];           // heads that need the same

  static constexpr PipelineTiles of(int chunk, int head_dim, int state_dim, int directions, bool separate) {
    PipelineTiles t{};
    const int sets = separate ? 2 : 1;
    t.segments = 2 * chunk * static_cast<int>(sizeof(Visit));
    t.tokens = t.segments + 2 * chunk * static_cast<int>(sizeof(int));
    t.size[kVisits] = t.tokens + chunk * static_cast<int>(sizeof(int));
    t.size[kB] = t.size[kC] = sets * state_dim * 2 * chunk;
    t.size[kX] = head_dim * 2 * chunk;
    t.size[kStates] = directions * head_dim * state_dim * 2;
    for (int& n : t.stages) n = 1;
    t.stages[kVisits] = 2;
    t.place();
    return t;
  }
  // Second stages where there is room: first for what no two heads share.
  constexpr void add_stages() {
    for (const bool shared : {false, true})
      for (const int kind : {kC, kX, kStates, kB}) {
        if (stages[kind] == 2 || (sharing[kind] > 1) != shared) continue;
        ++stages[kind];
        place();
        if (bytes <= kSharedSm90) continue;
        --stages[kind];
        place();
      }
  }
  constexpr void place() {
    bytes = 0;
    for (const int kind : {kB, kC, kX, kStates, kVisits}) at[kind] = bytes, bytes += stages[kind] * size[kind];
    barriers = bytes;
    bytes += 2 * kKinds * static_cast<int>(sizeof(Barrier));
  }
};
static_assert(PipelineTiles::of(128, 128, 128, 2, false).bytes <= kSharedSm90);
static_assert(PipelineTiles::of(64, 128, 128, 2, true).bytes <= kSharedSm90);

// The inputs as TMA sees them.
struct TensorMaps {
  TensorMap x, B[2], C[2], states[2];
};

#ifdef LINMU_WGMMA_CODE

// Loads the tiles of a block's items, each when a stage is free for it. All threads call all of it.
template <class T, int Q, bool kTma>
struct Pipeline {
  const ScanPlan& s;
  const Output& o;
  const PipelineTiles& tiles;
  const TensorMaps& maps;
  unsigned char* memory;
  unsigned begin, current, end;  // items: the first, the one at work, the first that is not the block's
  int first, last;               // directions

  __device__ Pipeline(const ScanPlan& plan, const Output& output, const PipelineTiles& where, const TensorMaps& of,
                      unsigned char* to)
      : s(plan), o(output), tiles(where), maps(of), memory(to) {
    const int64_t items = s.p.batch * s.chunks * s.p.heads;
    begin = current = static_cast<unsigned>(items * blockIdx.x / gridDim.x);
    end = static_cast<unsigned>(items * (blockIdx.x + 1) / gridDim.x);
    first = s.p.forward.on ? 0 : 1, last = s.p.reverse.on ? 1 : 0;
    if constexpr (kTma) {
      if (threadIdx.x == 0)
        for (int i = 0; i < 2 * kKinds; ++i) barrier_init(barrier(0, i));
      fence_proxy_async();
      __syncthreads();
    }
    load_all<2>(begin);
    load_all<1>(begin);
    load_all<2>(begin + 1);
  }

  __device__ unsigned head(unsigned item) const { return item % static_cast<unsigned>(s.p.heads); }
  __device__ unsigned chunk(unsigned item) const {
    return item / static_cast<unsigned>(s.p.heads) % static_cast<unsigned>(s.chunks);
  }
  __device__ unsigned batch(unsigned item) const {
    return item / static_cast<unsigned>(s.p.heads) / static_cast<unsigned>(s.chunks);
  }

  // After a barrier: the block is done with the current item.
  __device__ void advance() {
    // Opaque to the compiler, which would keep what follows from it in registers all along.
    current = opaque(current);
    load_all<1>(current + 1);
    load_all<2>(current + 2);
    ++current;
  }
  // Until the item's visits, B and C, or its x, or its states, are there.
  template <int kKind>
  __device__ void wait() {
    if constexpr (kTma) {
      if constexpr (kKind == kC) wait_for(kVisits), wait_for(kB);
      wait_for(kKind);
    } else {
      // Groups of copies since: of x and the states, and of what the next item has stages for.
      copy_wait<kKind == kC ? 3 : kKind == kX ? 2 : 1>();
      fence_proxy_async();
      __syncthreads();
    }
  }
  template <class U, int kKind>
  __device__ U* tile(int offset = 0) const {
    const int stage = load_index(kKind, current) % tiles.stages[kKind];
    return reinterpret_cast<U*>(memory + tiles.at[kKind] + stage * tiles.size[kKind] + offset);
  }

 private:
  __device__ Barrier* barrier(int kind, int stage) const {
    return reinterpret_cast<Barrier*>(memory + tiles.barriers) + kind * 2 + stage;
  }
  __device__ void wait_for(int kind) const {
    const int index = load_index(kind, current);
    barrier_wait(barrier(kind, index % tiles.stages[kind]), index / tiles.stages[kind]);
  }
  // Which of the block's loads of a kind an item needs: the heads of a group follow each other.
  __device__ int load_index(int kind, unsigned item) const {
    const unsigned heads = tiles.sharing[kind];
    return static_cast<int>(item / heads - begin / heads);
  }

  // The kinds with kDepth stages of which the item needs other tiles than the one before.
  template <int kDepth>
  __device__ void load_all(unsigned item) {
    load<kDepth, kVisits>(item), load<kDepth, kB>(item), load<kDepth, kC>(item);
    if constexpr (!kTma && kDepth == 1) copy_commit();
    load<kDepth, kX>(item);
    if constexpr (!kTma && kDepth == 1) copy_commit();
    load<kDepth, kStates>(item);
    if constexpr (!kTma) copy_commit();
  }
  template <int kDepth, int kKind>
  __device__ void load(unsigned item) {
    if (kTma && threadIdx.x > 0) return;
    if (item >= end || tiles.stages[kKind] != kDepth) return;
    const int index = load_index(kKind, item), stage = index % kDepth;
    if (item > begin && index == load_index(kKind, item - 1)) return;
    unsigned char* to = memory + tiles.at[kKind] + stage * tiles.size[kKind];
    if constexpr (kTma)
      load_tma<kKind>(to, item, barrier(kKind, stage));
    else
      load_rows<kKind>(to, item);
  }

  template <int kKind>
  __device__ void load_tma(unsigned char* to, unsigned item, Barrier* barrier) const {
    const int64_t h = head(item), c = chunk(item), b = batch(item);
    if constexpr (kKind == kVisits) {
      constexpr int kInts = Q * sizeof(int), kVisitBytes = Q * sizeof(Visit);
      barrier_expect_tx(barrier, (last - first + 1) * (kVisitBytes + kInts) + kInts);
      for (int d = first; d <= last; ++d) {
        tma_load_1d(to + d * kVisitBytes, s.visits[d] + s.rows(b, h, c), kVisitBytes, barrier);
        tma_load_1d(to + tiles.segments + d * kInts, s.segments[d] + s.rows(b, c), kInts, barrier);
      }
      tma_load_1d(to + tiles.tokens, s.tokens + s.rows(b, c), kInts, barrier);
    } else {
      barrier_expect_tx(barrier, tiles.size[kKind]);
      const auto box = [&](const TensorMap& from, int rows, int columns, int64_t row, int64_t group, int64_t batch) {
        for (int column = 0; column < columns; column += 64, to += rows * 128)
          tma_load_box(to, from, column, static_cast<int>(row), static_cast<int>(group), static_cast<int>(batch),
                       barrier);
      };
      if constexpr (kKind == kX) {
        box(maps.x, Q, o.head_dim, c * Q, h / tiles.sharing[kX], b);
      } else if constexpr (kKind == kStates) {
        for (int d = first; d <= last; ++d)
          box(maps.states[d], o.head_dim, o.state_dim, 0, (b * s.p.heads + h) * s.chunks + c, 0);
      } else {
        for (int d = first; d <= (o.separate ? last : first); ++d)
          box(kKind == kB ? maps.B[d] : maps.C[d], Q, o.state_dim, c * Q, h / tiles.sharing[kKind], b);
      }
    }
  }

  template <int kKind>
  __device__ void load_rows(unsigned char* to, unsigned item) const {
    const SsdScanParams& p = s.p;
    const int64_t h = head(item), c = chunk(item), b = batch(item);
    const int32_t* tokens = s.tokens + s.rows(b, c);
    if constexpr (kKind == kVisits) {
      const auto copy = [&](int at, const auto* from) {
        constexpr int kEach = 16 / sizeof(*from);
        for (int i = threadIdx.x * kEach; i < Q; i += blockDim.x * kEach)
          copy_async(to + at + i * static_cast<int>(sizeof(*from)), from + i, true);
      };
      for (int d = first; d <= last; ++d) {
        copy(d * Q * static_cast<int>(sizeof(Visit)), s.visits[d] + s.rows(b, h, c));
        copy(tiles.segments + d * Q * static_cast<int>(sizeof(int)), s.segments[d] + s.rows(b, c));
      }
      copy(tiles.tokens, tokens);
    }
    const auto rows_of = [&](const SsdScanTensor& t, int64_t groups, int columns, int64_t width, bool fast) {
      const T* from = group_of<T>(t, groups, b, h, p.heads);
      load_swizzled_tile<T>(reinterpret_cast<T*>(to), Q, columns, width, fast,
                            [&](int r) { return tokens[r] < 0 ? nullptr : from + tokens[r] * t.token_stride; });
      to += columns * 2 * Q;
    };
    if constexpr (kKind == kX) rows_of(p.x, p.groups_x, o.head_dim, p.head_dim, o.fast_x);
    if constexpr (kKind == kB || kKind == kC)
      for (int d = first; d <= (o.separate ? last : first); ++d) {
        if constexpr (kKind == kB) rows_of(s.direction(d).B, p.groups_b, o.state_dim, p.state_dim, o.fast_b[d]);
        if constexpr (kKind == kC) rows_of(s.direction(d).C, p.groups_c, o.state_dim, p.state_dim, o.fast_c[d]);
      }
    if constexpr (kKind == kStates)
      for (int d = first; d <= last; ++d) {
        const int64_t P = p.head_dim, N = p.state_dim;
        const T* state = static_cast<const T*>(o.entering[d]) + ((b * p.heads + h) * s.chunks + c) * P * N;
        load_swizzled_tile<T>(reinterpret_cast<T*>(to), o.head_dim, o.state_dim, N, o.fast_state,
                              [&](int r) { return r < P ? state + r * N : nullptr; });
        to += o.head_dim * o.state_dim * 2;
      }
  }
};

#endif

}  // namespace linmu
