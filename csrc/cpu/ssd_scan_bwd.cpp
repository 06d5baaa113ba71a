// The gradient of the scan. The adjoint of a forward scan is a reverse scan, so two walks over the chunks suffice for
// any direction: left to right go the forward states and the adjoints of the reverse ones, both kept per chunk; right
// to left go the adjoints of the forward states and the reverse states, and there the gradients are computed.
//
// With G_ij = dy_i . x_j, K_ij = C_i . B_j and a_ij = exp(S_i - S_j), per head and direction, within a chunk:
//     dx_j = sum_i M_ij dy_i,   d(K_ij) = weight_i a_ij dt_j G_ij,   E_ij = a_ij K_ij G_ij
//     d(dt_j) = sum_i weight_i E_ij,   d(weight_i) = sum_j E_ij dt_j
//     d(log-decay of t) = sum of weight_i E_ij dt_j over the pairs whose path crosses t
// The carried states add the same terms with a chunk's edge in place of i or j.
#include <numeric>

#include "ssd_scan.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// to[w] += sign * v[w].
inline void add_wide(long double* to, vd v, int sign) {
  for (int w = 0; w < Simd<double>::width; ++w) to[w] += sign * static_cast<long double>(v[w]);
}
inline void add_wide(double* to, vf v, int sign) {
  typedef float half __attribute__((vector_size(LINMU_VECTOR_BYTES / 2)));
  half part[2];
  std::memcpy(part, &v, sizeof(v));
  for (int i = 0; i < 2; ++i, to += Simd<double>::width)
    store(to, load(to) + __builtin_convertvector(part[i], vd) * static_cast<double>(sign));
}

// out = a b, summed in parts of 16. Gradients of A and dt are sums over pairs that largely cancel; one running sum over
// a whole row would lose there, per product, what the recurrence does not.
template <class A>
inline void gemm_in_parts(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* out,
                          int64_t ldo) {
  constexpr int64_t kPart = 16;
  gemm<A>(m, n, std::min(k, kPart), a, lda, 1, b, ldb, out, ldo);
  for (int64_t l = kPart; l < k; l += kPart)
    gemm<A>(m, n, std::min(k - l, kPart), a + l, lda, 1, b + l * ldb, ldb, out, ldo, {A(1), nullptr});
}

// Heads [first, last) of one task, and where each adds the gradients of what it shares with heads of other tasks:
// slots of group_heads heads, summed in order when all tasks are done.
template <class A>
struct Shared {
  A* data = nullptr;  // (B, L, slots, dim)
  Buffer<A> own;      // data, unless that is the gradient itself
  int64_t group_heads = 1, slots = 0, dim = 0;

  int64_t slot(int64_t head) const { return head / group_heads; }
  bool starts(int64_t head) const { return head % group_heads == 0; }

  // Adds the chunk's tile to the slot, or stores it there when nothing has been.
  void add(const Chunk& c, int64_t length, int64_t slot, bool first, const A* tile) const {
    constexpr int64_t W = Simd<A>::width;
    const int64_t ld = round_up(dim, W);
    for (int64_t i = 0; i < c.visits; ++i, tile += ld) {
      A* out = data + ((c.batch * length + c.tokens[i]) * slots + slot) * dim;
      int64_t n = 0;
      for (; n + W <= dim; n += W) store(out + n, first ? load(tile + n) : load(out + n) + load(tile + n));
      for (; n < dim; ++n) out[n] = first ? tile[n] : out[n] + tile[n];
    }
  }
};

// Sums over tokens of one batch row and head, by direction.
template <class Wide>
struct Totals {
  Wide A[2] = {}, dt_bias[2] = {}, D = 0, gate = 0;
};

template <class A>
struct Plan {
  ScanSizes sizes;
  int64_t unit;  // heads per task
  Shared<A> x, B[2], C[2];
  std::vector<Totals<wide_t<A>>> totals;  // (B, H)
};

