// What the kernels of window_attention share. A block works on one (window, key/value head): its keys and values lie in
// shared memory, gathered from where the tokens are and rotated by the rotary embedding on the way, and every query
// head of the group reads them there. Index arithmetic is host-and-device, and looks at no value that it does not
// check.
#pragma once
#include <algorithm>

#include "../linmu/window_attention.h"
#include "tile.cuh"

namespace linmu {

// The entries of one window in the table; within the table whatever the offsets say.
struct WindowSlots {
  int64_t begin;
  int count;
};
__host__ __device__ inline WindowSlots window_slots(const WindowAttentionParams& p, int64_t window) {
  const auto inside = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  const int64_t begin = inside(p.offsets[window], 0, p.num_visual);
  return {begin, static_cast<int>(inside(p.offsets[window + 1], begin, p.num_visual) - begin)};
}

// The token at an entry of the table, row * L + position, or -1 if it is none of the batch's.
__host__ __device__ inline int window_token(const WindowAttentionParams& p, int64_t slot) {
  const int64_t token = p.tokens[slot];
  return token >= 0 && token < p.batch * p.length ? static_cast<int>(token) : -1;
}

// A token's batch row, and its position there. Tokens have 32 bits, as has what divides them.
struct TokenPlace {
  unsigned row, position;
  __host__ __device__ TokenPlace(int64_t token, int64_t length) {
    const unsigned by = length < UINT32_MAX ? static_cast<unsigned>(length) : UINT32_MAX;
    row = static_cast<unsigned>(token) / by, position = static_cast<unsigned>(token) - row * by;
  }
};

// First element of a token's row of one head.
template <class Pointer>
__host__ __device__ inline int64_t row_offset(const TokenRows<Pointer>& rows, int64_t length, int64_t token,
                                              int64_t head) {
  const TokenPlace at(token, length);
  return at.row * rows.batch + at.position * rows.token + head * rows.head;
}

// First element of a token's angles.
__host__ __device__ inline int64_t rotary_offset(const WindowAttentionParams& p, int64_t token) {
  return (p.rotary_batch ? token : TokenPlace(token, p.length).position) * p.rotary_dim;
}

// Where in a head's table the bias of (query, key) lies, or -1 if their coordinates are none of the window's.
__host__ __device__ inline int64_t bias_index(const WindowAttentionParams& p, int64_t query, int64_t key) {
  const int64_t index = query - key + (p.bias_size - 1) / 2;
  return index >= 0 && index < p.bias_size ? index : -1;
}

struct GatheredRows {
  TokenRows<const void*> at;
  bool fast;  // every row in pieces of 16 bytes
};

// One launch: the arguments, and what the host has chosen.
struct WindowPlan {
  WindowAttentionParams p;
  GatheredRows q, k, v, grad_out, out;
  bool fast_rotary;       // rotary partners, too, lie in pieces of 16 bytes
  int keys;               // in shared memory at a time
  int splits;             // blocks per (window, key/value head)
  const float* grad_lse;  // (num_visual, H) or null
  float* delta;           // (num_visual, H) sum over P of out * grad_out, less grad_lse; backward only
  void *dq, *dk, *dv;
  void* rotated_q;  // (B, L, H, D) of the inputs' type or null: q as the tiles hold it; backward on sm_90a only
};

inline GatheredRows gathered(const WindowAttentionParams& p, const TokenRows<const void*>& at) {
  bool fast = aligned(at.data, 16);
  for (int64_t n : {p.head_dim, at.batch, at.token, at.head}) fast = fast && n * element_size(p.dtype) % 16 == 0;
  return {at, fast};
}
inline GatheredRows gathered(const WindowAttentionParams& p, const void* contiguous, int64_t heads) {
  return gathered(p, {contiguous, p.length * heads * p.head_dim, heads * p.head_dim, p.head_dim});
}

inline WindowPlan plan_window(const WindowAttentionParams& p) {
  WindowPlan s{};
  s.p = p;
  s.q = gathered(p, p.q), s.k = gathered(p, p.k), s.v = gathered(p, p.v), s.out = gathered(p, p.out, p.heads);
  const int64_t pieces = 16 / element_size(p.dtype);
  s.fast_rotary = p.rotary_dim % (p.interleaved ? pieces : 2 * pieces) == 0 && aligned(p.cos, 16) && aligned(p.sin, 16);
  return s;
}

// A window's tokens as far as the host knows them without looking: longer ones only take more steps.
inline int64_t expected_tokens(const WindowAttentionParams& p) {
  return std::max<int64_t>(1, std::min(p.max_tokens, p.num_visual));
}

// Enough blocks to fill a large chip.
constexpr int64_t kEnoughBlocks = 264;

// Calls f with the smallest head size, as an integral constant, that holds P.
template <class F>
void with_head_dim(int64_t P, F&& f) {
  using std::integral_constant;
  if (P <= 32) return f(integral_constant<int, 32>{});
  if (P <= 64) return f(integral_constant<int, 64>{});
  if (P <= 128) return f(integral_constant<int, 128>{});
  if (P <= 256) return f(integral_constant<int, 256>{});
  throw std::invalid_argument("window_attention: the CUDA kernels take at most P=256, got P=" + std::to_string(P));
}

// Writes zeros where no window writes: in out, or, for the gradients, in dq, dk and dv. Every element is `size` bytes.
void zero_uncovered(const WindowPlan& plan, bool gradients, const CudaContext& context);

// The forward by the kernel for sm_90a; false where that does not serve.
bool window_attention_sm90(const WindowAttentionParams& p, const CudaContext& context);

// ---- on the device ----

// Element i of a row rotated by its angles, or, kAdjoint, of a gradient rotated back.
template <bool kAdjoint, class S>
__device__ inline float rotated(const WindowAttentionParams& p, const S* row, const float* cos, const float* sin,
                                int i) {
  const int half = static_cast<int>(p.rotary_dim / 2);
  const bool first = p.interleaved ? i % 2 == 0 : i < half;
  const int partner = p.interleaved ? i ^ 1 : first ? i + half : i - half;
  const float other = to_float(row[partner]) * sin[kAdjoint ? partner : i];
  return to_float(row[i]) * cos[i] + (first == kAdjoint ? other : -other);
}

template <class T>
__device__ inline Vec<T, kVec<T>>& piece(T* p) {
  return *reinterpret_cast<Vec<T, kVec<T>>*>(p);
}
template <class T>
__device__ inline const Vec<T, kVec<T>>& piece(const T* p) {
  return *reinterpret_cast<const Vec<T, kVec<T>>*>(p);
}

// kVec elements of a row from i, all of them rotated; what the 16-byte pieces allow.
template <class T>
__device__ inline Vec<T, kVec<T>> rotated_piece(const WindowAttentionParams& p, const T* row, const float* cos,
                                                const float* sin, int i) {
  constexpr int V = kVec<T>;
  const int half = static_cast<int>(p.rotary_dim / 2);
  const bool first = i < half;
  const Vec<T, V> x = piece(row + i), y = p.interleaved ? x : piece(row + (first ? i + half : i - half));
  Vec<T, V> out;
#pragma unroll
  for (int v = 0; v < V; v += 4) {
    const Vec<float, 4> c = piece(cos + i + v), s = piece(sin + i + v);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float other = p.interleaved ? to_float(x.v[(v + u) ^ 1]) : to_float(y.v[v + u]);
      const bool negative = p.interleaved ? u % 2 == 0 : first;
      out.v[v + u] = from_float<T>(to_float(x.v[v + u]) * c.v[u] + (negative ? -other : other) * s.v[u]);
    }
  }
  return out;
}

