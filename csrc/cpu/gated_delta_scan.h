// What the gated delta rule and its gradient share. In a chunk of visits, S0 (K, V) the state that enters it, c_i the
// log-decay summed up to visit i, a_ij = exp(c_i - c_j):
//     (I + A) U = R,   A_ij = beta_i a_ij k_i . k_j  (j < i),   R_i = beta_i (v_i - exp(c_i) k_i S0)
//     y_i = exp(c_i) q_i S0 + sum_j P_ij U_j,   P_ij = a_ij q_i . k_j  (j <= i)
//     S = exp(c) S0 + sum_j exp(c - c_j) k_j (outer) U_j
// U_i is what visit i writes under its key. The system is solved by substitution, in blocks, so nothing is inverted.
#pragma once
#include "../linmu/gated_delta_scan.h"
#include "finite.h"
#include "ssd_scan.h"

namespace linmu {
namespace LINMU_ISA {

struct DeltaSizes {
  int64_t chunk;                // visits, a multiple of the vector width
  int64_t key, value;           // K and V, rounded up to it
  int64_t per_q, per_k, per_v;  // heads per group
  int64_t bundle;               // heads of one task: they share q and k, and so q k^T and k k^T; divides heads
  bool products;                // else every chunk is computed by the definition
  int64_t state() const { return key * value; }
};

// The terms that a chunk's products add up are as large as the state that enters it, and so are their roundings,
// however little of that state its visits leave; by the definition every visit overwrites roundings too. Visits of
// random keys leave a share of about exp(-visits / 2 K), so a chunk has at most 2 K of them. Where those are less than
// a vector, all is computed by the definition.
template <class A>
inline DeltaSizes delta_sizes(const GatedDeltaScanParams& p, int64_t usual) {
  constexpr int64_t W = Simd<A>::width;
  DeltaSizes s;
  const int64_t overwritten = 2 * p.key_dim / W * W, most = std::max<int64_t>(overwritten, W),
                wanted = std::min<int64_t>(p.chunk > 0 ? std::min<int64_t>(p.chunk, 256) : usual, most);
  s.products = overwritten > 0;
  s.chunk = round_up(std::max<int64_t>(std::min(wanted, p.length), 1), W);
  s.key = round_up(p.key_dim, W), s.value = round_up(p.value_dim, W);
  s.per_q = p.heads / p.groups_q, s.per_k = p.heads / p.groups_k, s.per_v = p.heads / p.groups_v;
  s.bundle = 1;
  for (int64_t n = 2; n <= kBundle && p.batch * p.heads >= n * kTasks; ++n)
    if (s.per_q % n == 0 && s.per_k % n == 0 && (s.per_v % n == 0 || n % s.per_v == 0)) s.bundle = n;
  return s;
}

// The visits of one batch row in one direction, those that the mask leaves out left out. A state passes from one visit
// to the next where both have the same segment; it enters with segment 0 and leaves with `last`.
struct DeltaVisits {
  void move_to(const GatedDeltaScanParams& p, int64_t b, bool reverse) {
    const GatedDeltaDirection& d = reverse ? p.reverse : p.forward;
    const int64_t L = p.length;
    tokens.clear(), segments.clear();
    int64_t before = -1;
    last = 0;
    for (int64_t i = 0; i < L; ++i) {
      const int64_t t = reverse ? L - 1 - i : i, token = p.token_order ? p.token_order[b * L + t] : t;
      if (d.seq_idx && before >= 0) last += d.seq_idx[b * L + token] != d.seq_idx[b * L + before];
      before = token;
      if (d.mask && !d.mask[b * L + token]) continue;
      tokens.push_back(token), segments.push_back(last);
    }
  }
  int64_t count() const { return static_cast<int64_t>(tokens.size()); }

  std::vector<int64_t> tokens;
  std::vector<int32_t> segments;
  int32_t last = 0;
};

// One chunk of one head: its rows, its decays, and the matrices made of both.
template <class T>
class DeltaChunk {
 public:
  using A = acc_t<T>;
  static constexpr int W = Simd<A>::width;

