// Called by test_emulator.py through ctypes: instructions alone, kernels with a fault, and index arithmetic on the
// host.
#include <cstdio>

#include "../../csrc/cuda/tma.cuh"
#include "../../csrc/cuda/window_attention.cuh"

#define PROBE extern "C" __attribute__((visibility("default")))

namespace linmu {
namespace {

// Fragments by the formulas of the PTX manual for mma.m16n8k16: groupID = lane / 4, threadID_in_group = lane % 4.
template <class T>
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* d) {
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  uint16_t fa[8], fb[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    fa[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) fb[i] = b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
  const auto both = [](const uint16_t* x) { return x[0] | static_cast<unsigned>(x[1]) << 16; };
  const unsigned ra[4] = {both(fa), both(fa + 2), both(fa + 4), both(fa + 6)};
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = d[(group + (i < 2 ? 0 : 8)) * 8 + in_group * 2 + (i & 1)];
  mma<T>(c, ra, both(fb), both(fb + 2));
  for (int i = 0; i < 4; ++i) d[(group + (i < 2 ? 0 : 8)) * 8 + in_group * 2 + (i & 1)] = c[i];
}

// Tiles A (M x K) and B (N x K), or their transposes, through copy_async, ldmatrix and mma; then A B^T times B again,
// from registers.
template <class T, Major kMajorA, Major kMajorB>
__global__ void tiles_kernel(const T* a, const T* b, float* product, float* again, bool wait) {
  constexpr int M = 32, N = 32, K = 48, rows_a = kMajorA == Major::K ? M : K, rows_b = kMajorB == Major::K ? N : K;
  constexpr int columns_a = kMajorA == Major::K ? K : M, columns_b = kMajorB == Major::K ? K : N;
  LINMU_SHARED(memory);
  T* a_tile = reinterpret_cast<T*>(memory);
  T* b_tile = a_tile + rows_a * padded<T>(columns_a);
  load_tile(a_tile, rows_a, columns_a, columns_a, true, [&](int r) { return a + r * columns_a; });
  load_tile(b_tile, rows_b, columns_b, columns_b, true, [&](int r) { return b + r * columns_b; });
  copy_commit();
  if (wait) copy_wait<0>();
  __syncthreads();
  Accumulator<M, N> acc;
  acc.clear();
  multiply<kMajorA, kMajorB>(acc, a_tile, padded<T>(columns_a), b_tile, padded<T>(columns_b), K);
  acc.each([&](float& x, int row, int column) { product[row * N + column] = x; });
  if constexpr (kMajorB == Major::K) {
    Accumulator<M, K> again_acc;
    again_acc.clear();
    multiply_registers(again_acc, acc, b_tile, padded<T>(columns_b));
    again_acc.each([&](float& x, int row, int column) { again[row * K + column] = x; });
  }
}

// Kernels that are wrong, by number; 0 is right.
__global__ void fault_kernel(int fault, float* out) {
  LINMU_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, n = blockDim.x;
  values[i + (fault == 1 ? 1 : 0)] = static_cast<float>(i);  // 1: beyond shared memory
  if (fault != 2) __syncthreads();                           // 2: no barrier
  out[blockIdx.x * n + i] = values[n - 1 - i];
  if (fault == 3 && i % 2) return;  // 3: half of the warp is gone
  if (fault == 4 && i % 2)          // 4: two halves, two instructions
    sync_warp();
  else
    shuffle_xor(1.f, 1);
}

// A box of 8 rows by TMA, then row 8 of the tensor; what lies in shared memory before the wait, and after it.
__global__ void tma_kernel(const __grid_constant__ TensorMap map, const uint16_t* data, int fault, uint16_t* before,
                           uint16_t* after) {
  LINMU_SHARED(memory);
  uint16_t* tile = reinterpret_cast<uint16_t*>(memory);
  Barrier* barrier = reinterpret_cast<Barrier*>(memory + 2048);
  const int i = threadIdx.x;
  if (i == 0 && fault != 1) barrier_init(barrier);  // 1: no barrier
  __syncthreads();
  if (i == 0) {
    barrier_expect_tx(barrier, fault == 2 ? 1024 : 1024 + 128);  // 2: fewer bytes than come
    tma_load_box(tile, map, 0, 0, 0, 0, barrier);
    tma_load_1d(tile + 512, data + 8 * 64, fault == 3 ? 120 : 128, barrier);  // 3: no whole pieces
  }
  __syncthreads();
  for (int k = i; k < 64 * 9; k += kWarp) before[k] = tile[k];
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int k = i; k < 64 * 8; k += kWarp) after[k] = *swizzled_at(tile, 8, k / 64, k % 64);
  for (int k = i; k < 64; k += kWarp) after[8 * 64 + k] = tile[512 + k];
}

// The product of two tiles of ones by a warpgroup: the sums as they are before the wait, and after it.
__global__ void product_kernel(int fault, float* before, float* after) {
  LINMU_SHARED(memory);
  bf16* tile = reinterpret_cast<bf16*>(memory);
  for (int k = threadIdx.x; k < 64 * 64; k += kWarpgroup) tile[k] = from_float<bf16>(1.f);
  fence_proxy_async();
  const unsigned one = pack<bf16>(1.f, 1.f), ones[4] = {one, one, one, one};
  const int lane = threadIdx.x % kWarp;
  if (fault >= 4) stmatrix(swizzled_at(tile, 64, lane, threadIdx.x / kWarp * 8), one, one, one, one);
  if (fault == 6 || (fault == 5 && lane % 2)) fence_proxy_async();  // 4: no fence; 5: of some lanes; 6: not a fault
  __syncthreads();
  WarpgroupAccumulator first, second;
  first.clear(), second.clear();
  warpgroup_arrive();
  wgmma<bf16, Major::K>(first, ones, make_descriptor(tile));
  warpgroup_commit();
  if (fault == 1) first.clear();  // 1: written while a product is on its way
  wgmma<bf16, Major::K>(second, ones, make_descriptor(tile));
  wgmma<bf16, Major::K>(second, ones, make_descriptor(tile + 16), fault != 2);  // 2: not a fault; it begins anew
  warpgroup_commit();
  warpgroup_wait<1>();
  before[threadIdx.x * 2] = first.v[0][0][0], before[threadIdx.x * 2 + 1] = second.v[0][0][0];
  if (fault != 3) warpgroup_wait<0>();  // 3: never waited for
  after[threadIdx.x * 2] = first.v[0][0][0], after[threadIdx.x * 2 + 1] = second.v[0][0][0];
}

// A barrier that counts the arrivals of two warps; each lane notes what the others had written by then.
__global__ void arrivals_kernel(int fault, float* out) {
  LINMU_SHARED(memory);
  Barrier* barrier = reinterpret_cast<Barrier*>(memory);
  float* values = reinterpret_cast<float*>(memory + 64);
  const int i = threadIdx.x;
  if (i == 0) barrier_init(barrier, fault == 1 ? 3 : 2);  // 1: one more than comes
  __syncthreads();
  values[i] = static_cast<float>(i);
  sync_warp();
  if (i % kWarp == 0) barrier_arrive(barrier);
  barrier_wait(barrier, 0);
  out[i] = values[63 - i];
}

template <class F>
void report(char* message, int size, F&& run) {
  try {
    run();
    std::snprintf(message, size, "%s", "");
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
  }
}

const CudaContext kContext{};

}  // namespace
}  // namespace linmu