// Where an element of a tile lies: here, rows one after another.
struct RowPlace {
  template <class T>
  static __device__ T* at(T* tile, int, int columns, int row, int column) {
    return tile + row * padded<T>(columns) + column;
  }
};

// Fills rows x columns of a tile with the rows of `tokens`, one head's, by `count` threads of which this is `thread`;
// zeros where there is no token. Whole warps take part; rows are a multiple of 8, columns of 32. A warp takes 8 rows at
// a time, so that a lane finds its row's place once. Complete after copy_wait and a barrier.
template <class Place = RowPlace, class T>
__device__ inline void gather(const WindowPlan& s, T* tile, int rows, int columns, const int* tokens,
                              const GatheredRows& from, int64_t head, bool rotate, int thread, int count) {
  constexpr int V = kVec<T>, kAtOnce = 4 * V;  // columns of a warp's access
  const WindowAttentionParams& p = s.p;
  const int P = static_cast<int>(p.head_dim), lane = thread % kWarp, c0 = lane / 8 * V;
  const int R = rotate && p.cos ? static_cast<int>(p.rotary_dim) : 0;
  for (int r = thread / kWarp * 8 + lane % 8; r < rows; r += count / kWarp * 8) {
    const int token = tokens[r];
    const bool here = token >= 0;
    const T* row = static_cast<const T*>(from.at.data) + (here ? row_offset(from.at, p.length, token, head) : 0);
    if (R == 0 && from.fast) {
#pragma unroll 4
      for (int c = c0; c < columns; c += kAtOnce) {
        const bool valid = here && c < P;
        copy_async(Place::at(tile, rows, columns, r, c), valid ? row + c : nullptr, valid);
      }
      continue;
    }
    const int64_t angles = R > 0 && here ? rotary_offset(p, token) : 0;
    const float *cos = static_cast<const float*>(p.cos) + angles, *sin = static_cast<const float*>(p.sin) + angles;
#pragma unroll 1
    for (int c = c0; c < columns; c += kAtOnce) {
      T* to = Place::at(tile, rows, columns, r, c);
      if (!here || c >= P) {
        piece(to) = Vec<T, V>{};
      } else if (c < R && from.fast && s.fast_rotary) {
        piece(to) = rotated_piece(p, row, cos, sin, c);
      } else if (c >= R && from.fast) {
        copy_async(to, row + c, true);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
          to[v] = c + v < R ? from_float<T>(rotated<false>(p, row, cos, sin, c + v)) : c + v < P ? row[c + v] : T{};
      }
    }
  }
}

