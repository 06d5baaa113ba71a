// csrc/cuda/wgmma.cuh and tma.cuh in plain C++, for emulator.h: the warpgroup's product, its operands read as the PTX
// manual lays them out with the 128-byte swizzle, and TMA's copies, which arrive when their barrier is waited for, or
// when issued.
#pragma once
#include <cstdlib>
#include <vector>

namespace linmu {

inline int architecture(const char*) {
  const char* chosen = std::getenv("LINMU_CUDA_ARCH");
  return chosen ? std::atoi(chosen) : 80;
}

struct Descriptor {
  const unsigned char* first;
};
inline Descriptor make_descriptor(const void* first) {
  emulator::check_aligned(first);
  return {static_cast<const unsigned char*>(first)};
}

namespace emulator {

// What each of the 128 threads of a warpgroup holds of A.
struct AFragment {
  unsigned a[4];
};
inline const AFragment* exchange_in_warpgroup(const AFragment& mine) {
  static std::vector<AFragment> fragments(8 * 2 * 128);
  const int group = self().number / 128;
  AFragment* all = fragments.data() + (group * 2 + block->warpgroups[group].phase % 2) * 128;
  all[self().number % 128] = mine;
  arrive_and_wait(block->warpgroups[group]);
  return all;
}

// Bits 4 to 6 of an address in shared memory with bits 7 to 9 mixed in.
inline unsigned char* swizzled(const unsigned char* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<unsigned char*>(at ^ (at >> 7 & 7) << 4);
}
// Row r of 64 elements, and element c of it.
template <class T>
float value_at(const Descriptor& o, int r, int c) {
  T value;
  std::memcpy(&value, swizzled(o.first + r / 8 * 1024 + r % 8 * 128 + c * 2), sizeof(value));
  return to_float(value);
}

// Each thread of a warpgroup looks at 16 bytes of an operand, 64 x 16 or 16 x 64, whether they were fenced.
template <Major kMajor>
void check_operand(const Descriptor& o) {
  const int i = self().number % 128, row = kMajor == Major::K ? i / 2 : i / 8,
            piece = kMajor == Major::K ? i % 2 : i % 8;
  check_fenced(swizzled(o.first + row / 8 * 1024 + row % 8 * 128 + piece * 16));
}

inline int64_t products = 0;  // threads' shares, so far

// Issues a thread's share of a product; a(row, k) for its rows of the warpgroup's 64.
template <class T, Major kMajorB, class A>
void issue_product(WarpgroupAccumulator& d, const Descriptor& b, bool add, A a) {
  ++products;
  Thread& me = self();
  check_operand<kMajorB>(b);
  float* to = d.v[0][0];
  const bool first = !me.sums.count(to);
  Sums& sums = me.sums[to];
  for (int i = 0; i < 32; ++i) {
    if (first)
      sums.of[i] = to[i];
    else if (to[i] == to[i])
      fail("an accumulator is written while a product is on its way");
    to[i] = NAN;
  }
  ++sums.products;
  const int lane = me.number % kLanes, row0 = me.number % 128 / kLanes * 16 + lane / 4;
  Product product{to, [=](float* out) {
                    for (int i = 0; i < 32; ++i) {
                      const int row = row0 + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
                      float sum = 0;
                      for (int k = 0; k < 16; ++k)
                        sum += a(row, k) * (kMajorB == Major::MN ? value_at<T>(b, k, n) : value_at<T>(b, n, k));
                      out[i] = add ? out[i] + sum : sum;
                    }
                  }};
  sums.late |= comes_late();
  if (!sums.late) product.add(sums.of), product.add = nullptr;
  me.products.push_back(std::move(product));
}

inline void finish_products(size_t pending) {
  Thread& me = self();
  for (; me.product_groups.size() > pending; me.product_groups.pop_front())
    for (const Product& product : me.product_groups.front()) {
      Sums& sums = me.sums[product.to];
      if (product.add) product.add(sums.of);
      for (int i = 0; i < 32; ++i)
        if (product.to[i] == product.to[i]) fail("an accumulator is written while a product is on its way");
      if (--sums.products > 0) continue;
      std::memcpy(product.to, sums.of, sizeof(sums.of));
      me.sums.erase(product.to);
    }
}

}  // namespace emulator

template <class T, Major kMajorB>
inline void wgmma(WarpgroupAccumulator& d, const Descriptor& a, const Descriptor& b, bool add = true) {
  emulator::exchange_in_warpgroup({});
  emulator::check_operand<Major::K>(a);
  emulator::issue_product<T, kMajorB>(d, b, add, [=](int row, int k) { return emulator::value_at<T>(a, row, k); });
}
template <class T, Major kMajorB>
inline void wgmma(WarpgroupAccumulator& d, const unsigned (&a)[4], const Descriptor& b, bool add = true) {
  const emulator::AFragment* all = emulator::exchange_in_warpgroup({{a[0], a[1], a[2], a[3]}});
  // A row's values are with the four lanes that have its sums.
  struct {
    emulator::AFragment of[4];
  } mine;
  std::copy(all + emulator::self().number % 128 / 4 * 4, all + emulator::self().number % 128 / 4 * 4 + 4, mine.of);
  emulator::issue_product<T, kMajorB>(d, b, add, [=](int row, int k) {
    return to_float(T{emulator::bits_of(mine.of[k % 8 / 2].a[row % 16 / 8 + k / 8 * 2], k % 2)});
  });
}

inline Descriptor advance(const Descriptor& from, int bytes) { return {from.first + bytes}; }
template <int kMost = 4>
inline void warpgroup_sync(int = 0) {
  emulator::exchange_in_warpgroup({});
}
inline void warpgroup_arrive() {}
inline void warpgroup_commit() {
  emulator::self().product_groups.push_back(std::move(emulator::self().products));
  emulator::self().products.clear();
}
template <int kPending>
inline void warpgroup_wait() {
  emulator::finish_products(kPending);
}
inline void warpgroup_commit_and_wait() {
  warpgroup_commit();
  warpgroup_wait<0>();
}
template <int kRegisters>
inline void warpgroup_give_registers() {}
template <int kRegisters>
inline void warpgroup_take_registers() {}
inline void warpgroup_fence_operand(WarpgroupAccumulator&) {}
inline void fence_proxy_async() { emulator::note_fenced(); }

struct TensorMap {
  const uint16_t* data;
  int64_t sizes[4], strides[3];
  int box_rows;
};
inline bool encode_tensor_map(TensorMap& to, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                              int box_rows) {
  to = {static_cast<const uint16_t*>(data), {}, {}, box_rows};
  std::copy(sizes, sizes + 4, to.sizes), std::copy(strides, strides + 3, to.strides);
  for (const int64_t n : strides)
    if (n <= 0 || n * 2 % 16) return false;
  return *std::min_element(sizes, sizes + 4) > 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

struct Barrier {
  uint64_t state;
};
namespace emulator {
inline TransactionBarrier& transactions_of(Barrier* barrier) {
  if (!block->barriers.count(barrier)) fail("a barrier is used before it is made");
  return block->barriers[barrier];
}
// Ends the phase if all have arrived and all bytes have been asked for; `landing`: copies may arrive now.
inline bool end_phase(TransactionBarrier& b, bool landing) {
  if (b.arrived < b.count || b.issued != b.expected || (!b.copies.empty() && !landing)) return false;
  for (auto& copy : b.copies) copy();
  b.copies.clear();
  b.arrived = 0, b.expected = b.issued = 0, ++b.complete, ++block->progress;
  return true;
}
inline void arrive(Barrier* barrier, int64_t bytes) {
  TransactionBarrier& b = transactions_of(barrier);
  if (b.arrived == b.count)
    fail(bytes > 0 ? "a barrier expects a load before the last is complete"
                   : "more arrive at a barrier than it counts");
  ++b.arrived, b.expected += bytes;
  if (bytes == 0) end_phase(b, false);
}
inline void issue(Barrier* barrier, int64_t bytes, std::function<void()> copy) {
  TransactionBarrier& b = transactions_of(barrier);
  b.issued += bytes;
  if (comes_early())
    copy();
  else
    b.copies.push_back(std::move(copy));
}
}  // namespace emulator

inline void barrier_init(Barrier* barrier, int count = 1) {
  emulator::block->barriers[barrier] = {};
  emulator::block->barriers[barrier].count = count;
}
inline void barrier_arrive(Barrier* barrier) { emulator::arrive(barrier, 0); }
inline void barrier_expect_tx(Barrier* barrier, int bytes) { emulator::arrive(barrier, bytes); }
inline void barrier_wait(Barrier* barrier, int phase) {
  auto& b = emulator::transactions_of(barrier);
  while (b.complete % 2 == phase % 2)
    if (!emulator::end_phase(b, true)) emulator::yield_thread();
}
inline void tma_load_1d(void* shared, const void* global, int bytes, Barrier* barrier) {
  emulator::check_aligned(shared), emulator::check_aligned(global);
  if (bytes % 16) emulator::fail("a TMA copy is not of whole pieces of 16 bytes");
  emulator::issue(barrier, bytes, [=] {
    std::memcpy(shared, global, bytes);
    emulator::note_copied(shared, bytes);
  });
}
namespace emulator {
inline int64_t tma_boxes = 0;  // copied so far
}
inline void tma_load_box(void* shared, const TensorMap& from, int column, int row, int group, int batch,
                         Barrier* barrier) {
  ++emulator::tma_boxes;
  if (reinterpret_cast<uintptr_t>(shared) % 1024) emulator::fail("a swizzled box is not aligned to 1024 bytes");
  emulator::issue(barrier, from.box_rows * 128, [=] {
    emulator::note_copied(shared, from.box_rows * 128);
    for (int r = 0; r < from.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const int64_t at[4] = {column + c, row + r, group, batch};
        bool inside = true;
        for (int i = 0; i < 4; ++i) inside = inside && at[i] >= 0 && at[i] < from.sizes[i];
        const uint16_t value =
            inside ? from.data[at[0] + at[1] * from.strides[0] + at[2] * from.strides[1] + at[3] * from.strides[2]] : 0;
        std::memcpy(emulator::swizzled(static_cast<unsigned char*>(shared) + r * 128 + c * 2), &value, 2);
      }
  });
}

}  // namespace linmu
