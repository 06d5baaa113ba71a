// The gradient of the scan within a chunk. See ssd_scan.cuh. The adjoint of a scan is a scan against its visits, so
// `states` gives both the state h that enters a chunk and the gradient g of the one that leaves it. One block per
// (chunk, head) then has, with G_ij = dy_i . x_j, K_ij = C_i . B_j, a_ij = exp(S_i - S_j), E = a K G, and per direction
//
//     dx_j = sum_i M_ij dy_i + step_j leave_j g B_j           M_ij = weight_i a_ij K_ij step_j
//     dC_i = sum_j W_ij B_j + weight_i arrive_i h^T dy_i      W_ij = weight_i a_ij G_ij step_j
//     dB_j = sum_i W_ij C_i + step_j leave_j g^T x_j
//
// and the sums over rows and columns of E from which ssd_scan_bwd_small.cu makes the gradients of dt, A, D and the
// gate. Those are float32 whatever the inputs are, so what enters them is kept as exact: h and g are multiplied as two
// or three parts of the inputs' type.
#pragma once
#include "ssd_scan_bwd.cuh"

namespace linmu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 32, kColumns = 16;  // of a warp's products

// Parts that a float is kept in.
template <class T>
constexpr int kParts = std::is_same_v<T, float>  ? 1
                       : std::is_same_v<T, bf16> ? 3
                                                 : 2;

struct PerHead {
  void* data;    // (B, chunks, chunk, H, size) of float, to be added to or summed over heads; or the gradient itself
  bool partial;  // which of the two
};

struct Gradients {
  SsdScanTensor dy;
  const float *entering[2], *leaving[2];  // h and g: (B, H, chunks, P, N)
  const float* scale[2][2];               // of h and g, see narrow_states; null but for halves
  PerHead x, B[2], C[2];
  VisitSums* sums[2];  // (B, H, chunks, chunk)
  double* through[2];  // (B, H, chunks)
  bool separate;
  int head_dim, state_dim;  // rounded up to 32
  int state_columns;        // of N at a time: 16 or 32
  int value_columns;        // of P at a time: 32 or 64
  bool fast_x, fast_dy, fast_b[2], fast_c[2];
};

// Where things lie in shared memory, in bytes.
struct GradientTiles {
  int64_t visits, row_flows, column_flows, row_sums, column_sums, small, segments, tokens, x, dy, b, c, m, w, states,
      bytes;

  template <class T>
  __host__ __device__ static constexpr GradientTiles of(int chunk, int head_dim, int state_dim, int state_columns,
                                                        int value_columns) {
    const int64_t Q = chunk, size = sizeof(T);
    const int64_t slices = int64_t{2} * kParts<T> * head_dim * padded<T>(state_columns);
    const int64_t rows = int64_t{value_columns} * padded<T>(state_dim);
    GradientTiles t{};
    t.visits = 0;
    t.row_flows = t.visits + 2 * Q * static_cast<int64_t>(sizeof(Visit));
    t.column_flows = t.row_flows + 2 * (Q / kColumns) * Q * 8;
    t.row_sums = t.column_flows + 2 * (Q / kRows) * Q * 8 + kWarps * 8;
    t.column_sums = t.row_sums + 2 * (Q / kColumns) * Q * 4;
    t.small = t.column_sums + 2 * (Q / kRows) * Q * 4;
    t.segments = t.small + 11 * Q * 4;
    t.tokens = t.segments + 2 * Q * 4;
    t.x = t.tokens + Q * 4;
    t.dy = t.x + Q * padded<T>(head_dim) * size;
    t.b = t.dy + Q * padded<T>(head_dim) * size;
    t.c = t.b + Q * padded<T>(state_dim) * size;
    t.m = t.c + Q * padded<T>(state_dim) * size;
    t.w = t.m + Q * padded<T>(chunk) * size;
    t.states = t.w + Q * padded<T>(chunk) * size;
    t.bytes = t.states + (slices > rows ? slices : rows) * size;
    return t;
  }
};

