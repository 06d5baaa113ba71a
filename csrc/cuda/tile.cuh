// Tiles in shared memory, and a warp's product of two of them. A tile's rows are padded by 16 bytes, so that eight rows
// read at once lie in different banks; its sizes are multiples of 32, and what lies beyond the data is 0.
#pragma once
#include "mma.cuh"

namespace linmu {

// Elements in 16 bytes.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

template <class T>
__host__ __device__ constexpr int padded(int columns) {
  return columns + kVec<T>;
}

constexpr int round_to(int64_t n, int unit) { return static_cast<int>((n + unit - 1) / unit) * unit; }

// Fills rows x columns of a tile. source(r) points at row r, or is null where there is none; `width` elements of a row
// exist. fast: every source row is aligned to 16 bytes, and so is the width. Complete after copy_wait and a barrier.
// kThreads: the block's threads where they are known and the sizes constant, and divide the tile's pieces of 16 bytes.
template <class T, int kThreads = 0, class Source>
__device__ inline void load_tile(T* tile, int rows, int columns, int64_t width, bool fast, Source&& source) {
  const int per_row = columns / kVec<T>;
  if (kThreads > 0 && fast) {
#pragma unroll
    for (int k = 0; k < rows * per_row / (kThreads + !kThreads); ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kThreads, r = i / per_row, c = i % per_row * kVec<T>;
      const T* from = source(r);
      const bool valid = from && c < width;
      copy_async(tile + r * padded<T>(columns) + c, valid ? from + c : nullptr, valid);
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * per_row; i += blockDim.x) {
    const int r = i / per_row, c = i % per_row * kVec<T>;
    const T* from = source(r);
    T* to = tile + r * padded<T>(columns) + c;
    if (fast) {
      const bool valid = from && c < width;
      copy_async(to, valid ? from + c : nullptr, valid);
    } else {
#pragma unroll
      for (int v = 0; v < kVec<T>; ++v) to[v] = from && c + v < width ? from[c + v] : T{};
    }
  }
}

// Where the lane's values of a 16 x 8 accumulator lie.
__device__ inline int lane_row() { return threadIdx.x % kWarp / 4; }
__device__ inline int lane_column() { return threadIdx.x % 4 * 2; }

// M x N sums in float, M a multiple of 16 and N of 16, over the lanes of a warp.
template <int M, int N>
struct Accumulator {
  float v[M / 16][N / 8][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < M / 16; ++i)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] = 0.f;
  }
  __device__ void add(const Accumulator& other) {
#pragma unroll
    for (int i = 0; i < M / 16; ++i)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][j][e] += other.v[i][j][e];
  }
  // f(value, row, column) for each of the lane's values.
  template <class F>
  __device__ void each(F&& f) {
    each_pair([&](float& first, float& second, int row, int column) {
      f(first, row, column);
      f(second, row, column + 1);
    });
  }
  // f(two values side by side, row, column of the first).
  template <class F>
  __device__ void each_pair(F&& f) {
#pragma unroll
    for (int i = 0; i < M / 16; ++i)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
          f(v[i][j][e], v[i][j][e + 1], i * 16 + lane_row() + e / 2 * 8, j * 8 + lane_column());
  }
};

