// The gradient of the scan. The adjoint of a forward scan is a reverse scan, so two walks over the chunks suffice for
// any direction: left to right go the forward states and the adjoints of the reverse ones, both kept per chunk; right
// to left go the adjoints of the forward states and the reverse states, and there the gradients are computed.
//
// With G_ij = dy_i . x_j, K_ij = C_i . B_j and a_ij = exp(S_i - S_j), per head and direction, within a chunk:
//     dx_j = sum_i M_ij dy_i,   d(K_ij) = weight_i a_ij dt_j G_ij,   E_ij = a_ij K_ij G_ij
//     d(dt_j) = sum_i weight_i E_ij,   d(weight_i) = sum_j E_ij dt_j
//     d(log-decay of t) = sum of weight_i E_ij dt_j over the pairs whose path crosses t
// The carried states add the same terms with a chunk's edge in place of i or j.
//
// Where y is a mean, y_i = sum_j M_ij x_j / m_i with m_i = sum_j M_ij, the gradient of M_ij is (dy_i . x_j - shift_i) /
// m_i with shift_i = dy_i . y_i - m_i dm_i. So x has a channel more here, of ones, dy one of -shift_i, and 1 / m_i is a
// factor of weight_i.
#include <numeric>

#include "scan_apart.h"
#include "ssd_scan_careful.h"
#include "ssd_scan_sums.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// out = a b, summed in parts of 16. Gradients of A and dt are sums over pairs that largely cancel; one running sum over
// a whole row would lose there, per product, what the recurrence does not.
constexpr int64_t kPart = 16;

template <class A>
inline void gemm_in_parts(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* out,
                          int64_t ldo) {
  gemm<A>(m, n, std::min(k, kPart), a, lda, 1, b, ldb, out, ldo);
  for (int64_t l = kPart; l < k; l += kPart)
    gemm<A>(m, n, std::min(k - l, kPart), a + l, lda, 1, b + l * ldb, ldb, out, ldo, {A(1), nullptr});
}

template <class T>
class ScanGrad {
  using A = acc_t<T>;
  using Wide = wide_t<A>;
  static constexpr int W = Simd<A>::width;

 public:
  ScanGrad(const SsdScanBwdParams& g, Plan<A>& plan, Notes& walked)
      : g_(g),
        p_(g.scan),
        plan_(plan),
        walked_(walked),
        s_(plan.sizes),
        chunk_(s_.chunk),
        decays_{Decays<A>(s_.chunk), Decays<A>(s_.chunk)},
        q_(s_.chunk),
        np_(s_.state_dim),
        pp_(s_.head_dim),
        own_dim_(p_.head_dim - p_.normalize) {
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      passed_[d] = Buffer<A>(s_.bundle * s_.chunks * s_.state), running_[d] = Buffer<A>(s_.bundle * s_.state);
      passed_bound_[d].resize(s_.bundle * s_.chunks), running_bound_[d].resize(s_.bundle);
      b_tile_[d] = Buffer<A>(q_ * np_), c_tile_[d] = Buffer<A>(q_ * np_);
      k_[d] = Buffer<A>(q_ * q_), dk_[d] = Buffer<A>(q_ * q_);
      db_[d] = Buffer<A>(q_ * np_), dc_[d] = Buffer<A>(q_ * np_);
      for (auto* list : {&row_, &column_, &own_, &arrive_, &depart_}) (*list)[d] = Buffer<A>(q_);
      flow_[d] = Buffer<Wide>(q_);
    }
    if (p_.normalize) {
      for (auto* list : {&inverse_, &dot_, &from_mass_}) *list = Buffer<A>(q_);
      for (auto* tile : {&means_, &means_t_, &dy_t_}) *tile = Buffer<A>(q_ * pp_);
      std::fill(means_.get(), means_ + q_ * pp_, A(0));
    }
    x_ = Buffer<A>(q_ * pp_), xt_ = Buffer<A>(q_ * pp_), dy_ = Buffer<A>(q_ * pp_), dx_ = Buffer<A>(q_ * pp_);
    m_ = Buffer<A>(q_ * q_), gram_ = Buffer<A>(q_ * q_), adjoint_t_ = Buffer<A>(s_.state);
    std::fill(x_.get(), x_ + q_ * pp_, A(0)), std::fill(dy_.get(), dy_ + q_ * pp_, A(0));
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
        if (f) keep(0, c, h);
        if (r) keep(1, c, h);
        if (!stays_finite<A>(bound(c, h))) {
          if (f) by_definition(0, h, running(0, h), nullptr);
          if (r) by_definition(1, h, nullptr, running(1, h));
          continue;
        }
        if (f) advance_state(0, h);
        if (r) advance_adjoint(1, h);
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
  // What the reverse direction shares with the forward one is kept once. A tensor that is given to both is not shared:
  // each direction has a gradient of its own.
  bool same_b() const { return p_.forward.on && p_.reverse.on && !g_.reverse.B; }
  bool same_c() const { return p_.forward.on && p_.reverse.on && !g_.reverse.C; }
  bool same_k() const { return p_.forward.on && p_.reverse.on && p_.shared_projections; }
  int of_b(int d) const { return same_b() ? 0 : d; }
  int of_c(int d) const { return same_c() ? 0 : d; }
  int of_k(int d) const { return same_k() ? 0 : d; }