  DeltaChunk(const GatedDeltaScanParams& p, const DeltaSizes& s)
      : rows(s.chunk),
        q(s.chunk * s.key),
        k(s.chunk * s.key),
        v(s.chunk * s.value),
        q_norm(s.chunk),
        k_norm(s.chunk),
        beta(s.chunk),
        weight(s.chunk),
        decay(s.chunk),
        carry(s.chunk),
        leave(s.chunk),
        pair(s.chunk * s.chunk),
        system(s.chunk * s.chunk),
        read(s.chunk * s.chunk),
        kk(s.chunk * s.chunk),
        qk_(s.chunk * s.chunk),
        kt_(s.chunk * s.key),
        high_(s.chunk),
        low_(s.chunk),
        segment_(s.chunk),
        p_(p),
        s_(s) {}

  void move_to(const DeltaVisits& visits, int64_t b, int64_t index, int64_t head, bool reverse) {
    const GatedDeltaDirection& d = reverse ? p_.reverse : p_.forward;
    const int64_t first = index * s_.chunk, group_q = head / s_.per_q, group_k = head / s_.per_k,
                  group_v = head / s_.per_v;
    const bool same = rows.batch == b && index_ == index && reverse_ == reverse;
    n = std::min(s_.chunk, visits.count() - first), padded = round_up(n, W);
    if (!same) {
      rows.batch = b, rows.visits = n;
      std::copy(visits.tokens.begin() + first, visits.tokens.begin() + first + n, rows.tokens.begin());
    }
    const bool same_q = same && group_q == group_q_, same_k = same && group_k == group_k_;
    if (!same_q) read_rows(d.q, group_q, static_cast<A>(p_.scale), q, q_norm);
    if (!same_k) read_rows(d.k, group_k, A(1), k, k_norm);
    if (!same || group_v != group_v_) gather<T>(p_.v, rows, group_v, p_.value_dim, padded, v);
    if (!same_k) transpose<A>(k, s_.key, padded, s_.key, kt_, s_.chunk);
    has_kk_ = has_kk_ && same_k, has_qk_ = has_qk_ && same_q && same_k;
    if (!same_q || !same_k) q_most_ = largest(q + 0, padded * s_.key), k_most_ = largest(k + 0, padded * s_.key);
    index_ = index, reverse_ = reverse, group_q_ = group_q, group_k_ = group_k, group_v_ = group_v;
    read_steps(d, visits, first, head);
    safe = s_.products && stays_finite<A>(static_cast<double>(p_.key_dim) * (1 + k_most_) * (1 + k_most_ + q_most_) *
                                          (1 + beta_most_));
    if (!safe) return;
    for (int64_t i = 0; i < padded; i += W) {
      if (!has_kk_)
        gemm<A>(W, i + W, p_.key_dim, k + i * s_.key, s_.key, 1, kt_, s_.chunk, kk + i * s_.chunk, s_.chunk);
      if (!has_qk_)
        gemm<A>(W, i + W, p_.key_dim, q + i * s_.key, s_.key, 1, kt_, s_.chunk, qk_ + i * s_.chunk, s_.chunk);
    }
    has_kk_ = has_qk_ = true;
    for (int64_t i = 0; i < padded; ++i) make_row(i);
  }
  // The next move finds nothing of what the last one left.
  void forget() { index_ = -1; }

  // U of R, in place: rows of `value`.
  void solve(A* u) const {
    const int64_t ld = s_.value;
    for (int64_t i0 = 0; i0 < padded; i0 += W) {
      const A* a = system + i0 * s_.chunk;
      if (i0 > 0) gemm<A>(W, ld, i0, a, s_.chunk, 1, u, ld, u + i0 * ld, ld, {A(1)});
      a += i0;
      for (int64_t i = 1; i < W && i0 + i < n; ++i) add_rows(u + (i0 + i) * ld, a + i * s_.chunk, 1, u + i0 * ld, i);
    }
  }
  // G of (I + A)^T G = dU, in place.
  void solve_transposed(A* u) const {
    const int64_t ld = s_.value;
    for (int64_t i0 = padded - W; i0 >= 0; i0 -= W) {
      const A* a = system + i0 * s_.chunk + i0;
      const int64_t after = i0 + W;
      if (after < padded)
        gemm<A>(W, ld, n - after, system + after * s_.chunk + i0, 1, s_.chunk, u + after * ld, ld, u + i0 * ld, ld,
                {A(1)});
      for (int64_t i = std::min<int64_t>(W, n - i0) - 2; i >= 0; --i) {
        const int64_t rest = std::min<int64_t>(W, n - i0) - 1 - i;
        add_rows(u + (i0 + i) * ld, a + (i + 1) * s_.chunk + i, s_.chunk, u + (i0 + i + 1) * ld, rest);
      }
    }
  }

