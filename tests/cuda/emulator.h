// Runs CUDA kernels on a CPU, thread by thread: what csrc/cuda/device.cuh and mma.cuh take from CUDA, in plain C++.
//
// A block's threads are fibers of one host thread. They run until a barrier, or an instruction that a warp executes
// together, where they wait for each other as on a GPU; a warp runs as far as it can before the next one begins, in odd
// blocks from last to first. Shared memory begins as NaN, ends at a canary, and asynchronous copies arrive when waited
// for, not before; in some blocks, TMA's copies as soon as issued. A warpgroup's products are computed when issued or,
// in other blocks, when waited for, and their sums are NaN until then. With LINMU_EMULATED_SEED, warpgroups take turns
// of random lengths in a random order instead, and copies and products come early or late at random.
//
// An error is: a misaligned copy, a warp that diverges at a shared instruction, a deadlock, and a product that reads 16
// bytes which a thread wrote by stmatrix or cp.async without a fence of its own since. Not emulated: the rounding of
// the tensor cores' sums (here float, in order), memory ordering within a warp (but see add_apart), and fences of what
// plain stores wrote.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/linmu/common.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace linmu {
namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 * 1024, kCanary = 64, kAlign = 1024;

// What a lane brings to an instruction of the whole warp.
struct LaneOperand {
  int instruction;
  union {
    double number;
    const void* address;
    unsigned fragment[6];
  };
};

struct Warp {
  int arrived = 0, live = 0;
  uint64_t phase = 0;
  LaneOperand operands[2][kLanes];  // by phase: nobody is two instructions ahead of a lane that still reads
};

struct WarpgroupSync {
  int arrived = 0, live = 4 * kLanes;
  uint64_t phase = 0;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

// A barrier that counts arrivals, and the bytes of TMA's copies.
struct TransactionBarrier {
  int count = 1, arrived = 0, complete = 0;  // of the phase; phases
  int64_t expected = 0, issued = 0;
  std::deque<std::function<void()>> copies;
};

// A product of a warpgroup that is on its way: for the sums at `to`, which are poisoned until it is waited for.
struct Product {
  float* to;
  std::function<void(float*)> add;  // to a lane's 32 sums; null if that is done
};
struct Sums {
  float of[32];
  int products = 0;   // on their way
  bool late = false;  // none is computed before one that was issued earlier
};

struct Thread {
  dim3 index;
  int number;
  bool begun = false, done = false;
  jmp_buf place;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  std::vector<int> unfenced;  // pieces of 16 bytes of shared memory that it wrote
  std::deque<std::vector<Product>> product_groups;
  std::vector<Product> products;
  std::map<float*, Sums> sums;
};

struct Block {
  dim3 index, size, grid;
  std::vector<unsigned char> shared;  // with a canary after it, and before it what alignment takes
  unsigned char *memory, *beyond;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<WarpgroupSync> warpgroups;
  std::function<void()> body;
  std::map<const void*, TransactionBarrier> barriers;
  int arrived = 0, live = 0;
  uint64_t phase = 0, progress = 0;
  bool backwards = false, early = false, late = false;  // warps; TMA's copies; products
  bool random = false;
  uint64_t seed = 0;
  std::vector<int> writer;  // of each 16 bytes of shared memory: the thread that has not fenced it since, or -1
  std::string error;
  jmp_buf scheduler;
  Thread* running = nullptr;
};

inline Block* block = nullptr;
inline Thread& self() { return *block->running; }

inline unsigned draw(Block& b, unsigned below) {
  b.seed = b.seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>(b.seed >> 33) % below;
}
inline bool comes_early() { return block->random ? draw(*block, 2) : block->early; }
inline bool comes_late() { return block->random ? draw(*block, 2) : block->late; }

inline void yield_thread() {
  if (_setjmp(self().place) == 0) _longjmp(block->scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& what) {
  block->error = what + ", thread " + std::to_string(self().number) + " of block (" + std::to_string(block->index.x) +
                 ", " + std::to_string(block->index.y) + ", " + std::to_string(block->index.z) + ")";
  _longjmp(block->scheduler, 1);
}

// Number of the 16 bytes of shared memory at p, or -1.
inline int piece_of(const void* p) {
  const unsigned char* at = static_cast<const unsigned char*>(p);
  return at >= block->memory && at < block->beyond ? static_cast<int>((at - block->memory) / 16) : -1;
}
// The running thread wrote 16 bytes; an asynchronous copy did; all that the thread wrote is fenced.
inline void note_written(const void* p) {
  if (const int piece = piece_of(p); piece >= 0) {
    block->writer[piece] = self().number;
    self().unfenced.push_back(piece);
  }
}
inline void note_copied(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 16)
    if (const int piece = piece_of(static_cast<const char*>(p) + i); piece >= 0) block->writer[piece] = -1;
}
inline void note_fenced() {
  for (const int piece : self().unfenced)
    if (block->writer[piece] == self().number) block->writer[piece] = -1;
  self().unfenced.clear();
}
inline void check_fenced(const void* p) {
  if (const int piece = piece_of(p); piece >= 0 && block->writer[piece] >= 0)
    fail("a product reads what thread " + std::to_string(block->writer[piece]) + " has not fenced");
}

template <class SyncPoint>
void arrive_and_wait(SyncPoint& point) {
  const uint64_t phase = point.phase;
  if (++point.arrived == point.live) {
    point.arrived = 0, ++point.phase, ++block->progress;
    return;
  }
  while (point.phase == phase) yield_thread();
}
// Threads that have returned are not waited for.
template <class SyncPoint>
void arrive_and_drop(SyncPoint& point) {
  if (--point.live > 0 && point.arrived == point.live) point.arrived = 0, ++point.phase;
}

// Waits for all lanes of the warp, and returns what each of them brought.
inline const LaneOperand* exchange(const LaneOperand& mine) {
  Warp& warp = block->warps[self().number / kLanes];
  LaneOperand* operands = warp.operands[warp.phase % 2];
  operands[self().number % kLanes] = mine;
  const int lanes = warp.live;
  arrive_and_wait(warp);
  if (lanes != kLanes) fail("a shared instruction needs all lanes of a warp");
  for (int i = 0; i < kLanes; ++i)
    if (operands[i].instruction != mine.instruction) fail("a warp diverges at a shared instruction");
  return operands;
}

inline void finish_copies(size_t pending) {
  auto& groups = self().groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
      note_written(copy.to);
    }
}