template <class T>
class ScanGrad {
  using A = acc_t<T>;
  using Wide = wide_t<A>;
  static constexpr int W = Simd<A>::width;

 public:
  ScanGrad(const SsdScanBwdParams& g, Plan<A>& plan)
      : g_(g),
        p_(g.scan),
        plan_(plan),
        s_(plan.sizes),
        chunk_(s_.chunk),
        decays_{Decays<A>(s_.chunk), Decays<A>(s_.chunk)},
        q_(s_.chunk),
        np_(s_.state_dim),
        pp_(s_.head_dim) {
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      passed_[d] = Buffer<A>(s_.bundle * s_.chunks * s_.state), running_[d] = Buffer<A>(s_.bundle * s_.state);
      b_tile_[d] = Buffer<A>(q_ * np_), c_tile_[d] = Buffer<A>(q_ * np_);
      k_[d] = Buffer<A>(q_ * q_), dk_[d] = Buffer<A>(q_ * q_);
      db_[d] = Buffer<A>(q_ * np_), dc_[d] = Buffer<A>(q_ * np_);
      for (auto* list : {&row_, &column_, &own_, &arrive_, &depart_}) (*list)[d] = Buffer<A>(q_);
      flow_[d] = Buffer<Wide>(q_);
    }
    x_ = Buffer<A>(q_ * pp_), xt_ = Buffer<A>(q_ * pp_), dy_ = Buffer<A>(q_ * pp_), dx_ = Buffer<A>(q_ * pp_);
    m_ = Buffer<A>(q_ * q_), gram_ = Buffer<A>(q_ * q_), adjoint_t_ = Buffer<A>(s_.state);
    scratch_ = Buffer<A>(q_ * std::max(np_, pp_)), factor_ = Buffer<A>(q_), decay_sum_ = Buffer<Wide>(q_);
  }

  void run(int64_t b, int64_t first_head) {
    b_ = b, h0_ = first_head;
    const bool f = p_.forward.on, r = p_.reverse.on;
    // running_[0] holds forward states, then their adjoints; running_[1] adjoints of reverse states, then the states.
    if (f) start_states(0, p_.initial_state);
    if (r) start_adjoints(1, f ? nullptr : g_.grad_final_state);
    for (int64_t c = 0; c < s_.chunks; ++c) {
      enter(c);
      for (int64_t h = 0; h < s_.bundle; ++h) {
        gather_head(h, false);
        if (f) keep(0, c, h), advance_state(0, running(0, h));
        if (r) keep(1, c, h), advance_adjoint(1, running(1, h));
      }
    }
    if (!f && g_.initial_state) save_adjoints(1);
    if (f) start_adjoints(0, g_.grad_final_state);
    if (r) start_states(1, f ? nullptr : p_.initial_state);
    for (int64_t c = s_.chunks - 1; c >= 0; --c) gradients(c);
    if (f && g_.initial_state) save_adjoints(0);
  }

 private:
  const SsdScanDirection& direction(int d) const { return d ? p_.reverse : p_.forward; }
  const SsdScanDirectionGrads& grads(int d) const { return d ? g_.reverse : g_.forward; }
  A* running(int d, int64_t h) const { return running_[d] + h * s_.state; }
  const A* passed(int d, int64_t c, int64_t h) const { return passed_[d] + (c * s_.bundle + h) * s_.state; }
  // What the reverse direction shares with the forward one is kept once.
  bool same_b() const { return p_.forward.on && p_.reverse.on && p_.forward.B.data == p_.reverse.B.data; }
  bool same_c() const { return p_.forward.on && p_.reverse.on && p_.forward.C.data == p_.reverse.C.data; }
  bool same_k() const { return p_.forward.on && p_.reverse.on && p_.shared_projections; }
  int of_b(int d) const { return same_b() ? 0 : d; }
  int of_c(int d) const { return same_c() ? 0 : d; }
  int of_k(int d) const { return same_k() ? 0 : d; }

  // States lie (P, N), adjoints (N, P).
  void start_states(int d, const void* from) {
    const int64_t at = (b_ * p_.heads + h0_) * p_.head_dim * p_.state_dim;
    for (int64_t h = 0; h < s_.bundle; ++h)
      load_state(from ? static_cast<const A*>(from) + at + h * p_.head_dim * p_.state_dim : nullptr, p_.head_dim,
                 p_.state_dim, false, np_, s_.state, running(d, h));
  }
  void start_adjoints(int d, const void* from) {
    const int64_t at = (b_ * p_.heads + h0_) * p_.head_dim * p_.state_dim;
    for (int64_t h = 0; h < s_.bundle; ++h)
      load_state(from ? static_cast<const A*>(from) + at + h * p_.head_dim * p_.state_dim : nullptr, p_.head_dim,
                 p_.state_dim, true, pp_, s_.state, running(d, h));
  }
  void save_adjoints(int d) {
    const int64_t at = (b_ * p_.heads + h0_) * p_.head_dim * p_.state_dim;
    for (int64_t h = 0; h < s_.bundle; ++h)
      save_state(running(d, h), p_.head_dim, p_.state_dim, true, pp_,
                 static_cast<A*>(g_.initial_state) + at + h * p_.head_dim * p_.state_dim);
  }

  void keep(int d, int64_t c, int64_t h) {
    std::copy(running(d, h), running(d, h) + s_.state, passed_[d] + (c * s_.bundle + h) * s_.state);
  }

  void enter(int64_t index) {
    chunk_.move_to(p_, s_, b_, index);
    rows_ = round_up(chunk_.visits, W);
    gathered_ = -1;
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      if (of_b(d) == d) gather<T>(direction(d).B, chunk_, h0_ / s_.per_b, p_.state_dim, q_, b_tile_[d]);
      if (of_c(d) == d) gather<T>(direction(d).C, chunk_, h0_ / s_.per_c, p_.state_dim, q_, c_tile_[d]);
    }
  }

  void gather_head(int64_t h, bool with_transpose) {
    const int64_t group = (h0_ + h) / s_.per_x;
    if (group != gathered_) {
      gather<T>(p_.x, chunk_, group, p_.head_dim, q_, x_);
      if (with_transpose) transpose<A>(x_, pp_, q_, pp_, xt_, q_);
    }
    gathered_ = group;
    gather<T>(g_.grad_y, chunk_, h0_ + h, p_.head_dim, q_, dy_);
    for (int d = 0; d < 2; ++d)
      if (direction(d).on) decays_[d].move_to(p_, chunk_, h0_ + h, d);
  }

  void advance_state(int d, A* state) {
    scale_rows<A>(b_tile_[of_b(d)], rows_, np_, decays_[d].leave, decays_[d].step, scratch_);
    gemm<A>(p_.head_dim, np_, chunk_.visits, x_, 1, pp_, scratch_, np_, state, np_, {decays_[d].total, nullptr});
  }
  void advance_adjoint(int d, A* adjoint) {
    scale_rows<A>(dy_, rows_, pp_, decays_[d].carry, decays_[d].weight, scratch_);
    gemm<A>(p_.state_dim, pp_, chunk_.visits, c_tile_[of_c(d)], 1, np_, scratch_, pp_, adjoint, pp_,
            {decays_[d].total, nullptr});
  }

  void gradients(int64_t c) {
    enter(c);
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      if (of_k(d) == d) multiply_projections(d);
      std::fill(dk_[d].get(), dk_[d] + q_ * q_, A(0));
      std::fill(db_[d].get(), db_[d] + q_ * np_, A(0));
      std::fill(dc_[d].get(), dc_[d] + q_ * np_, A(0));
    }
    bool first = true;
    for (int64_t h = 0; h < s_.bundle; ++h) {
      const int64_t head = h0_ + h;
      if (h == 0 || plan_.x.starts(head)) {
        std::fill(dx_.get(), dx_ + q_ * pp_, A(0));
        first = plan_.x.starts(head);
      }
      gather_head(h, true);
      head_gradients(c, h);
      if (h + 1 == s_.bundle || plan_.x.starts(head + 1))
        plan_.x.add(chunk_, p_.length, plan_.x.slot(head), first, dx_);
    }
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on || of_k(d) != d) continue;
      gemm<A>(rows_, np_, chunk_.visits, dk_[d], q_, 1, b_tile_[of_b(d)], np_, dc_[of_c(d)], np_, {A(1), nullptr});
      gemm<A>(rows_, np_, chunk_.visits, dk_[d], 1, q_, c_tile_[of_c(d)], np_, db_[of_b(d)], np_, {A(1), nullptr});
    }
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      const Shared<A>&B = plan_.B[d], &C = plan_.C[d];
      if (of_b(d) == d) B.add(chunk_, p_.length, B.slot(h0_), B.starts(h0_), db_[d]);
      if (of_c(d) == d) C.add(chunk_, p_.length, C.slot(h0_), C.starts(h0_), dc_[d]);
    }
  }

  void multiply_projections(int d) {
    A* bt = scratch_;
    transpose<A>(b_tile_[of_b(d)], np_, q_, np_, bt, q_);
    gemm_in_parts<A>(rows_, rows_, p_.state_dim, c_tile_[of_c(d)], np_, bt, q_, k_[d], q_);
  }

  void head_gradients(int64_t c, int64_t h) {
    Totals<Wide>& sums = plan_.totals[b_ * p_.heads + h0_ + h];
    gemm_in_parts<A>(rows_, rows_, p_.head_dim, dy_, pp_, xt_, q_, gram_, q_);
    std::fill(m_.get(), m_ + q_ * q_, A(0));
    for (int d = 0; d < 2; ++d)
      if (direction(d).on) within(d);
    gemm<A>(rows_, pp_, chunk_.visits, m_, 1, q_, dy_, pp_, dx_, pp_, {A(1), nullptr});
    if (p_.D) {
      const A skip = static_cast<const A*>(p_.D)[h0_ + h];
      for (int64_t i = 0; i < rows_ * pp_; i += W) store(dx_ + i, load(dy_ + i) * skip + load(dx_ + i));
      for (int64_t i = 0; i < chunk_.visits; ++i) sums.D += gram_[i * q_ + i];
    }
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      A* mine = running(d, h);
      const A* other = passed(d, c, h);
      carried(d, d ? mine : other, d ? other : mine);
      small_gradients(d, h0_ + h, sums);
      if (d)
        advance_state(1, mine);
      else
        advance_adjoint(0, mine);
    }
    if (g_.gate) gate_gradient(h0_ + h, sums);
  }

  // One row of W columns j0.. of row i: adds to M and dK, and gives E.
  vec<A> pairs(int d, int64_t i, int64_t j0, vec<A> decay) {
    const Decays<A>& w = decays_[d];
    A *m = m_ + i * q_ + j0, *dk = dk_[of_k(d)] + i * q_ + j0;
    const vec<A> k = load(k_[of_k(d)] + i * q_ + j0), g = load(gram_ + i * q_ + j0);
    const vec<A> factor = decay * load(w.step + j0) * w.weight[i];
    store(m, k * factor + load(m));
    store(dk, g * factor + load(dk));
    return decay * k * g;
  }

  void within(int d) {
    const Decays<A>& w = decays_[d];
    const int64_t blocks = rows_ / W;
    std::fill(column_[d].get(), column_[d] + q_, A(0));
    std::fill(flow_[d].get(), flow_[d] + q_, Wide(0));
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t mine = i / W;
      alignas(64) Wide leaving[W] = {};
      vec<A> sum{};
      const auto add = [&](int64_t j0, vec<A> e) {
        const vec<A> by_step = e * load(w.step + j0), pair = by_step * w.weight[i];
        sum += by_step;
        store(column_[d] + j0, e * w.weight[i] + load(column_[d] + j0));
        add_wide(leaving, pair, 1), add_wide(flow_[d] + j0, pair, -1);
      };
      for (int64_t j = d ? mine + 1 : 0; j < (d ? blocks : mine); ++j)
        add(j * W, pairs(d, i, j * W, load(w.col + j * W) * (w.row[i] * w.at_block(mine, j))));
      vec<A> e = pairs(d, i, mine * W, w.diagonal(i));
      own_[d][i] = e[i - mine * W];  // i on itself: no decay between
      e[i - mine * W] = A(0);
      add(mine * W, e);
      row_[d][i] = linmu::LINMU_ISA::sum<A>(sum);
      for (Wide x : leaving) flow_[d][i] += x;
    }
  }

  // What the state that enters the chunk, (P, N), and the adjoint of the one that leaves it, (N, P), contribute.
  void carried(int d, const A* state, const A* adjoint) {
    const Decays<A>& w = decays_[d];
    const A *b = b_tile_[of_b(d)], *c = c_tile_[of_c(d)];
    A *db = db_[of_b(d)], *dc = dc_[of_c(d)];
    transpose<A>(adjoint, pp_, np_, pp_, adjoint_t_, np_);
    gemm<A>(rows_, np_, p_.head_dim, dy_, pp_, 1, state, np_, scratch_, np_);
    for (int64_t i = 0; i < rows_; ++i)
      arrive_[d][i] = w.carry[i] * absorb(scratch_ + i * np_, w.weight[i] * w.carry[i], c + i * np_, dc + i * np_);
    gemm<A>(rows_, np_, p_.head_dim, x_, pp_, 1, adjoint_t_, np_, scratch_, np_);
    for (int64_t i = 0; i < rows_; ++i)
      depart_[d][i] = w.leave[i] * absorb(scratch_ + i * np_, w.step[i] * w.leave[i], b + i * np_, db + i * np_);
    for (int64_t i = 0; i < rows_; i += W) store(factor_ + i, load(w.step + i) * load(w.leave + i));
    gemm<A>(rows_, pp_, p_.state_dim, b, np_, 1, adjoint, pp_, dx_, pp_, {A(1), factor_});
    vec<A> dot{};
    for (int64_t i = 0; i < p_.head_dim * np_; i += W) dot = load(state + i) * load(adjoint_t_ + i) + dot;
    through_[d] = static_cast<Wide>(w.total) * sum<A>(dot);
  }

  // grad += scale * row; returns row . other.
  A absorb(const A* row, A scale, const A* other, A* grad) const {
    vec<A> dot{};
    for (int64_t n = 0; n < np_; n += W) {
      const vec<A> r = load(row + n);
      dot = r * load(other + n) + dot;
      store(grad + n, r * scale + load(grad + n));
    }
    return sum<A>(dot);
  }

  void small_gradients(int d, int64_t head, Totals<Wide>& sums) {
    const Decays<A>& w = decays_[d];
    const int64_t n = chunk_.visits;
    // Walking with the scan, departures pile up behind t; walking against it, arrivals and pairs that cross t do.
    Wide behind = through_[d];
    for (int64_t k = 0; k < n; ++k) {
      const int64_t t = d ? n - 1 - k : k;
      decay_sum_[t] = behind;
      behind += static_cast<Wide>(w.step[t]) * depart_[d][t];
    }
    Wide ahead = 0;
    const A rate = static_cast<const A*>(direction(d).A)[head];
    A* out = static_cast<A*>(grads(d).dt ? grads(d).dt : g_.forward.dt) + b_ * p_.length * p_.heads + head;
    const bool add = d == 1 && !grads(1).dt;
    for (int64_t k = n - 1; k >= 0; --k) {
      const int64_t t = d ? n - 1 - k : k;
      ahead += flow_[d][t] + static_cast<Wide>(w.weight[t]) * arrive_[d][t];
      const bool on = d == 0 || chunk_.keep[t];
      const Wide decay = on ? decay_sum_[t] + ahead : 0;
      Wide dt = on ? rate * decay + column_[d][t] + static_cast<Wide>(w.weight[t]) * own_[d][t] + depart_[d][t] : 0;
      if (p_.dt_softplus && w.raw[t] <= A(20)) dt /= 1 + std::exp(-static_cast<double>(w.raw[t]));
      sums.A[d] += w.step[t] * decay;
      sums.dt_bias[d] += dt;
      A& at = out[chunk_.tokens[t] * p_.heads];
      at = static_cast<A>(add ? at + dt : dt);
    }
  }

  void gate_gradient(int64_t head, Totals<Wide>& sums) {
    A* out = static_cast<A*>(g_.gate) + b_ * p_.length * p_.heads + head;
    const auto output = [&](int d, int64_t t) {
      return static_cast<Wide>(row_[d][t]) + own_[d][t] * decays_[d].step[t] + arrive_[d][t];
    };
    for (int64_t t = 0; t < chunk_.visits; ++t) {
      const Wide grad = chunk_.keep[t] ? output(0, t) - output(1, t) : 0;
      if (p_.gate_per_token)
        out[chunk_.tokens[t] * p_.heads] = static_cast<A>(grad);
      else
        sums.gate += grad;
    }
  }

  const SsdScanBwdParams& g_;
  const SsdScanParams& p_;
  Plan<A>& plan_;
  const ScanSizes& s_;
  int64_t b_ = 0, h0_ = 0, rows_ = 0, gathered_ = -1;
  Chunk chunk_;
  Decays<A> decays_[2];
  const int64_t q_, np_, pp_;  // padded sizes of a chunk, a state row, a head
  Buffer<A> passed_[2], running_[2];
  Buffer<A> b_tile_[2], c_tile_[2], db_[2], dc_[2], k_[2], dk_[2];
  Buffer<A> x_, xt_, dy_, dx_, m_, gram_, adjoint_t_, scratch_, factor_;
  // Per visit: sum_j E_ij dt_j and sum_i weight_i E_ij without the diagonal, E_ii, and the carried terms.
  Buffer<A> row_[2], column_[2], own_[2], arrive_[2], depart_[2];
  // What pairs that end at a visit carry across decays, less what pairs that start there do. Wider, and of the same
  // rounded value per pair: summed over visits, a pair that does not cross t cancels.
  Buffer<Wide> flow_[2], decay_sum_;
  Wide through_[2] = {};  // the state that crosses the whole chunk
};