template <class T>
class ChunkGradients {
 public:
  __device__ ChunkGradients(const ScanPlan& plan, const Gradients& gradients, unsigned char* memory)
      : s(plan), o(gradients), p(plan.p), Q(plan.chunk), tid(threadIdx.x), warp(threadIdx.x / kWarp) {
    c = blockIdx.x % s.chunks, bh = blockIdx.x / s.chunks, b = bh / p.heads, h = bh % p.heads;
    const GradientTiles t = GradientTiles::of<T>(Q, o.head_dim, o.state_dim, o.state_columns, o.value_columns);
    visits = reinterpret_cast<Visit*>(memory + t.visits);
    row_flows = reinterpret_cast<double*>(memory + t.row_flows);
    column_flows = reinterpret_cast<double*>(memory + t.column_flows);
    dots = column_flows + 2 * (Q / kRows) * Q;
    row_sums = reinterpret_cast<float*>(memory + t.row_sums);
    column_sums = reinterpret_cast<float*>(memory + t.column_sums);
    diagonal = reinterpret_cast<float*>(memory + t.small);
    from_state = diagonal + 2 * Q, to_state = from_state + 4 * Q, gram_diagonal = to_state + 4 * Q;
    segments = reinterpret_cast<int*>(memory + t.segments);
    tokens = reinterpret_cast<int*>(memory + t.tokens);
    x_tile = reinterpret_cast<T*>(memory + t.x), dy_tile = reinterpret_cast<T*>(memory + t.dy);
    b_tile = reinterpret_cast<T*>(memory + t.b), c_tile = reinterpret_cast<T*>(memory + t.c);
    m_tile = reinterpret_cast<T*>(memory + t.m), w_tile = reinterpret_cast<T*>(memory + t.w);
    states = reinterpret_cast<T*>(memory + t.states);
    pitch_p = padded<T>(o.head_dim), pitch_n = padded<T>(o.state_dim), pitch_q = padded<T>(Q);
  }

  __device__ void run() {
    const int first = p.forward.on ? 0 : 1, last = p.reverse.on ? 1 : 0;
    load_visits(first, last);
    for (int d = first; d <= last; ++d) {
      const int until = o.separate ? d : last;  // the directions that this B and C serve
      load_projections(d);
      if (d == first || spoiled) load_values();
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      pairs(d, until);
      __syncthreads();
      spoiled = clean();
      for (int64_t n0 = 0; n0 < p.state_dim; n0 += o.state_columns) projections(d, until, n0, d > first);
      for (int64_t p0 = 0; p0 < p.head_dim; p0 += o.value_columns) values(d, until, p0, d > first);
      __syncthreads();
      d = until;
    }
    store_sums(first, last);
  }

 private:
  __device__ void load_visits(int first, int last) {
    read_visits(s, Q, b, h, c, first, last, tokens, segments, visits, tid, kThreads);
    for (int i = tid; i < 2 * (Q / kColumns) * Q; i += kThreads) row_sums[i] = 0, row_flows[i] = 0;
    for (int i = tid; i < 2 * (Q / kRows) * Q; i += kThreads) column_sums[i] = 0, column_flows[i] = 0;
    for (int i = tid; i < 11 * Q; i += kThreads) diagonal[i] = 0;
    __syncthreads();
  }

  __device__ void load_rows(T* tile, const SsdScanTensor& t, int64_t groups, int columns, int64_t width, bool fast) {
    const T* from = group_of<T>(t, groups, b, h, p.heads);
    load_tile<T>(tile, Q, columns, width, fast,
                 [&](int r) { return tokens[r] < 0 ? nullptr : from + tokens[r] * t.token_stride; });
  }
  __device__ void load_values() {
    load_rows(x_tile, p.x, p.groups_x, o.head_dim, p.head_dim, o.fast_x);
    load_rows(dy_tile, o.dy, p.heads, o.head_dim, p.head_dim, o.fast_dy);
  }
  __device__ void load_projections(int d) {
    load_rows(b_tile, s.direction(d).B, p.groups_b, o.state_dim, p.state_dim, o.fast_b[d]);
    load_rows(c_tile, s.direction(d).C, p.groups_c, o.state_dim, p.state_dim, o.fast_c[d]);
  }

