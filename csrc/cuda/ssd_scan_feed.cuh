// How the scan's output on sm_90a comes by what it needs.
//
// A block stays on its multiprocessor and works through items: (chunk, head), the heads of a chunk after each other, so
// that what heads share stays where it is. The tiles of the next item come while this one multiplies: into a buffer of
// their own where shared memory has room for two, else as soon as this item is done with the one. Where tokens are
// visited in place one thread asks for them, in bulk copies; where an order scatters them, or rows are no whole pieces
// of 16 bytes, all threads gather rows.
#pragma once
#include "bulk.cuh"
#include "ssd_scan_output.cuh"

namespace linmu {

enum Kind { kVisits, kB, kC, kX, kStates, kKinds };

// Where things lie in shared memory, in bytes.
struct GroupTiles {
  int depth[kKinds];             // buffers, 1 or 2
  int at[kKinds], size[kKinds];  // of the first buffer, of each
  int barriers, bytes;           // of each buffer, side by side
  int segments, tokens;          // within the visits
  int sharing[kKinds];           // heads that need the same

  static constexpr GroupTiles of(int chunk, int head_dim, int state_dim, int directions, bool separate) {
    GroupTiles t{};
    const int sets = separate ? 2 : 1;
    t.segments = 2 * chunk * static_cast<int>(sizeof(Visit));
    t.tokens = t.segments + 2 * chunk * static_cast<int>(sizeof(int));
    t.size[kVisits] = t.tokens + chunk * static_cast<int>(sizeof(int));
    t.size[kB] = t.size[kC] = sets * state_dim * 2 * chunk;
    t.size[kX] = head_dim * 2 * chunk;
    t.size[kStates] = directions * head_dim * state_dim * 2;
    for (int& n : t.depth) n = 1;
    t.depth[kVisits] = 2;
    t.place();
    return t;
  }
  // Second buffers where there is room: first for what no two heads share.
  constexpr void widen() {
    for (const bool shared : {false, true})
      for (const int kind : {kC, kX, kStates, kB}) {
        if (depth[kind] == 2 || (sharing[kind] > 1) != shared) continue;
        ++depth[kind];
        place();
        if (bytes <= kSharedSm90) continue;
        --depth[kind];
        place();
      }
  }
  constexpr void place() {
    bytes = 0;
    for (const int kind : {kB, kC, kX, kStates, kVisits}) at[kind] = bytes, bytes += depth[kind] * size[kind];
    barriers = bytes;
    bytes += 2 * kKinds * static_cast<int>(sizeof(Barrier));
  }
};
static_assert(GroupTiles::of(128, 128, 128, 2, false).bytes <= kSharedSm90);
static_assert(GroupTiles::of(64, 128, 128, 2, true).bytes <= kSharedSm90);

// The inputs as bulk copies see them.
struct Maps {
  TensorMap x, B[2], C[2], states[2];
};

#ifdef LINMU_GROUP_CODE

// Brings the tiles of a block's items, each when there is a buffer for it. All threads call all of it.
template <class T, int Q, bool kBulk>
struct Feed {
  const ScanPlan& s;
  const Output& o;
  const GroupTiles& tiles;
  const Maps& maps;
  unsigned char* memory;
  unsigned begin, now, end;  // items: the first, the one at work, the first that is not the block's
  int first, last;           // directions

  __device__ Feed(const ScanPlan& plan, const Output& output, const GroupTiles& where, const Maps& of,
                  unsigned char* to)
      : s(plan), o(output), tiles(where), maps(of), memory(to) {
    const int64_t items = s.p.batch * s.chunks * s.p.heads;
    begin = now = static_cast<unsigned>(items * blockIdx.x / gridDim.x);
    end = static_cast<unsigned>(items * (blockIdx.x + 1) / gridDim.x);
    first = s.p.forward.on ? 0 : 1, last = s.p.reverse.on ? 1 : 0;
    if constexpr (kBulk) {
      if (threadIdx.x == 0)
        for (int i = 0; i < 2 * kKinds; ++i) barrier_init(barrier(0, i));
      group_publish();
      __syncthreads();
    }
    bring_all<2>(begin);
    bring_all<1>(begin);
    bring_all<2>(begin + 1);
  }

  __device__ unsigned head(unsigned item) const { return item % static_cast<unsigned>(s.p.heads); }
  __device__ unsigned chunk(unsigned item) const {
    return item / static_cast<unsigned>(s.p.heads) % static_cast<unsigned>(s.chunks);
  }
  __device__ unsigned batch(unsigned item) const {
    return item / static_cast<unsigned>(s.p.heads) / static_cast<unsigned>(s.chunks);
  }