inline void enter_fiber() {
  block->body();
  Thread& me = self();
  if (!me.sums.empty()) fail("a product is never waited for");
  me.done = true;
  ++block->progress;
  arrive_and_drop(*block);
  arrive_and_drop(block->warps[me.number / kLanes]);
  _longjmp(block->scheduler, 1);
}

// Stacks are kept; each fiber begins on a fresh context.
inline void* stack_of(int thread) {
  static std::vector<void*> stacks;
  while (static_cast<int>(stacks.size()) <= thread)
    stacks.push_back(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return stacks[thread];
}

// Runs a thread until it waits or ends.
inline void resume(Block& b, Thread& t) {
  static ucontext_t fiber, back;
  b.running = &t;
  if (_setjmp(b.scheduler) != 0) return;
  if (t.begun) _longjmp(t.place, 1);
  t.begun = true;
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = stack_of(t.number), fiber.uc_stack.ss_size = kStack, fiber.uc_link = nullptr;
  makecontext(&fiber, enter_fiber, 0);
  swapcontext(&back, &fiber);
}

// Runs threads until none of them can go on: a warp's before its warpgroup's, and those before the block's. So others
// are no further than a barrier has made them, and one that is missing shows.
inline void run_until_stuck(Block& b, int from, int to, unsigned rounds = UINT32_MAX) {
  const int step = to - from > 4 * kLanes ? 4 * kLanes : to - from > kLanes ? kLanes : 1;
  const int parts = (to - from + step - 1) / step;
  uint64_t before;
  do {
    before = b.progress;
    const bool drawn = b.random && step > kLanes;
    const int turn = drawn ? static_cast<int>(draw(b, parts)) : 0;
    for (int k = 0; k < parts && b.error.empty(); ++k) {
      const int first = from + ((b.backwards ? parts - 1 - k : k) + turn) % parts * step;
      if (step > 1)
        run_until_stuck(b, first, std::min(first + step, to), drawn ? 1 + draw(b, 4) : UINT32_MAX);
      else if (!b.threads[first].done)
        resume(b, b.threads[first]);
    }
  } while (b.progress != before && b.error.empty() && --rounds > 0);
}

inline void run_block(Block& b) {
  block = &b;
  const int count = static_cast<int>(b.size.x);
  b.threads = std::vector<Thread>(count);
  b.warps = std::vector<Warp>((count + kLanes - 1) / kLanes);
  b.warpgroups = std::vector<WarpgroupSync>((b.warps.size() + 3) / 4);
  b.live = count;
  b.barriers.clear();
  for (int i = 0; i < count; ++i) {
    b.threads[i].index = dim3(i), b.threads[i].number = i;
    ++b.warps[i / kLanes].live;
  }
  run_until_stuck(b, 0, count);
  if (b.error.empty() && b.live > 0) b.error = "deadlock: the threads of a block wait for different things";
  if (!b.error.empty()) throw std::runtime_error("emulator: " + b.error);
  for (size_t i = 0; i < kCanary; ++i)
    if (b.beyond[i] != 0xFF) throw std::runtime_error("emulator: a write beyond shared memory");
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("an access of 16 bytes is not aligned");
}

inline uint16_t bits_of(unsigned pair, int half) { return static_cast<uint16_t>(pair >> (16 * half)); }

}  // namespace emulator
}  // namespace linmu