PROBE void probe_mma(int half, const uint16_t* a, const uint16_t* b, float* d) {
  using namespace linmu;
  launch("probe", half ? mma_kernel<half16> : mma_kernel<bf16>, dim3(1), kWarp, 0, kContext, a, b, d);
}

PROBE void probe_tiles(int type, int mn_major, const void* a, const void* b, float* product, float* again, int wait) {
  using namespace linmu;
  dispatch_cuda("probe", static_cast<DType>(type), [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    constexpr auto K = Major::K, MN = Major::MN;
    constexpr void (*kernels[])(const T*, const T*, float*, float*, bool) = {
        tiles_kernel<T, K, K>, tiles_kernel<T, MN, K>, tiles_kernel<T, K, MN>, tiles_kernel<T, MN, MN>};
    launch("probe", kernels[mn_major], dim3(1), kWarp, 32768, kContext, static_cast<const T*>(a),
           static_cast<const T*>(b), product, again, wait != 0);
  });
}

// Empty, or what the emulator says of the fault.
PROBE void probe_fault(int fault, float* out, char* message, int size) {
  try {
    linmu::launch("probe", linmu::fault_kernel, dim3(2), 64, 256, linmu::kContext, fault, out);
    std::snprintf(message, size, "%s", "");
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
  }
}