  // Where visits are summed over, 0 * NaN must not spread: what is not finite goes from the tiles of that side, and
  // comes back as NaN in what sees it (spoil). Whether there was such a value; the same for all threads.
  __device__ bool clean() {
    bool found = false;
    const auto of = [&](T* tile, int columns, int pitch) {
      for (int k = tid; k < Q * columns; k += kThreads) {
        T& value = tile[k / columns * pitch + k % columns];
        if (finite(to_float(value))) continue;
        found = true, value = T{};
      }
    };
    of(dy_tile, o.head_dim, pitch_p), of(b_tile, o.state_dim, pitch_n), of(c_tile, o.state_dim, pitch_n);
    found = warp_any(found);
    if (tid % kWarp == 0) dots[warp] = found;
    __syncthreads();
    for (int k = 0; k < kWarps; ++k) found |= dots[k] != 0;
    __syncthreads();
    return found;
  }
  __device__ static bool finite(float x) { return fabsf(x) < INFINITY; }
  // Whether visit j is in the output of visit i.
  __device__ bool sees(int d0, int until, int i, int j) const {
    for (int d = d0; d <= until; ++d)
      if ((d ? j >= i : j <= i) && segments[d * Q + i] == segments[d * Q + j] && visits[d * Q + i].weight != 0.f &&
          visits[d * Q + j].step != 0.f)
        return true;
    return false;
  }
  // outputs: the rows of sums are outputs, and take from the visits that they see; else from those that see them.
  __device__ void spoil(Accumulator<kRows, kColumns>& sums, int i0, int64_t column, int64_t width,
                        const SsdScanTensor& t, int64_t groups, bool outputs, int d0, int until) const {
    const T* from = group_of<T>(t, groups, b, h, p.heads);
    sums.each([&](float& value, int i, int j) {
      if (column + j >= width) return;
      for (int k = 0; k < Q; ++k)
        if (tokens[k] >= 0 && (outputs ? sees(d0, until, i0 + i, k) : sees(d0, until, k, i0 + i)) &&
            !finite(to_float(from[tokens[k] * t.token_stride + column + j])))
          value = NAN;
    });
  }

  __device__ float arrive(int d, int i) const { return decay(visits[d * Q + i], segments[d * Q + i] == 0); }
  __device__ float leave(int d, int i) const {
    const int exit = d * Q + (d ? 0 : Q - 1);
    return decay(visits[exit], visits[d * Q + i], segments[d * Q + i] == segments[exit]);
  }