  // States lie (P, N), adjoints (N, P).
  void start_states(int d, const void* from) {
    const int64_t at = (b_ * p_.heads + h0_) * p_.head_dim * p_.state_dim;
    for (int64_t h = 0; h < s_.bundle; ++h)
      load_state(from ? static_cast<const A*>(from) + at + h * p_.head_dim * p_.state_dim : nullptr, p_.head_dim,
                 p_.state_dim, false, np_, s_.state, running(d, h)),
          running_bound_[d][h] = largest(running(d, h), s_.state);
  }
  void start_adjoints(int d, const void* from) {
    const int64_t at = (b_ * p_.heads + h0_) * p_.head_dim * p_.state_dim;
    for (int64_t h = 0; h < s_.bundle; ++h)
      load_state(from ? static_cast<const A*>(from) + at + h * p_.head_dim * p_.state_dim : nullptr, p_.head_dim,
                 p_.state_dim, true, pp_, s_.state, running(d, h)),
          running_bound_[d][h] = largest(running(d, h), s_.state);
  }
  void save_adjoints(int d) {
    const int64_t at = (b_ * p_.heads + h0_) * p_.head_dim * p_.state_dim;
    for (int64_t h = 0; h < s_.bundle; ++h)
      save_state(running(d, h), p_.head_dim, p_.state_dim, true, pp_,
                 static_cast<A*>(g_.initial_state) + at + h * p_.head_dim * p_.state_dim);
  }

  void keep(int d, int64_t c, int64_t h) {
    std::copy(running(d, h), running(d, h) + s_.state, passed_[d] + (c * s_.bundle + h) * s_.state);
    passed_bound_[d][c * s_.bundle + h] = running_bound_[d][h];
  }