  // After a barrier: the block is done with the item of now.
  __device__ void step() {
    // Opaque to the compiler, which would keep what follows from it in registers all along.
    now = opaque(now);
    bring_all<1>(now + 1);
    bring_all<2>(now + 2);
    ++now;
  }
  // Until the item's visits, B and C, or its x, or its states, are there.
  template <int kKind>
  __device__ void wait() {
    if constexpr (kBulk) {
      if constexpr (kKind == kC) wait_for(kVisits), wait_for(kB);
      wait_for(kKind);
    } else {
      // Groups of copies since: of x and the states, and of what the next item has buffers for.
      copy_wait<kKind == kC ? 3 : kKind == kX ? 2 : 1>();
      group_publish();
      __syncthreads();
    }
  }
  template <class U, int kKind>
  __device__ U* tile(int offset = 0) const {
    const int buffer = load_of(kKind, now) % tiles.depth[kKind];
    return reinterpret_cast<U*>(memory + tiles.at[kKind] + buffer * tiles.size[kKind] + offset);
  }

 private:
  __device__ Barrier* barrier(int kind, int buffer) const {
    return reinterpret_cast<Barrier*>(memory + tiles.barriers) + kind * 2 + buffer;
  }
  __device__ void wait_for(int kind) const {
    const int load = load_of(kind, now);
    barrier_wait(barrier(kind, load % tiles.depth[kind]), load / tiles.depth[kind]);
  }
  // Which of the block's loads of a kind an item needs: the heads of a group follow each other.
  __device__ int load_of(int kind, unsigned item) const {
    const unsigned heads = tiles.sharing[kind];
    return static_cast<int>(item / heads - begin / heads);
  }

  // What has kDepth buffers, and of which the item needs others than the one before.
  template <int kDepth>
  __device__ void bring_all(unsigned item) {
    bring<kDepth, kVisits>(item), bring<kDepth, kB>(item), bring<kDepth, kC>(item);
    if constexpr (!kBulk && kDepth == 1) copy_commit();
    bring<kDepth, kX>(item);
    if constexpr (!kBulk && kDepth == 1) copy_commit();
    bring<kDepth, kStates>(item);
    if constexpr (!kBulk) copy_commit();
  }
  template <int kDepth, int kKind>
  __device__ void bring(unsigned item) {
    if (kBulk && threadIdx.x > 0) return;
    if (item >= end || tiles.depth[kKind] != kDepth) return;
    const int load = load_of(kKind, item), buffer = load % kDepth;
    if (item > begin && load == load_of(kKind, item - 1)) return;
    unsigned char* to = memory + tiles.at[kKind] + buffer * tiles.size[kKind];
    if constexpr (kBulk)
      ask<kKind>(to, item, barrier(kKind, buffer));
    else
      gather<kKind>(to, item);
  }

  template <int kKind>
  __device__ void ask(unsigned char* to, unsigned item, Barrier* barrier) const {
    const int64_t h = head(item), c = chunk(item), b = batch(item);
    if constexpr (kKind == kVisits) {
      constexpr int kInts = Q * sizeof(int), kVisitBytes = Q * sizeof(Visit);
      barrier_promise(barrier, (last - first + 1) * (kVisitBytes + kInts) + kInts);
      for (int d = first; d <= last; ++d) {
        copy_bulk(to + d * kVisitBytes, s.visits[d] + s.rows(b, h, c), kVisitBytes, barrier);
        copy_bulk(to + tiles.segments + d * kInts, s.segments[d] + s.rows(b, c), kInts, barrier);
      }
      copy_bulk(to + tiles.tokens, s.tokens + s.rows(b, c), kInts, barrier);
    } else {
      barrier_promise(barrier, tiles.size[kKind]);
      const auto box = [&](const TensorMap& from, int rows, int columns, int64_t row, int64_t group, int64_t batch) {
        for (int column = 0; column < columns; column += 64, to += rows * 128)
          copy_box(to, from, column, static_cast<int>(row), static_cast<int>(group), static_cast<int>(batch), barrier);
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
  __device__ void gather(unsigned char* to, unsigned item) const {
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
      load_group_tile<T>(reinterpret_cast<T*>(to), Q, columns, width, fast,
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
        load_group_tile<T>(reinterpret_cast<T*>(to), o.head_dim, o.state_dim, N, o.fast_state,
                           [&](int r) { return r < P ? state + r * N : nullptr; });
        to += o.head_dim * o.state_dim * 2;
      }
  }
};

#endif

}  // namespace linmu