  // M and W of directions d to `until`, and the sums of E. One product per warp at most.
  __device__ void pairs(int d0, int until) {
    const int across = Q / kColumns;
    if (warp >= Q / kRows * across) return;
    const int i0 = warp / across * kRows, j0 = warp % across * kColumns;
    Accumulator<kRows, kColumns> gram, scores, m, w;
    gram.clear(), scores.clear(), m.clear(), w.clear();
    multiply<Major::K, Major::K>(gram, dy_tile + i0 * pitch_p, pitch_p, x_tile + j0 * pitch_p, pitch_p, o.head_dim);
    multiply<Major::K, Major::K>(scores, c_tile + i0 * pitch_n, pitch_n, b_tile + j0 * pitch_n, pitch_n, o.state_dim);
    for (int d = d0; d <= until; ++d) {
      float row[kRows / 8] = {}, column[kColumns / 4] = {};
      double row_flow[kRows / 8] = {}, column_flow[kColumns / 4] = {};
      each_pair_of_visits<kRows, kColumns>(
          visits + d * Q, segments + d * Q, d == 1, i0, j0,
          [&](int k, int l, int i, const Visit& to, int j, const Visit& from, bool on) {
            if (!on) return;  // nor may its NaN be
            const int e = k % 2 * 2 + l % 2;
            const float a = decay(to, from, true);
            const float g = gram.v[k / 2][l / 2][e], s_ij = scores.v[k / 2][l / 2][e], both = a * g * s_ij;
            const float factor = a * from.step * to.weight;
            if (from.step != 0.f && to.weight != 0.f)
              m.v[k / 2][l / 2][e] += s_ij * factor, w.v[k / 2][l / 2][e] += g * factor;
            if (i == j) {
              diagonal[d * Q + i] = both, gram_diagonal[i] = g;
            } else {
              const float by_step = from.step == 0.f ? 0.f : both * from.step;
              const float flow = to.weight == 0.f ? 0.f : by_step * to.weight;
              row[k] += by_step, column[l] += to.weight == 0.f ? 0.f : both * to.weight;
              row_flow[k] += flow, column_flow[l] += flow;  // each in both, to the last bit
            }
          });
#pragma unroll
      for (int k = 0; k < kRows / 8; ++k) {
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2)
          row[k] += shuffle_xor(row[k], mask), row_flow[k] += shuffle_xor(row_flow[k], mask);
        const int at = (d * across + warp % across) * Q + i0 + k / 2 * 16 + k % 2 * 8 + lane_row();
        if (lane_column() == 0) row_sums[at] = row[k], row_flows[at] = row_flow[k];
      }
#pragma unroll
      for (int l = 0; l < kColumns / 4; ++l) {
#pragma unroll
        for (int mask = 4; mask < kWarp; mask *= 2)
          column[l] += shuffle_xor(column[l], mask), column_flow[l] += shuffle_xor(column_flow[l], mask);
        const int at = (d * (Q / kRows) + warp / across) * Q + j0 + l / 2 * 8 + lane_column() + l % 2;
        if (lane_row() == 0) column_sums[at] = column[l], column_flows[at] = column_flow[l];
      }
    }
    m.each_pair([&](float u, float v, int i, int j) { store_pair(m_tile + (i0 + i) * pitch_q + j0 + j, u, v, 2); });
    w.each_pair([&](float u, float v, int i, int j) { store_pair(w_tile + (i0 + i) * pitch_q + j0 + j, u, v, 2); });
  }

  __device__ int64_t state_at(int64_t row, int64_t column) const {
    return ((bh * s.chunks + c) * p.head_dim + row) * p.state_dim + column;
  }

  // By what h (0) or g (1) were divided.
  __device__ float state_scale(int of, int d) const {
    if constexpr (std::is_same_v<T, half16>)
      return o.scale[of][d][bh * s.chunks + c];
    else
      return 1.f;
  }

  // Columns [n0, n0 + state_columns) of h and g, split into parts; and their part of h . g.
  __device__ void load_states(int d, int64_t n0) {
    const int columns = o.state_columns, pitch = padded<T>(columns);
    float dot = 0;
    for (int k = tid; k < o.head_dim * columns; k += kThreads) {
      const int r = k / columns, n = k % columns;
      const bool inside = r < p.head_dim && n0 + n < p.state_dim;
      float value[2] = {inside ? o.entering[d][state_at(r, n0 + n)] : 0.f,
                        inside ? o.leaving[d][state_at(r, n0 + n)] : 0.f};
      dot += value[0] * value[1];
#pragma unroll
      for (int of = 0; of < 2; ++of) {
        value[of] /= state_scale(of, d);
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part) {
          const T rounded = from_float<T>(value[of]);
          states[((of * kParts<T> + part) * o.head_dim + r) * pitch + n] = rounded;
          value[of] -= to_float(rounded);
        }
      }
    }
    double sum = dot;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (tid % kWarp == 0) dots[warp] = sum;
    __syncthreads();
    if (tid == 0) {
      double& through = o.through[d][bh * s.chunks + c];
      double all = n0 > 0 ? through : 0;
      for (int k = 0; k < kWarps; ++k) all += dots[k];
      through = all;
    }
  }

  // Columns [n0, ...) of dC and dB: half of the warps make one, half the other.
  __device__ void projections(int d0, int until, int64_t n0, bool again) {
    const int across = o.state_columns / kColumns, units = Q / kRows * across, pitch = padded<T>(o.state_columns);
    const int side = warp / (kWarps / 2), unit = warp % (kWarps / 2);
    const bool busy = unit < units;
    const int i0 = unit / across * kRows, j0 = unit % across * kColumns;
    Accumulator<kRows, kColumns> sums, carried;
    sums.clear();
    if (busy) {
      if (side == 0)
        multiply<Major::K, Major::MN>(sums, w_tile + i0 * pitch_q, pitch_q, b_tile + n0 + j0, pitch_n, Q);
      else
        multiply<Major::MN, Major::MN>(sums, w_tile + i0, pitch_q, c_tile + n0 + j0, pitch_n, Q);
    }
    const T* rows = (side == 0 ? dy_tile : x_tile) + i0 * pitch_p;
    const T* other = (side == 0 ? c_tile : b_tile) + n0 + j0;
    for (int d = d0; d <= until; ++d) {
      __syncthreads();
      load_states(d, n0);
      if (!busy) continue;
      carried.clear();
      for (int part = 0; part < kParts<T>; ++part)
        multiply<Major::K, Major::MN>(carried, rows, pitch_p,
                                      states + (side * kParts<T> + part) * o.head_dim * pitch + j0, pitch, o.head_dim);
#pragma unroll
      for (int k = 0; k < kRows / 8; ++k) {
        const int i = i0 + k / 2 * 16 + k % 2 * 8 + lane_row();
        const float flow = side == 0 ? arrive(d, i) : leave(d, i), raised = state_scale(side, d);
        const float factor = flow * (side == 0 ? visits[d * Q + i].weight : visits[d * Q + i].step);
        float dot = 0;
#pragma unroll
        for (int l = 0; l < kColumns / 4; ++l) {
          const float value = raised * carried.v[k / 2][l / 2][k % 2 * 2 + l % 2];
          if (factor != 0.f) sums.v[k / 2][l / 2][k % 2 * 2 + l % 2] += factor * value;
          dot += value * to_float(other[i * pitch_n + l / 2 * 8 + lane_column() + l % 2]);
        }
        dot += shuffle_xor(dot, 1), dot += shuffle_xor(dot, 2);
        if (lane_column() == 0)
          (side == 0 ? from_state : to_state)[(d * 2 + unit % across) * Q + i] += flow == 0.f ? 0.f : flow * dot;
      }
    }
    if (busy && spoiled && side == 0)
      spoil(sums, i0, n0 + j0, p.state_dim, s.direction(d0).B, p.groups_b, true, d0, until);
    else if (busy && spoiled)
      spoil(sums, i0, n0 + j0, p.state_dim, s.direction(d0).C, p.groups_c, false, d0, until);
    if (busy) store(side == 0 ? o.C[d0] : o.B[d0], sums, i0, n0 + j0, p.state_dim, again && shared(side, d0));
  }
  // Whether the reverse pass adds to what the forward one stored.
  __device__ bool shared(int side, int d) const {
    return side == 0 ? o.C[d].data == o.C[0].data : o.B[d].data == o.B[0].data;
  }

  // Columns [p0, ...) of dx.
  __device__ void values(int d0, int until, int64_t p0, bool again) {
    const int across = o.value_columns / kColumns;
    const int i0 = warp / across * kRows, j0 = warp % across * kColumns;
    const bool busy = i0 < Q && p0 + j0 < o.head_dim;
    Accumulator<kRows, kColumns> sums, carried;
    sums.clear();
    if (busy) multiply<Major::MN, Major::MN>(sums, m_tile + i0, pitch_q, dy_tile + p0 + j0, pitch_p, Q);
    for (int d = d0; d <= until; ++d) {
      __syncthreads();
      for (int k = tid; k < o.value_columns * o.state_dim; k += kThreads) {
        const int r = k / o.state_dim, n = k % o.state_dim;
        const bool inside = p0 + r < p.head_dim && n < p.state_dim;
        states[r * pitch_n + n] = from_float<T>(inside ? o.leaving[d][state_at(p0 + r, n)] / state_scale(1, d) : 0.f);
      }
      __syncthreads();
      if (!busy) continue;
      carried.clear();
      multiply<Major::K, Major::K>(carried, b_tile + i0 * pitch_n, pitch_n, states + j0 * pitch_n, pitch_n,
                                   o.state_dim);
#pragma unroll
      for (int k = 0; k < kRows / 8; ++k) {
        const int i = i0 + k / 2 * 16 + k % 2 * 8 + lane_row();
        const float factor = leave(d, i) * visits[d * Q + i].step * state_scale(1, d);
#pragma unroll
        for (int l = 0; l < kColumns / 4; ++l)
          if (factor != 0.f)
            sums.v[k / 2][l / 2][k % 2 * 2 + l % 2] += factor * carried.v[k / 2][l / 2][k % 2 * 2 + l % 2];
      }
    }
    if (!busy) return;
    if (spoiled) spoil(sums, i0, p0 + j0, p.head_dim, o.dy, p.heads, false, d0, until);
    if (p.D && !again) {
      const float skip = static_cast<const float*>(p.D)[h];
      sums.each(
          [&](float& value, int i, int j) { value += skip * to_float(dy_tile[(i0 + i) * pitch_p + p0 + j0 + j]); });
    }
    store(o.x, sums, i0, p0 + j0, p.head_dim, again);
  }

  __device__ void store(const PerHead& to, Accumulator<kRows, kColumns>& sums, int i0, int64_t column, int64_t width,
                        bool again) {
    sums.each_pair([&](float u, float v, int i, int j) {
      const int token = tokens[i0 + i];
      if (token < 0 || column + j >= width) return;
      if (!to.partial) {
        const int64_t at = ((b * p.length + token) * p.heads + h) * width + column + j;
        return store_pair(static_cast<T*>(to.data) + at, u, v, width - column - j);
      }
      float* partial = static_cast<float*>(to.data) + ((s.rows(b, c) + i0 + i) * p.heads + h) * width + column + j;
      if (again) {
        u += partial[0];
        if (column + j + 1 < width) v += partial[1];
      }
      store_pair(partial, u, v, width - column - j);
    });
  }

  __device__ void store_sums(int first, int last) {
    for (int d = first; d <= last; ++d) {
      for (int i = tid; i < Q; i += kThreads) {
        VisitSums sum{};
        for (int k = d * (Q / kColumns); k < (d + 1) * (Q / kColumns); ++k)
          sum.row += row_sums[k * Q + i], sum.flow -= row_flows[k * Q + i];
        for (int k = d * (Q / kRows); k < (d + 1) * (Q / kRows); ++k)
          sum.column += column_sums[k * Q + i], sum.flow += column_flows[k * Q + i];
        sum.diagonal = diagonal[d * Q + i], sum.gram = gram_diagonal[i];
        sum.from_state = from_state[2 * d * Q + i] + from_state[(2 * d + 1) * Q + i];
        sum.to_state = to_state[2 * d * Q + i] + to_state[(2 * d + 1) * Q + i];
        o.sums[d][s.rows(b, h, c) + i] = sum;
      }
      if (p.state_dim == 0 && tid == 0) o.through[d][bh * s.chunks + c] = 0;
    }
  }

  const ScanPlan& s;
  const Gradients& o;
  const SsdScanParams& p;
  const int Q, tid, warp;
  bool spoiled = false;
  int64_t c, bh, b, h;
  int pitch_p, pitch_n, pitch_q;
  Visit* visits;
  double *row_flows, *column_flows, *dots;
  float *row_sums, *column_sums, *diagonal, *from_state, *to_state, *gram_diagonal;
  int *segments, *tokens;
  T *x_tile, *dy_tile, *b_tile, *c_tile, *m_tile, *w_tile, *states;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const __grid_constant__ ScanPlan s, const __grid_constant__ Gradients o) {
  LINMU_SHARED(memory);
  ChunkGradients<T>(s, o, memory).run();
}

}  // namespace
}  // namespace linmu