  void enter(int64_t index) {
    chunk_.move_to(p_, s_, b_, index);
    rows_ = round_up(chunk_.visits, W);
    gathered_ = -1;
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      if (of_b(d) == d) gather<T>(direction(d).B, chunk_, h0_ / s_.per_b, p_.state_dim, q_, b_tile_[d]);
      if (of_c(d) == d) gather<T>(direction(d).C, chunk_, h0_ / s_.per_c, p_.state_dim, q_, c_tile_[d]);
      b_most_[d] = largest(b_tile_[of_b(d)] + 0, rows_ * np_), c_most_[d] = largest(c_tile_[of_c(d)] + 0, rows_ * np_);
    }
  }

  void gather_head(int64_t h, bool with_transpose) {
    const int64_t group = (h0_ + h) / s_.per_x;
    if (group != gathered_) {
      gather<T>(p_.x, chunk_, group, own_dim_, q_, x_, pp_);
      for (int64_t i = 0; p_.normalize && i < chunk_.visits; ++i) x_[i * pp_ + own_dim_] = A(1);
      x_most_ = largest(x_ + 0, rows_ * pp_);
      if (with_transpose) transpose<A>(x_, pp_, q_, pp_, xt_, q_);
    }
    gathered_ = group;
    if (p_.normalize)
      gather<A>(g_.grad_y, chunk_, h0_ + h, own_dim_, q_, dy_, pp_);
    else
      gather<T>(g_.grad_y, chunk_, h0_ + h, own_dim_, q_, dy_);
    const double most = p_.normalize ? weigh_means(h0_ + h) : 1.0;
    dy_most_ = largest(dy_ + 0, rows_ * pp_);
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      Decays<A>& w = decays_[d];
      w.move_to(p_, chunk_, h0_ + h, d);
      if (!p_.normalize) continue;
      for (int64_t i = 0; i < chunk_.visits; ++i) w.weight[i] = inverse_[i] == 0 ? A(0) : w.weight[i] * inverse_[i];
      w.weights *= most;
    }
  }

  // The shifts and the inverse masses of a head's visits, 0 of those that have no mean; the largest of the latter.
  double weigh_means(int64_t head) {
    Largest<A> most;
    std::fill(inverse_.get(), inverse_ + q_, A(0));
    dot_with_means(head);
    for (int64_t i = 0; i < chunk_.visits; ++i) {
      const int64_t at = (b_ * p_.length + chunk_.tokens[i]) * p_.heads + head;
      const A mass = static_cast<const A*>(p_.mass)[at];
      A* row = dy_ + i * pp_;
      if (mass == 0) {
        std::fill(row, row + own_dim_ + 1, A(0)), dot_[i] = from_mass_[i] = A(0);
        continue;
      }
      from_mass_[i] = g_.grad_mass ? static_cast<const A*>(g_.grad_mass)[at] * mass : A(0);
      row[own_dim_] = from_mass_[i] - dot_[i], inverse_[i] = 1 / mass;
    }
    for (int64_t i = 0; i < q_; i += W) most.see(load(inverse_ + i));
    return std::max(most.value(), 1.0);
  }

  // dy . y of each visit, summed as dy . x is: of a visit that sees itself alone, the difference is 0.
  void dot_with_means(int64_t head) {
    const int64_t size = own_dim_;
    const SsdScanTensor y{p_.y, p_.length * p_.heads * size, p_.heads * size, size};
    gather<A>(y, chunk_, head, size, q_, means_, pp_);
    transpose<A>(means_, pp_, q_, pp_, means_t_, q_), transpose<A>(dy_, pp_, q_, pp_, dy_t_, q_);
    for (int64_t i = 0; i < q_; i += W) {
      vec<A> dot{};
      for (int64_t from = 0; from < size; from += kPart) {
        vec<A> part{};
        for (int64_t n = from; n < std::min(from + kPart, size); ++n)
          part = load(means_t_ + n * q_ + i) * load(dy_t_ + n * q_ + i) + part;
        dot = part + dot;
      }
      store(dot_ + i, dot);
    }
  }

  double weights() const {
    return std::max(direction(0).on ? decays_[0].weights : 0.0, direction(1).on ? decays_[1].weights : 0.0);
  }
  double next_state(int d, double state) const {
    return decays_[d].growth * (state + b_most_[d] * x_most_ * decays_[d].steps);
  }
  double next_adjoint(int d, double adjoint) const {
    return decays_[d].growth * (adjoint + c_most_[d] * dy_most_ * decays_[d].weights * static_cast<double>(rows_));
  }

  // Of everything that is summed for this chunk and head.
  double bound(int64_t c, int64_t h) const {
    const double N = static_cast<double>(p_.state_dim), P = static_cast<double>(p_.head_dim), x = x_most_,
                 dy = dy_most_ * weights();
    const double gram = P * x * dy, Q = static_cast<double>(rows_) * static_cast<double>(s_.bundle);
    double most = x + dy + gram, pairs = 0;
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      const double kept = passed_bound_[d][c * s_.bundle + h], now = running_bound_[d][h];
      const double state = next_state(d, d ? now : kept), adjoint = next_adjoint(d, d ? kept : now);
      const double b = b_most_[d], cs = c_most_[d], products = N * b * cs,
                   steps = 1 + decays_[d].growth * decays_[d].steps;
      pairs += products * gram * Q * steps;
      most += (products + b * steps) * (1 + gram + dy) + Q * steps * (gram * (products + b + cs) + products * dy);
      most += state * P * dy * (1 + N * cs) + adjoint * steps * (P * x + N * b) * (1 + N * b) + state * adjoint * N * P;
    }
    // Sums over pairs cancel: beyond this range a large pair would take the precision of those it does not concern.
    constexpr double kRange = 1180591620717411303424.0;  // 2^70
    return pairs < kRange ? most : std::numeric_limits<double>::infinity();
  }

  // The state (P, N) moves with the scan, the adjoint (N, P) against it; of either the one that is given is kept.
  void by_definition(int d, int64_t h, A* state, A* adjoint) {
    walked_.note(b_);
    std::vector<A> moved(s_.state);
    if (state) transpose<A>(state, np_, pp_, np_, moved.data(), pp_);
    if (state && !adjoint) {
      careful_.walk(p_, s_, chunk_, decays_[d], h0_ + h, d, moved.data(), nullptr, nullptr, nullptr, x_);
    } else {
      std::vector<A> unread(q_ * std::max(np_, pp_));
      careful_.gradients(p_, s_, chunk_, decays_[d], h0_ + h, d, moved.data(), adjoint, x_, dy_, unread.data(),
                         unread.data(), unread.data());
    }
    if (state) transpose<A>(moved.data(), pp_, np_, pp_, state, np_);
    running_bound_[d][h] = largest(state ? state : adjoint, np_ * pp_);
  }

  void gradients_by_definition(int64_t c, int64_t h) {
    walked_.note(b_);
    Totals<Wide>& sums = plan_.totals[b_ * p_.heads + h0_ + h];
    const A skip = p_.D ? static_cast<const A*>(p_.D)[h0_ + h] : A(0);
    for (int64_t i = 0; p_.D && i < chunk_.visits; ++i)
      for (int64_t n = 0; n < p_.head_dim; ++n) {
        dx_[i * pp_ + n] += inverse(i) * skip * dy_[i * pp_ + n];
        sums.D += static_cast<Wide>(dy_[i * pp_ + n]) * x_[i * pp_ + n] * inverse(i);
      }
    std::vector<A> dot[2], state(s_.state), adjoint(s_.state);
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      const A *from = d ? running(d, h) : passed(d, c, h), *back = d ? passed(d, c, h) : running(d, h);
      transpose<A>(from, np_, pp_, np_, state.data(), pp_);
      std::copy(back, back + s_.state, adjoint.begin());
      careful_.gradients(p_, s_, chunk_, decays_[d], h0_ + h, d, state.data(), adjoint.data(), x_, dy_, dx_,
                         db_[of_b(d)], dc_[of_c(d)]);
      if (d)
        transpose<A>(state.data(), pp_, np_, pp_, running(d, h), np_);
      else
        std::copy(adjoint.begin(), adjoint.end(), running(d, h));
      running_bound_[d][h] = largest(running(d, h), np_ * pp_);
      for (int64_t t = 0; t < chunk_.visits; ++t)
        step_gradient(d, h0_ + h, t, careful_.decay[t], careful_.step[t], sums);
      dot[d] = careful_.dot;
    }
    if (g_.gate)
      for (int64_t t = 0; t < chunk_.visits; ++t)
        gate_gradient(h0_ + h, t, chunk_.keep[t] ? (Wide(dot[0][t]) - dot[1][t]) * inverse(t) : Wide(0), sums);
  }

  void advance_state(int d, int64_t h) {
    A* state = running(d, h);
    running_bound_[d][h] = next_state(d, running_bound_[d][h]);
    scale_rows<A>(b_tile_[of_b(d)], rows_, np_, decays_[d].leave, decays_[d].step, scratch_);
    gemm<A>(p_.head_dim, np_, chunk_.visits, x_, 1, pp_, scratch_, np_, state, np_, {decays_[d].total, nullptr});
  }
  void advance_adjoint(int d, int64_t h) {
    A* adjoint = running(d, h);
    running_bound_[d][h] = next_adjoint(d, running_bound_[d][h]);
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
    bool first = true, products = false;
    for (int64_t h = 0; h < s_.bundle; ++h) {
      const int64_t head = h0_ + h;
      if (h == 0 || plan_.x.starts(head)) {
        std::fill(dx_.get(), dx_ + q_ * pp_, A(0));
        first = plan_.x.starts(head);
      }
      gather_head(h, true);
      if (stays_finite<A>(bound(c, h)))
        products = true, head_gradients(c, h);
      else
        gradients_by_definition(c, h);
      if (h + 1 == s_.bundle || plan_.x.starts(head + 1))
        plan_.x.add(chunk_, p_.length, plan_.x.slot(head), first, dx_, pp_);
    }
    for (int d = 0; d < 2; ++d) {
      if (!products || !direction(d).on || of_k(d) != d) continue;
      gemm<A>(rows_, np_, chunk_.visits, dk_[d], q_, 1, b_tile_[of_b(d)], np_, dc_[of_c(d)], np_, {A(1), nullptr});
      gemm<A>(rows_, np_, chunk_.visits, dk_[d], 1, q_, c_tile_[of_c(d)], np_, db_[of_b(d)], np_, {A(1), nullptr});
    }
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      const Shared<A>&B = plan_.B[d], &C = plan_.C[d];
      if (of_b(d) == d) B.add(chunk_, p_.length, B.slot(h0_), B.starts(h0_), db_[d], np_);
      if (of_c(d) == d) C.add(chunk_, p_.length, C.slot(h0_), C.starts(h0_), dc_[d], np_);
    }
  }

  void multiply_projections(int d) {
    A* bt = scratch_;
    transpose<A>(b_tile_[of_b(d)], np_, q_, np_, bt, q_);
    gemm_in_parts<A>(rows_, rows_, p_.state_dim, c_tile_[of_c(d)], np_, bt, q_, k_[d], q_);
  }

  void head_gradients(int64_t c, int64_t h) {
    Totals<Wide>& sums = plan_.totals[b_ * p_.heads + h0_ + h];
    gemm_in_parts<A>(rows_, rows_, own_dim_, dy_, pp_, xt_, q_, gram_, q_);
    for (int64_t i = 0; p_.normalize && i < chunk_.visits; ++i)
      for (int64_t j = i * q_; j < i * q_ + rows_; j += W) store(gram_ + j, load(gram_ + j) - dot_[i] + from_mass_[i]);
    std::fill(m_.get(), m_ + q_ * q_, A(0));
    for (int d = 0; d < 2; ++d)
      if (direction(d).on) within(d);
    gemm<A>(rows_, pp_, chunk_.visits, m_, 1, q_, dy_, pp_, dx_, pp_, {A(1), nullptr});
    if (p_.D) {
      const A skip = static_cast<const A*>(p_.D)[h0_ + h];
      for (int64_t i = 0; i < chunk_.visits; ++i) {
        const A factor = inverse(i) * skip;
        for (int64_t n = i * pp_; n < (i + 1) * pp_; n += W) store(dx_ + n, load(dy_ + n) * factor + load(dx_ + n));
        sums.D += static_cast<Wide>(gram_[i * q_ + i]) * inverse(i);
      }
    }
    for (int d = 0; d < 2; ++d) {
      if (!direction(d).on) continue;
      A* mine = running(d, h);
      const A* other = passed(d, c, h);
      carried(d, d ? mine : other, d ? other : mine);
      small_gradients(d, h0_ + h, sums);
      if (d)
        advance_state(1, h);
      else
        advance_adjoint(0, h);
    }
    if (g_.gate) gate_gradients(h0_ + h, sums);
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
    for (int64_t k = n - 1; k >= 0; --k) {
      const int64_t t = d ? n - 1 - k : k;
      // No path crosses a restart: what is left of the sum there are roundings of pairs that lie behind it.
      const bool restarts = chunk_.segment[d][t] != (k ? chunk_.segment[d][d ? t + 1 : t - 1] : 0);
      ahead += flow_[d][t] + static_cast<Wide>(w.weight[t]) * arrive_[d][t];
      const Wide step = static_cast<Wide>(w.weight[t]) * own_[d][t] + column_[d][t] + depart_[d][t];
      step_gradient(d, head, t, restarts ? Wide(0) : decay_sum_[t] + ahead, step, sums);
      if (restarts) ahead = 0;
    }
  }

  // From the gradients of a visit's log-decay and of its step as it enters the state.
  void step_gradient(int d, int64_t head, int64_t t, Wide decay, Wide step, Totals<Wide>& sums) {
    const Decays<A>& w = decays_[d];
    const Wide rate = static_cast<const A*>(direction(d).A)[head];
    A* out = static_cast<A*>(grads(d).dt ? grads(d).dt : g_.forward.dt) + b_ * p_.length * p_.heads + head;
    A& at = out[chunk_.tokens[t] * p_.heads];
    const bool add = d == 1 && !grads(1).dt;
    Wide dt = 0;
    if (d == 0 || chunk_.keep[t]) {
      dt = rate * decay + step;
      if (p_.dt_softplus && w.raw[t] <= A(20)) dt /= 1 + std::exp(-static_cast<double>(w.raw[t]));
      if (decay != 0) sums.A[d] += w.step[t] * decay;  // after a restart nothing decays, whatever the step
      sums.dt_bias[d] += dt;
    }
    at = static_cast<A>(add ? at + dt : dt);
  }

  void gate_gradients(int64_t head, Totals<Wide>& sums) {
    const auto output = [&](int d, int64_t t) {
      return static_cast<Wide>(row_[d][t]) + own_[d][t] * decays_[d].step[t] + arrive_[d][t];
    };
    for (int64_t t = 0; t < chunk_.visits; ++t) {
      gate_gradient(head, t, chunk_.keep[t] ? (output(0, t) - output(1, t)) * inverse(t) : 0, sums);
    }
  }

  void gate_gradient(int64_t head, int64_t t, Wide grad, Totals<Wide>& sums) {
    if (p_.gate_per_token)
      static_cast<A*>(g_.gate)[(b_ * p_.length + chunk_.tokens[t]) * p_.heads + head] = static_cast<A>(grad);
    else
      sums.gate += grad;
  }

  A inverse(int64_t i) const { return p_.normalize ? inverse_[i] : A(1); }

  const SsdScanBwdParams& g_;
  const SsdScanParams& p_;
  Plan<A>& plan_;
  Notes& walked_;
  const ScanSizes& s_;
  int64_t b_ = 0, h0_ = 0, rows_ = 0, gathered_ = -1;
  Chunk chunk_;
  Decays<A> decays_[2];
  Careful<T> careful_;
  // Largest magnitudes, for `bound`: of states and adjoints per head, at hand and passed; of tiles.
  std::vector<double> running_bound_[2], passed_bound_[2];
  double b_most_[2] = {}, c_most_[2] = {}, x_most_ = 0, dy_most_ = 0;
  const int64_t q_, np_, pp_;            // padded sizes of a chunk, a state row, a head
  const int64_t own_dim_;                // a head's size without the channel of ones
  Buffer<A> inverse_, dot_, from_mass_;  // per visit: 1 / its mass, dy . y, and its mass times the gradient of that
  Buffer<A> means_, means_t_, dy_t_;
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
void scan_grad(SsdScanBwdParams g, Notes& walked) {
  using A = acc_t<T>;
  const SsdScanParams& p = g.scan;
  const int64_t head_dim = p.head_dim;
  g.scan.head_dim += p.normalize;
  Plan<A> plan;
  const ScanSizes& s = plan.sizes = scan_sizes<A>(p);
  plan.unit = heads_per_task(p, s);
  plan.totals.resize(p.batch * p.heads);
  plan_shared<T>(p, plan.unit, s.per_x, head_dim, g.x, plan.x);
  for (int d = 0; d < 2; ++d) {
    const SsdScanDirectionGrads& of = d ? g.reverse : g.forward;
    plan_shared<T>(p, plan.unit, s.per_b, p.state_dim, of.B, plan.B[d]);
    plan_shared<T>(p, plan.unit, s.per_c, p.state_dim, of.C, plan.C[d]);
  }
  const int64_t tasks = p.heads / plan.unit;
  const double work = static_cast<double>(plan.unit) * p.length * p.head_dim * p.state_dim;
  p.threads.run(p.batch * tasks, 1 + static_cast<int64_t>(16384 / (work + 1)), [&](int64_t begin, int64_t end) {
    ScanGrad<T> task(g, plan, walked);
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
  dispatch(g.scan.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    keep_apart<T>(g.scan, g, [](const SsdScanBwdParams& params, Notes& walked) { scan_grad<T>(params, walked); });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