template <int M, int N>
__device__ inline void multiply_rows(Accumulator<M, N>& sums, const float (&factor)[M / 8]) {
#pragma unroll
  for (int r = 0; r < M / 8; ++r)
#pragma unroll
    for (int c = 0; c < N / 8; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums.v[r / 2][c][r % 2 * 2 + e] *= factor[r];
}

// Along which dimension an operand is contiguous in its tile, in CUTLASS's words: K-major, one row of the tile per row
// of M or N; or MN-major, one row of the tile per step of K.
enum class Major { K, MN };

// acc += A B^T, summed over K = `depth`, a multiple of 16: A is M x K and B is N x K, from tiles of T with the given
// pitch. Of the N / 16 parts of B only the first `parts` are there.
template <Major kMajorA, Major kMajorB, int M, int N, class T>
__device__ inline void multiply(Accumulator<M, N>& acc, const T* a, int pitch_a, const T* b, int pitch_b, int depth,
                                int parts = N / 16) {
  const int lane = threadIdx.x % kWarp, low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
  for (int k = 0; k < depth; k += 16) {
    unsigned fa[M / 16][4];
#pragma unroll
    for (int i = 0; i < M / 16; ++i)
      if constexpr (kMajorA == Major::K)
        ldmatrix(fa[i], a + (i * 16 + low + middle) * pitch_a + k + high);
      else
        ldmatrix_transposed(fa[i], a + (k + low + high) * pitch_a + i * 16 + middle);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      if (j >= parts) break;
      unsigned fb[4];
      if constexpr (kMajorB == Major::K)
        ldmatrix(fb, b + (j * 16 + low + high) * pitch_b + k + middle);
      else
        ldmatrix_transposed(fb, b + (k + low + middle) * pitch_b + j * 16 + high);
#pragma unroll
      for (int i = 0; i < M / 16; ++i) {
        mma<T>(acc.v[i][2 * j], fa[i], fb[0], fb[1]);
        mma<T>(acc.v[i][2 * j + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}

// The same in float32, by plain multiply-adds: the tensor cores would round the operands. In parts of 16, as theirs
// are: one running sum over the whole depth would lose, where gradients largely cancel, what the recurrence does not.
template <Major kMajorA, Major kMajorB, int M, int N>
__device__ inline void multiply(Accumulator<M, N>& acc, const float* a, int pitch_a, const float* b, int pitch_b,
                                int depth, int parts = N / 16) {
  const float* row = a + lane_row() * (kMajorA == Major::K ? pitch_a : 1);
  const float* column = b + lane_column() * (kMajorB == Major::K ? pitch_b : 1);
  const int row_step = kMajorA == Major::K ? pitch_a : 1, column_step = kMajorB == Major::K ? pitch_b : 1;
  const int depth_a = kMajorA == Major::K ? 1 : pitch_a, depth_b = kMajorB == Major::K ? 1 : pitch_b;
  for (int k = 0; k < depth; k += 16) {
    Accumulator<M, N> part;
    part.clear();
#pragma unroll 2
    for (int l = 0; l < 16; ++l, row += depth_a, column += depth_b) {
      float fa[M / 8], fb[N / 4];
#pragma unroll
      for (int i = 0; i < M / 8; ++i) fa[i] = row[i * 8 * row_step];
#pragma unroll
      for (int j = 0; j < N / 4; ++j) fb[j] = j / 4 < parts ? column[(j / 2 * 8 + j % 2) * column_step] : 0.f;
#pragma unroll
      for (int i = 0; i < M / 16; ++i)
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) part.v[i][j][e] += fa[2 * i + e / 2] * fb[2 * j + e % 2];
    }
    acc.add(part);
  }
}

// Part k of 16 columns of a 16-row part i of an accumulator, rounded to T: an A fragment, as mma takes it from
// registers.
template <class T, int M, int N>
__device__ inline void to_a_fragment(unsigned (&to)[4], const Accumulator<M, N>& acc, int i, int k) {
#pragma unroll
  for (int q = 0; q < 4; ++q)
    to[q] = pack<T>(acc.v[i][2 * k + q / 2][q % 2 * 2], acc.v[i][2 * k + q / 2][q % 2 * 2 + 1]);
}

// acc += A B, with A in the lanes' registers where another product left it, rounded to T: M x K, of which the first
// `parts` of K / 16 count, and B K x N in a tile, MN-major.
template <int M, int K, int N, class T>
__device__ inline void multiply_registers(Accumulator<M, N>& acc, const Accumulator<M, K>& a, const T* b, int pitch,
                                          int parts = K / 16) {
  const int lane = threadIdx.x % kWarp, low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
    if (k >= parts) break;
    unsigned fa[M / 16][4];
#pragma unroll
    for (int i = 0; i < M / 16; ++i) to_a_fragment<T>(fa[i], a, i, k);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      unsigned fb[4];
      ldmatrix_transposed(fb, b + (k * 16 + low + middle) * pitch + j * 16 + high);
#pragma unroll
      for (int i = 0; i < M / 16; ++i) {
        mma<T>(acc.v[i][2 * j], fa[i], fb[0], fb[1]);
        mma<T>(acc.v[i][2 * j + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}
template <int M, int K, int N>
__device__ inline void multiply_registers(Accumulator<M, N>& acc, const Accumulator<M, K>& a, const float* b, int pitch,
                                          int parts = K / 16) {
  const float* column = b + lane_column();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k / 16 >= parts) break;
    float fa[M / 8];
#pragma unroll
    for (int i = 0; i < M / 8; ++i)
      fa[i] = shuffle(a.v[i / 2][k / 8][i % 2 * 2 + k % 2], threadIdx.x % kWarp / 4 * 4 + k % 8 / 2);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const float fb = column[k * pitch + j / 2 * 8 + j % 2];
#pragma unroll
      for (int i = 0; i < M / 8; ++i) acc.v[i / 2][j / 2][i % 2 * 2 + j % 2] += fa[i] * fb;
    }
  }
}

// Two neighbours of a row, where `width` elements of it exist; one store where its place is aligned.
template <class T>
__device__ inline void store_pair(T* to, float first, float second, int64_t left) {
  const Vec<T, 2> both{{from_float<T>(first), from_float<T>(second)}};
  if (left >= 2 && reinterpret_cast<uintptr_t>(to) % sizeof(both) == 0) {
    *reinterpret_cast<Vec<T, 2>*>(to) = both;
  } else {
    if (left >= 1) to[0] = both.v[0];
    if (left >= 2) to[1] = both.v[1];
  }
}

}  // namespace linmu