// The tokens, and with a bias the coordinates, of `rows` entries of a window from `first`; -1 and 0 beyond its end.
__device__ inline void read_slots(const WindowAttentionParams& p, const WindowSlots& window, int first, int rows,
                                  int* tokens, int* coords, int thread, int count) {
  for (int i = thread; i < rows; i += count) {
    const bool inside = first + i < window.count;
    const int64_t slot = window.begin + first + i;
    tokens[i] = inside ? window_token(p, slot) : -1;
    if (p.bias) coords[i] = inside ? p.coords[slot] : 0;
  }
}

// For all of a block's threads, its warps' own copies included: a window's keys and values from entry k0 on, as many as
// the tiles hold, unless they are there already (`resident`, which is kept). Returns how many rows of the tiles count.
template <class T>
__device__ inline int load_keys(const WindowPlan& s, const WindowSlots& window, int k0, int64_t group, int columns,
                                T* k_tile, T* v_tile, int* tokens, int* coords, bool& resident) {
  const int threads = blockDim.x;
  const int here = window.count - k0 < s.keys ? window.count - k0 : s.keys, rows = (here + 15) / 16 * 16;
  if (!resident) {
    __syncthreads();
    read_slots(s.p, window, k0, s.keys, tokens, coords, threadIdx.x, threads);
    __syncthreads();
    gather(s, k_tile, rows, columns, tokens, s.k, group, true, threadIdx.x, threads);
    gather(s, v_tile, rows, columns, tokens, s.v, group, false, threadIdx.x, threads);
  }
  copy_commit();
  copy_wait<0>();
  if (resident)
    sync_warp();
  else
    __syncthreads();
  resident = window.count <= s.keys;
  return rows;
}

// Scores leave a product as q . k. They become the exponents of softmax's powers: of 2 for 16-bit types, where the
// weights are rounded to 16 bits anyway, and of e in float.
template <class T>
constexpr float kPerE = sizeof(T) == 2 ? 1.4426950408889634f : 1.f;
template <class T>
__device__ inline float power(float x) {
  if constexpr (sizeof(T) == 2)
    return exp2f(x);
  else
    return expf(x);
}

__device__ inline float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// The row of a 16-row part in which a lane's value r = 2 i + half lies, in a tile of M rows.
__device__ inline int row_of(int r) { return r / 2 * 16 + r % 2 * 8 + lane_row(); }

// scale q . k + bias, times kPerE, for a lane's values; -infinity where there is no key, or, causal, a later one than
// the query. kKeyRows: the scores' rows are the keys. Tokens and coordinates are those of the scores' first row and
// column.
template <class T, bool kKeyRows, int M, int N>
__device__ inline void to_exponents(Accumulator<M, N>& scores, const WindowAttentionParams& p, int64_t head,
                                    const int* tokens, const int* coords, const int* other_tokens,
                                    const int* other_coords) {
  const float factor = static_cast<float>(p.scale) * kPerE<T>;
  const float* table = p.bias ? static_cast<const float*>(p.bias) + head * p.bias_size : nullptr;
  scores.each([&](float& value, int row, int column) {
    value *= factor;
    if (table) {
      const int mine = coords[row], other = other_coords[column];
      const int64_t at = kKeyRows ? bias_index(p, other, mine) : bias_index(p, mine, other);
      if (at >= 0) value += table[at] * kPerE<T>;
    }
  });
  // A pass of its own, and one for each case: together they took more registers, or a branch per score. A window's
  // tokens are of one batch row, so they compare as positions.
  if (p.causal) {
    scores.each([&](float& value, int row, int column) {
      const int mine = tokens[row], other = other_tokens[column], key = kKeyRows ? mine : other;
      if (key < 0 || key > (kKeyRows ? other : mine)) value = -INFINITY;
    });
  } else {
    scores.each([&](float& value, int row, int column) {
      if ((kKeyRows ? tokens[row] : other_tokens[column]) < 0) value = -INFINITY;
    });
  }
}