// As probe_fault, of the instructions of sm_90a; by `blocks`, which differ in when a product is computed.
PROBE void probe_product(int fault, int blocks, float* before, float* after, char* message, int size) {
  linmu::report(message, size, [&] {
    linmu::launch("probe", linmu::product_kernel, dim3(blocks), 128, 8192, linmu::kContext, fault, before, after);
  });
}
PROBE void probe_arrivals(int fault, float* out, char* message, int size) {
  linmu::report(message, size,
                [&] { linmu::launch("probe", linmu::arrivals_kernel, dim3(1), 64, 512, linmu::kContext, fault, out); });
}

// Of a tensor of 9 rows of 64, of which the box sees 7; as probe_fault.
PROBE void probe_tma(const uint16_t* data, int fault, uint16_t* before, uint16_t* after, char* message, int size) {
  using namespace linmu;
  TensorMap map{};
  const int64_t sizes[4] = {64, 7, 1, 1}, strides[3] = {64, 64 * 9, 64 * 9};
  try {
    if (!encode_tensor_map(map, data, sizes, strides, 8)) throw std::runtime_error("not described");
    launch("probe", tma_kernel, dim3(1), kWarp, 2048 + 64, kContext, map, data, fault, before, after);
    std::snprintf(message, size, "%s", "");
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
  }
}

// Of every entry of every window: token, first element of its row of `head`, first of its angles; and the window's
// begin and count. Strides are as given, however large.
PROBE void probe_windows(const int32_t* tokens, const int32_t* offsets, int64_t num_windows, int64_t num_visual,
                         int64_t batch, int64_t length, int64_t rotary_dim, int rotary_batch, int64_t batch_stride,
                         int64_t token_stride, int64_t head_stride, int64_t head, int64_t* entries, int64_t* windows) {
  using namespace linmu;
  WindowAttentionParams p{};
  p.tokens = tokens, p.offsets = offsets, p.num_windows = num_windows, p.num_visual = num_visual;
  p.batch = batch, p.length = length, p.rotary_dim = rotary_dim, p.rotary_batch = rotary_batch != 0;
  const TokenRows<const void*> rows{nullptr, batch_stride, token_stride, head_stride};
  for (int64_t w = 0; w < num_windows; ++w) {
    const WindowSlots slots = window_slots(p, w);
    windows[2 * w] = slots.begin, windows[2 * w + 1] = slots.count;
    for (int64_t slot = slots.begin; slot < slots.begin + slots.count; ++slot) {
      const int token = window_token(p, slot);
      entries[3 * slot] = token;
      if (token < 0) continue;
      entries[3 * slot + 1] = row_offset(rows, length, token, head);
      entries[3 * slot + 2] = rotary_offset(p, token);
    }
  }
}

PROBE int64_t probe_bias_index(int64_t bias_size, int64_t query, int64_t key) {
  linmu::WindowAttentionParams p{};
  p.bias_size = bias_size;
  return linmu::bias_index(p, query, key);
}

PROBE int64_t probe_stored_matrices() { return linmu::emulator::stored_matrices; }
PROBE int64_t probe_boxes() { return linmu::emulator::tma_boxes; }
PROBE int64_t probe_products() { return linmu::emulator::products; }