  // What bounds every product with a state or with rows of U, given the largest number in either.
  double bound(double state, double written) const {
    const double keys = static_cast<double>(p_.key_dim), visits = static_cast<double>(n);
    const double products = (1 + q_most_ + k_most_) * (1 + k_most_) * keys * (1 + beta_most_) * (1 + weight_most_);
    return (state * keys + written * visits * static_cast<double>(p_.value_dim)) * products * (1 + k_most_) * growth_;
  }

  Chunk rows;
  int64_t n = 0, padded = 0;  // visits, and rounded up to the width
  Buffer<A> q, k, v;          // rows; q is scaled, and both are normalised if asked for
  Buffer<A> q_norm, k_norm;   // by which each row was multiplied to be so
  Buffer<A> beta, weight;     // weight of this direction in the output
  Buffer<A> decay;            // of one visit alone, 0 where the state restarts
  Buffer<A> carry, leave;     // from the chunk's entry to a visit, and from a visit to its exit
  A total = A(0);             // from entry to exit
  Buffer<A> pair;             // a
  Buffer<A> system;           // -A
  Buffer<A> read;             // P
  Buffer<A> kk;               // k k^T
  std::vector<uint8_t> restart;
  bool safe = true;  // whether products may take the definition's place; else the matrices are not made

 private:
  static constexpr A kNothing = A(-1024);  // so is exp of this

  void read_rows(const SsdScanTensor& t, int64_t group, A scale, A* out, A* norm) const {
    const int64_t ld = s_.key;
    gather<T>(t, rows, group, p_.key_dim, padded, out);
    for (int64_t i = 0; i < n; ++i) {
      A* row = out + i * ld;
      A factor = 1;
      if (p_.normalize) {
        vec<A> squares{};
        for (int64_t j = 0; j < ld; j += W) squares = load(row + j) * load(row + j) + squares;
        factor = 1 / std::sqrt(sum<A>(squares) + A(1e-6));
      }
      norm[i] = factor, factor *= scale;
      if (factor != A(1))
        for (int64_t j = 0; j < ld; j += W) store(row + j, load(row + j) * factor);
    }
  }

  void read_steps(const GatedDeltaDirection& d, const DeltaVisits& visits, int64_t first, int64_t head) {
    const int64_t H = p_.heads, L = p_.length, b = rows.batch;
    const A *g = static_cast<const A*>(d.g) + b * L * H + head,
            *rate = static_cast<const A*>(d.beta) + b * L * H + head;
    const A* gate = static_cast<const A*>(p_.gate);
    const int32_t entry = first ? visits.segments[first - 1] : 0, exit = visits.segments[first + n - 1];
    restart.resize(s_.chunk);
    wide_t<A> sum = 0, up = 0;
    double most = 0, heaviest = 1;
    bool ordinary = true;
    for (int64_t i = 0; i < padded; ++i) {
      const bool on = i < n;
      const int64_t token = on ? rows.tokens[i] : 0;
      const A step = on ? g[token * H] : A(0), clamped = step < kNothing ? kNothing : step;
      segment_[i] = static_cast<A>(on ? visits.segments[first + i] - entry : -1);
      restart[i] = on && visits.segments[first + i] != (i ? visits.segments[first + i - 1] : entry);
      // Sums are compared within a segment only, and so see nothing of another.
      if (restart[i]) sum = 0;
      sum += clamped, up += clamped > 0 ? clamped : A(0);
      high_[i] = static_cast<A>(sum), low_[i] = static_cast<A>(sum - high_[i]);
      decay[i] = !on || restart[i] ? A(0) : std::exp(clamped);
      beta[i] = on ? rate[token * H] : A(0);
      weight[i] = on ? A(1) : A(0);
      if (on && gate && (!p_.reverse.mask || p_.reverse.mask[b * L + token])) {
        const A w = gate[p_.gate_per_token ? (b * L + token) * H + head : head];
        weight[i] = reverse_ ? 1 - w : w;
      }
      most = std::max<double>(most, std::abs(beta[i])), heaviest = std::max<double>(heaviest, std::abs(weight[i]));
      ordinary = ordinary && sum - sum == 0 && beta[i] - beta[i] == 0 && weight[i] - weight[i] == 0;
    }
    beta_most_ = ordinary ? most : std::numeric_limits<double>::infinity(), weight_most_ = heaviest;
    growth_ = std::exp(static_cast<double>(up));
    const A end_high = high_[n - 1], end_low = low_[n - 1], left = static_cast<A>(exit - entry);
    for (int64_t i = 0; i < padded; i += W) {
      const vec<A> high = load(high_ + i), low = load(low_ + i), segment = load(segment_ + i);
      store(carry + i, segment == vec<A>{} ? exp(high + low) : vec<A>{});
      store(leave + i, segment == splat(left) ? exp((end_high - high) + (end_low - low)) : vec<A>{});
    }
    total = exit == entry ? exp(splat(end_high))[0] : A(0);
  }