#define threadIdx (::linmu::emulator::self().index)
#define blockIdx (::linmu::emulator::block->index)
#define blockDim (::linmu::emulator::block->size)
#define gridDim (::linmu::emulator::block->grid)
#define LINMU_SHARED(name) unsigned char* name = ::linmu::emulator::block->memory

inline void __syncthreads() { linmu::emulator::arrive_and_wait(*linmu::emulator::block); }

namespace linmu {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const unsigned bits = static_cast<unsigned>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_float(half16 x) {
  f16 value;
  std::memcpy(&value, &x, 2);
  return static_cast<float>(value);
}
template <class T>
inline T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, half16>) {
    const f16 value = static_cast<f16>(x);
    half16 out;
    std::memcpy(&out, &value, 2);
    return out;
  } else {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  }
}

inline double shuffle_xor(double x, int mask) {
  emulator::LaneOperand mine{1, {}};
  mine.number = x;
  return emulator::exchange(mine)[(emulator::self().number ^ mask) % emulator::kLanes].number;
}
inline double shuffle(double x, int lane) {
  emulator::LaneOperand mine{5, {}};
  mine.number = x;
  return emulator::exchange(mine)[lane % emulator::kLanes].number;
}
inline float shuffle(float x, int lane) { return static_cast<float>(shuffle(static_cast<double>(x), lane)); }
inline bool warp_any(bool x) {
  emulator::LaneOperand mine{7, {}};
  mine.number = x;
  const emulator::LaneOperand* all = emulator::exchange(mine);
  bool any = false;
  for (int i = 0; i < emulator::kLanes; ++i) any |= all[i].number != 0;
  return any;
}
inline bool all_differ(int64_t x) {
  emulator::LaneOperand mine{9, {}};
  mine.number = static_cast<double>(x);
  const emulator::LaneOperand* all = emulator::exchange(mine);
  int same = 0;
  for (int i = 0; i < emulator::kLanes; ++i)
    for (int j = 0; j < i; ++j) same += all[i].number == all[j].number;
  return same == 0;
}
inline void add_apart(float* to, float x) {
  emulator::LaneOperand mine{10, {}};
  mine.address = to;
  const emulator::LaneOperand* all = emulator::exchange(mine);
  for (int i = 0; i < emulator::kLanes; ++i)
    if (to && all[i].address == to && i != emulator::self().number % emulator::kLanes)
      emulator::fail("two lanes of a warp add to the same place");
  if (to) *to += x;
}
inline int warp_uniform(int x) { return x; }
inline float fast_exp2(float x) { return x < -126.f ? 0.f : exp2f(x); }
template <class T>
inline T opaque(T x) {
  return x;
}
inline void sync_warp() { emulator::exchange({6, {}}); }
template <class T>
inline unsigned pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<unsigned>(from_float<T>(second).bits) << 16;
}
inline float shuffle_xor(float x, int mask) { return static_cast<float>(shuffle_xor(static_cast<double>(x), mask)); }

template <class T>
inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const emulator::LaneOperand* all = emulator::exchange({2, {.fragment = {a[0], a[1], a[2], a[3], b0, b1}}});
  const int lane = emulator::self().number % emulator::kLanes;
  const auto at = [&](int other, int fragment, int half) {
    return to_float(T{emulator::bits_of(all[other].fragment[fragment], half)});
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, column = lane % 4 * 2 + e % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += at(row * 4 + k % 8 / 2, e / 2 + k / 8 * 2, k % 2) * at(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    d[e] += sum;
  }
}