// One bundle, or whole groups where these are enough tasks: either way a group's sum runs over its bundles in order, so
// the bits do not depend on the choice, nor on the number of threads.
inline int64_t heads_per_task(const SsdScanParams& p, const ScanSizes& s) {
  const int64_t groups = std::lcm(std::lcm(s.per_x, s.per_b), std::lcm(s.per_c, s.bundle));
  return p.batch * (p.heads / groups) >= p.threads.count ? groups : s.bundle;
}

template <class T>
void plan_shared(const SsdScanParams& p, int64_t unit, int64_t per, int64_t dim, void* out, Shared<acc_t<T>>& s) {
  using A = acc_t<T>;
  if (!out) return;
  s.group_heads = std::min(unit, per), s.slots = p.heads / s.group_heads, s.dim = dim;
  if (std::is_same_v<T, A> && s.group_heads == per) {
    s.data = static_cast<A*>(out);
  } else {
    s.own = Buffer<A>(p.batch * p.length * s.slots * dim);
    s.data = s.own;
  }
}

// The slots of each group, summed in order.
template <class T>
void reduce(const SsdScanParams& p, const Shared<acc_t<T>>& s, int64_t per, void* out) {
  using A = acc_t<T>;
  if (!s.own) return;
  const int64_t parts = per / s.group_heads, groups = s.slots / parts, W = Simd<A>::width;
  p.threads.run(p.batch * p.length, 1 + 16384 / (s.slots * s.dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * groups; i < end * groups; ++i) {
      const A* from = s.data + i * parts * s.dim;
      T* to = static_cast<T*>(out) + i * s.dim;
      for (int64_t n = 0; n < s.dim; n += W) {
        const int rest = static_cast<int>(std::min<int64_t>(W, s.dim - n));
        vec<A> sum{};
        for (int64_t k = 0; k < parts; ++k) {
          const A* at = from + k * s.dim + n;
          sum += rest == W ? load(at) : load_n(at, rest);
        }
        if (rest == W)
          store(to + n, sum);
        else
          store_n(to + n, sum, rest);
      }
    }
  });
}