  // Row i of a, -A and P; nothing of them is read beyond its block.
  void make_row(int64_t i) {
    const int64_t at = i * s_.chunk, own = i / W * W;
    const A mine = static_cast<A>(i - own);
    for (int64_t j = 0; j <= own; j += W) {
      const vec<A> x = (high_[i] - load(high_ + j)) + (low_[i] - load(low_ + j));
      vec<A> e = load(segment_ + j) == splat(segment_[i]) ? exp(x) : vec<A>{};
      vec<A> before = e;
      if (j == own) {
        e = iota() <= splat(mine) ? e : vec<A>{};
        before = iota() < splat(mine) ? e : vec<A>{};
      }
      store(pair + at + j, e);
      store(system + at + j, load(kk + at + j) * before * -beta[i]);
      store(read + at + j, load(qk_ + at + j) * e);
    }
  }

  static vec<A> iota() {
    vec<A> v{};
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) v[w] = A(w);
    return v;
  }

  // row += sum over j < count of factors[j stride] others[j].
  void add_rows(A* row, const A* factors, int64_t stride, const A* others, int64_t count) const {
    const int64_t ld = s_.value;
    int64_t at = 0;
    const auto columns = [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      for (; at + V * W <= ld; at += V * W) {
        vec<A> sum[V];
#pragma GCC unroll 8
        for (int x = 0; x < V; ++x) sum[x] = load(row + at + x * W);
        for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 8
          for (int x = 0; x < V; ++x) sum[x] = load(others + j * ld + at + x * W) * factors[j * stride] + sum[x];
#pragma GCC unroll 8
        for (int x = 0; x < V; ++x) store(row + at + x * W, sum[x]);
      }
    };
    columns(std::integral_constant<int, 8>{});
    columns(std::integral_constant<int, 2>{});
    columns(std::integral_constant<int, 1>{});
  }

  Buffer<A> qk_, kt_, high_, low_, segment_;
  double q_most_ = 0, k_most_ = 0, beta_most_ = 0, weight_most_ = 1, growth_ = 1;
  int64_t index_ = -1, group_q_ = 0, group_k_ = 0, group_v_ = 0;
  bool reverse_ = false, has_kk_ = false, has_qk_ = false;
  const GatedDeltaScanParams& p_;
  const DeltaSizes& s_;
};

// A state as the caller keeps it, (K, V), to or from rows of `value`; zeros beyond, and where there is none.
template <class A>
inline void load_delta_state(const A* from, const GatedDeltaScanParams& p, const DeltaSizes& s, A* to) {
  std::fill(to, to + s.state(), A(0));
  for (int64_t i = 0; from && i < p.key_dim; ++i) std::copy_n(from + i * p.value_dim, p.value_dim, to + i * s.value);
}
template <class A>
inline void save_delta_state(const A* from, const GatedDeltaScanParams& p, const DeltaSizes& s, A* to) {
  for (int64_t i = 0; i < p.key_dim; ++i) std::copy_n(from + i * s.value, p.value_dim, to + i * p.value_dim);
}

}  // namespace LINMU_ISA
}  // namespace linmu