inline void ldmatrix_as(unsigned (&r)[4], const void* row, bool transposed) {
  emulator::check_aligned(row);
  emulator::LaneOperand mine{transposed ? 4 : 3, {}};
  mine.address = row;
  const emulator::LaneOperand* all = emulator::exchange(mine);
  const int g = emulator::self().number % emulator::kLanes / 4, t = emulator::self().number % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int r = transposed ? 2 * t + half : g, c = transposed ? g : 2 * t + half;
      pair[half] = static_cast<const uint16_t*>(all[8 * i + r].address)[c];
    }
    r[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
}
inline void ldmatrix(unsigned (&r)[4], const void* row) { ldmatrix_as(r, row, false); }
inline void ldmatrix_transposed(unsigned (&r)[4], const void* row) { ldmatrix_as(r, row, true); }

namespace emulator {
inline int64_t stored_matrices = 0;  // so far
}
inline void stmatrix(void* row, unsigned a, unsigned b, unsigned c, unsigned d) {
  emulator::check_aligned(row);
  ++emulator::stored_matrices;
  emulator::LaneOperand mine{8, {}};
  mine.address = row;
  const emulator::LaneOperand* all = emulator::exchange(mine);
  const int lane = emulator::self().number % emulator::kLanes;
  const unsigned values[4] = {a, b, c, d};
  emulator::note_written(row);
  for (int i = 0; i < 4; ++i)
    std::memcpy(const_cast<char*>(static_cast<const char*>(all[8 * i + lane / 4].address)) + lane % 4 * 4, &values[i],
                4);
}

inline void copy_async(void* shared, const void* global, bool valid) {
  emulator::check_aligned(shared), emulator::check_aligned(global);
  emulator::self().open.push_back({shared, valid ? global : nullptr});
}
inline void copy_commit() {
  emulator::self().groups.push_back(std::move(emulator::self().open));
  emulator::self().open.clear();
}
template <int kPending>
inline void copy_wait() {
  emulator::finish_copies(kPending);
}

// LINMU_EMULATED_SHARED makes it less, so that what a small chip does runs too.
inline int64_t shared_limit() {
  const char* less = std::getenv("LINMU_EMULATED_SHARED");
  return less ? std::atoll(less) : 227 * 1024;
}

// LINMU_EMULATED_WORKSPACE makes it less, so that a short sequence comes in ranges too.
inline int64_t workspace_limit() {
  const char* less = std::getenv("LINMU_EMULATED_WORKSPACE");
  return less ? std::atoll(less) : kWorkspace;
}

// Few, so that a block that stays has more than one thing to do.
inline int64_t multiprocessors() { return 3; }

template <class... Formal, class... Actual>
void launch(const char* op, void (*kernel)(Formal...), dim3 blocks, int threads, int64_t shared, const CudaContext&,
            Actual&&... arguments) {
  check_shared(op, shared, shared_limit());
  if (blocks.y > 65535 || blocks.z > 65535) throw std::runtime_error(std::string(op) + ": CUDA: the grid is too large");
  emulator::Block b;
  b.size = dim3(threads), b.grid = blocks;
  b.body = [&] { kernel(static_cast<Formal>(arguments)...); };
  const char* seed = std::getenv("LINMU_EMULATED_SEED");
  b.random = seed != nullptr, b.seed = seed ? std::strtoull(seed, nullptr, 10) : 0;
  for (b.index.z = 0; b.index.z < blocks.z; ++b.index.z)
    for (b.index.y = 0; b.index.y < blocks.y; ++b.index.y)
      for (b.index.x = 0; b.index.x < blocks.x; ++b.index.x) {
        b.shared.assign(emulator::kAlign + shared + emulator::kCanary, 0xFF);
        b.memory = b.shared.data() + (-reinterpret_cast<uintptr_t>(b.shared.data()) % emulator::kAlign);
        b.beyond = b.memory + shared;
        b.writer.assign(shared / 16 + 1, -1);
        const unsigned number = b.index.x + b.index.y + b.index.z;
        b.backwards = b.random ? emulator::draw(b, 2) : number % 2, b.early = (number + 1) / 2 % 2,
        b.late = (number + 1) % 3 > 0;
        b.phase = b.arrived = 0;
        emulator::run_block(b);
      }
}

}  // namespace linmu