// Softmax over keys that come a step at a time (online softmax), for a lane's rows of M: the largest exponent so far,
// and the lane's share of the sum of powers, relative to it.
template <class T, int M>
struct OnlineSoftmax {
  static constexpr int R = M / 8;
  float top[R], sum[R];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < R; ++r) top[r] = -INFINITY, sum[r] = 0.f;
  }

  // Exponents become weights; what was weighted before is to be multiplied by `rescale`, if true comes back.
  template <int N>
  __device__ bool step(Accumulator<M, N>& scores, float (&rescale)[R]) {
    bool moved = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float most = top[r];
#pragma unroll
      for (int c = 0; c < N / 8; ++c)
        most = fmaxf(most, fmaxf(scores.v[r / 2][c][r % 2 * 2], scores.v[r / 2][c][r % 2 * 2 + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      // No key yet: -infinity less itself would be NaN.
      const float from = most == -INFINITY ? 0.f : most;
      rescale[r] = power<T>(top[r] - from);
      moved |= most != top[r];
      top[r] = most;
      float total = 0.f;
#pragma unroll
      for (int c = 0; c < N / 8; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = scores.v[r / 2][c][r % 2 * 2 + e];
          x = power<T>(x - from);
          total += x;
        }
      sum[r] = sum[r] * rescale[r] + total;
    }
    return warp_any(moved);
  }

  // The same from q . k, of 16-bit types, which `factor`, above 0, makes exponents; always to be multiplied.
  template <int N>
  __device__ void step_scaled(Accumulator<M, N>& scores, float factor, float (&rescale)[R]) {
    static_assert(sizeof(T) == 2);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float most = -INFINITY;
#pragma unroll
      for (int c = 0; c < N / 8; ++c)
        most = fmaxf(most, fmaxf(scores.v[r / 2][c][r % 2 * 2], scores.v[r / 2][c][r % 2 * 2 + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(top[r], fmaxf(most, shuffle_xor(most, 2)) * factor);
      const float from = most == -INFINITY ? 0.f : most;
      rescale[r] = fast_exp2(top[r] - from);
      top[r] = most;
      float total = 0.f;
#pragma unroll
      for (int c = 0; c < N / 8; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = scores.v[r / 2][c][r % 2 * 2 + e];
          x = fast_exp2(fmaf(x, factor, -from));
          total += x;
        }
      sum[r] = sum[r] * rescale[r] + total;
    }
  }

  // After finish. A query that no key answers has an output of 0, and its weights in the backward are 0.
  __device__ float inverse(int r) const { return sum[r] == 0.f ? 0.f : 1.f / sum[r]; }

  // After the last step: sum becomes the whole row's, and the log-sum-exp of rows from entry `first` is written.
  __device__ void finish(const WindowAttentionParams& p, const WindowSlots& window, int first, int64_t head) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      sum[r] = quad_sum(sum[r]);
      const int entry = first + row_of(r);
      if (lane_column() == 0 && entry < window.count)
        static_cast<float*>(p.lse)[(window.begin + entry) * p.heads + head] = top[r] / kPerE<T> + logf(sum[r]);
    }
  }
};

// A piece of a token's row of (B, L, H, P) out.
template <class T>
__device__ inline void store_out(const WindowPlan& s, int token, int64_t head, int column, const T* from) {
  const WindowAttentionParams& p = s.p;
  const int P = static_cast<int>(p.head_dim);
  if (token < 0 || column >= P) return;
  T* to = static_cast<T*>(p.out) + (static_cast<int64_t>(token) * p.heads + head) * P + column;
  if (s.out.fast) {
    piece(to) = piece(from);
  } else {
    for (int v = 0; v < kVec<T> && column + v < P; ++v) to[v] = from[v];
  }
}

}  // namespace linmu