template <class A>
void reduce_totals(const SsdScanBwdParams& g, const std::vector<Totals<wide_t<A>>>& totals) {
  const SsdScanParams& p = g.scan;
  for (int64_t h = 0; h < p.heads; ++h) {
    Totals<wide_t<A>> t;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Totals<wide_t<A>>& one = totals[b * p.heads + h];
      for (int d = 0; d < 2; ++d) t.A[d] += one.A[d], t.dt_bias[d] += one.dt_bias[d];
      t.D += one.D, t.gate += one.gate;
    }
    if (!g.reverse.A) t.A[0] += t.A[1];
    if (!g.reverse.dt_bias) t.dt_bias[0] += t.dt_bias[1];
    const auto put = [&](void* to, wide_t<A> value) {
      if (to) static_cast<A*>(to)[h] = static_cast<A>(value);
    };
    put(g.forward.A, t.A[0]), put(g.reverse.A, t.A[1]);
    put(g.forward.dt_bias, t.dt_bias[0]), put(g.reverse.dt_bias, t.dt_bias[1]);
    put(g.D, t.D);
    if (!p.gate_per_token) put(g.gate, t.gate);
  }
}

template <class T>
void scan_grad(const SsdScanBwdParams& g) {
  using A = acc_t<T>;
  const SsdScanParams& p = g.scan;
  Plan<A> plan;
  const ScanSizes& s = plan.sizes = scan_sizes<A>(p);
  plan.unit = heads_per_task(p, s);
  plan.totals.resize(p.batch * p.heads);
  plan_shared<T>(p, plan.unit, s.per_x, p.head_dim, g.x, plan.x);
  for (int d = 0; d < 2; ++d) {
    const SsdScanDirectionGrads& of = d ? g.reverse : g.forward;
    plan_shared<T>(p, plan.unit, s.per_b, p.state_dim, of.B, plan.B[d]);
    plan_shared<T>(p, plan.unit, s.per_c, p.state_dim, of.C, plan.C[d]);
  }
  const int64_t tasks = p.heads / plan.unit;
  const double work = static_cast<double>(plan.unit) * p.length * p.head_dim * p.state_dim;
  p.threads.run(p.batch * tasks, 1 + static_cast<int64_t>(16384 / (work + 1)), [&](int64_t begin, int64_t end) {
    ScanGrad<T> task(g, plan);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t h = 0; h < plan.unit; h += s.bundle) task.run(i / tasks, i % tasks * plan.unit + h);
  });
  reduce<T>(p, plan.x, s.per_x, g.x);
  for (int d = 0; d < 2; ++d) {
    const SsdScanDirectionGrads& of = d ? g.reverse : g.forward;
    reduce<T>(p, plan.B[d], s.per_b, of.B);
    reduce<T>(p, plan.C[d], s.per_c, of.C);
  }
  reduce_totals<A>(g, plan.totals);
}

}  // namespace

void ssd_scan_bwd_cpu(const SsdScanBwdParams& g) {
  dispatch(g.scan.dtype, [&](auto* t) { scan_grad<std::remove_pointer_t<decltype(t)>>(g); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
