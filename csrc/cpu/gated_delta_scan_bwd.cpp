// The gradient of the gated delta rule. Per direction two walks: the first keeps, per chunk, the state that enters it,
// U, and v - k S0; the second goes back with the adjoint dS of the state that leaves a chunk. Per chunk and head, with
// the letters of gated_delta_scan.h and dy_i already weighted:
//     dU = P^T dy + leave k dS,    (I + A)^T G = dU,    dv_i = beta_i G_i,    dA_ij = -G_i . U_j,    dP_ij = dy_i . U_j
//     dq_i = carry_i S0 dy_i + sum_j a_ij dP_ij k_j
//     dk_i = leave_i dS U_i - beta_i carry_i S0 G_i + sum_j beta_i a_ij dA_ij k_j + the same of pairs in which i is j
//     d(log-decay of t) = sum of A_ij dA_ij + P_ij dP_ij over the pairs whose path crosses t
//     dS0 = total dS + (carry q)^T dy - (beta carry k)^T G
// The carried states add the same terms with a chunk's edge in place of i or j.
#include "gated_delta_careful.h"
#include "scan_apart.h"
#include "ssd_scan_sums.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// Where gradients that heads share are summed.
template <class A>
struct DeltaPlan {
  DeltaSizes sizes;
  Shared<A> q[2], k[2], v;
  std::vector<wide_t<A>> gate;  // (B, H), where the gate is (H,)
};

template <class T>
class DeltaGrad {
  using A = acc_t<T>;
  using Wide = wide_t<A>;
  static constexpr int W = Simd<A>::width;

 public:
  DeltaGrad(const GatedDeltaScanBwdParams& g, DeltaPlan<A>& plan, Notes& walked)
      : g_(g),
        p_(g.scan),
        plan_(plan),
        walked_(walked),
        s_(plan.sizes),
        q_(s_.chunk),
        key_(s_.key),
        value_(s_.value),
        chunk_(p_, s_),
        careful_(p_, s_) {
    const int64_t chunks = (p_.length + q_ - 1) / q_, kept = s_.bundle * chunks;
    states_ = Buffer<A>(kept * s_.state()), written_ = Buffer<A>(kept * q_ * value_);
    errors_ = Buffer<A>(kept * q_ * value_), ordinary_.resize(kept);
    running_ = Buffer<A>(s_.bundle * s_.state());
    dy_ = Buffer<A>(q_ * value_), grad_ = Buffer<A>(q_ * value_), scratch_ = Buffer<A>(q_ * std::max(key_, value_));
    transposed_ = Buffer<A>(std::max(s_.state(), q_ * value_));
    by_read_ = Buffer<A>(q_ * q_), by_system_ = Buffer<A>(q_ * q_);
    dq_ = Buffer<A>(q_ * key_), dk_ = Buffer<A>(q_ * key_), dv_ = Buffer<A>(q_ * value_);
    factor_ = Buffer<A>(q_), arrive_ = Buffer<A>(q_), depart_ = Buffer<A>(q_), dbeta_ = Buffer<A>(q_);
    dot_ = Buffer<A>(q_), flow_ = Buffer<Wide>(q_), dg_ = Buffer<Wide>(q_);
  }

  void run(int64_t b, int64_t first_head) {
    b_ = b, h0_ = first_head;
    chunk_.forget();
    const bool both = p_.forward.on && p_.reverse.on;
    if (p_.forward.on) differentiate(false, true);
    if (p_.reverse.on) differentiate(true, !both);
  }

 private:
  A* state(int64_t c, int64_t h) const { return states_ + (c * s_.bundle + h) * s_.state(); }
  A* rows_of(const Buffer<A>& kept, int64_t c, int64_t h) const { return kept + (c * s_.bundle + h) * q_ * value_; }
  A* running(int64_t h) const { return running_ + h * s_.state(); }

  // own: this direction has the initial and the final state.
  void differentiate(bool reverse, bool own) {
    reverse_ = reverse;
    visits_.move_to(p_, b_, reverse);
    const int64_t chunks = (visits_.count() + q_ - 1) / q_, size = p_.key_dim * p_.value_dim,
                  at = (b_ * p_.heads + h0_) * size;
    const auto load_all = [&](const void* from) {
      for (int64_t h = 0; h < s_.bundle; ++h)
        load_delta_state(own && from ? static_cast<const A*>(from) + at + h * size : nullptr, p_, s_, running(h));
    };
    load_all(p_.initial_state);
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t h = 0; h < s_.bundle; ++h) {
        chunk_.move_to(visits_, b_, c, h0_ + h, reverse);
        std::copy_n(running(h), s_.state(), state(c, h));
        ordinary_[c * s_.bundle + h] = advance(c, h);
        if (ordinary_[c * s_.bundle + h]) continue;
        if (s_.products) walked_.note(b_);
        careful_.walk(chunk_, running(h), nullptr);
      }
    load_all(g_.grad_final_state);
    if ((visits_.count() ? visits_.segments.back() : 0) != visits_.last)
      std::fill_n(running_.get(), s_.bundle * s_.state(), A(0));
    for (int64_t c = chunks - 1; c >= 0; --c)
      for (int64_t h = 0; h < s_.bundle; ++h) gradients(c, h);
    if (!own || !g_.initial_state) return;
    for (int64_t h = 0; h < s_.bundle; ++h)
      save_delta_state(running(h), p_, s_, static_cast<A*>(g_.initial_state) + at + h * size);
  }

  // The next state; keeps U and v - k S0. False, and nothing done, where products may not take the definition's place.
  bool advance(int64_t c, int64_t h) {
    A *now = running(h), *u = rows_of(written_, c, h), *error = rows_of(errors_, c, h);
    const int64_t n = chunk_.n, rows = chunk_.padded;
    const double before = largest(now, p_.key_dim * value_);
    if (!chunk_.safe || !stays_finite<A>(chunk_.bound(before, largest(chunk_.v + 0, rows * value_)))) return false;
    for (int64_t i = 0; i < rows; i += W) store(factor_ + i, -load(chunk_.carry + i));
    gemm<A>(rows, value_, p_.key_dim, chunk_.k, key_, 1, now, value_, error, value_, {A(1), factor_, chunk_.v});
    scale(error, rows, value_, chunk_.beta, u);
    chunk_.solve(u);
    if (!stays_finite<A>(chunk_.bound(before, largest(u, rows * value_)))) return false;
    scale(chunk_.k, n, key_, chunk_.leave, scratch_);
    gemm<A>(p_.key_dim, value_, n, scratch_, 1, key_, u, value_, now, value_, {chunk_.total});
    return true;
  }

  // to[i] = factor[i] from[i].
  static void scale(const A* from, int64_t rows, int64_t ld, const A* factor, A* to) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < ld; j += W) store(to + i * ld + j, load(from + i * ld + j) * factor[i]);
  }

  void gradients(int64_t c, int64_t h) {
    chunk_.move_to(visits_, b_, c, h0_ + h, reverse_);
    gather<T>(g_.grad_y, chunk_.rows, h0_ + h, p_.value_dim, chunk_.padded, dy_);
    std::fill_n(dq_.get(), chunk_.padded * key_, A(0)), std::fill_n(dk_.get(), chunk_.padded * key_, A(0));
    if (!ordinary_[c * s_.bundle + h] || !products(c, h)) by_definition(c, h);
    Shared<A>&q = plan_.q[shares(g_.reverse.q)], &k = plan_.k[shares(g_.reverse.k)];
    add(q, h, dq_, key_, chunk_.q, chunk_.q_norm, static_cast<A>(p_.scale));
    add(k, h, dk_, key_, chunk_.k, chunk_.k_norm, A(1));
    plan_.v.add(chunk_.rows, p_.length, plan_.v.slot(h0_ + h), false, dv_, value_);
    small_gradients(h0_ + h);
  }
  // Which direction's place a gradient of this direction has.
  int shares(const void* own) const { return reverse_ && (own || !p_.forward.on) ? 1 : 0; }

  // The gradient of rows as they were before they were normalised and scaled.
  void add(const Shared<A>& to, int64_t h, A* grad, int64_t ld, const A* rows, const A* norm, A factor) {
    for (int64_t i = 0; i < chunk_.n; ++i) {
      A* g = grad + i * ld;
      const A* row = rows + i * ld;
      vec<A> dot{};
      for (int64_t j = 0; p_.normalize && j < ld; j += W) dot = load(g + j) * load(row + j) + dot;
      const A along = factor != A(0) ? sum<A>(dot) / factor : A(0);
      for (int64_t j = 0; j < ld; j += W) {
        const vec<A> own = load(g + j) * factor;
        store(g + j, p_.normalize ? (own - load(row + j) * along) * norm[i] : own);
      }
    }
    to.add(chunk_.rows, p_.length, to.slot(h0_ + h), false, grad, ld);
  }

  void by_definition(int64_t c, int64_t h) {
    if (s_.products) walked_.note(b_);
    std::fill_n(dv_.get(), chunk_.padded * value_, A(0));
    careful_.gradients(chunk_, state(c, h), running(h), dy_, dq_, dk_, dv_);
    for (int64_t t = 0; t < chunk_.n; ++t)
      dg_[t] = careful_.decay[t], dbeta_[t] = careful_.beta[t], dot_[t] = careful_.dot[t];
  }

  bool products(int64_t c, int64_t h) {
    const int64_t n = chunk_.n, rows = chunk_.padded;
    A *adjoint = running(h), *u = rows_of(written_, c, h);
    const A *before = state(c, h), *error = rows_of(errors_, c, h);
    const double dy = largest(dy_ + 0, rows * value_), arrives = largest(adjoint, p_.key_dim * value_);
    if (!stays_finite<A>(chunk_.bound(arrives, dy))) return false;
    // dU, then G.
    scale(dy_, rows, value_, chunk_.weight, scratch_);
    for (int64_t j = 0; j < rows; j += W)
      gemm<A>(W, value_, n - j, chunk_.read + j * q_ + j, 1, q_, scratch_ + j * value_, value_, grad_ + j * value_,
              value_);
    gemm<A>(rows, value_, p_.key_dim, chunk_.k, key_, 1, adjoint, value_, grad_, value_, {A(1), chunk_.leave});
    chunk_.solve_transposed(grad_);
    if (!in_range(chunk_, before, largest(u, rows * value_), dy, arrives, largest(grad_ + 0, rows * value_)))
      return false;
    pairs(u);
    scale(grad_, rows, value_, chunk_.beta, dv_);
    for (int64_t i = 0; i < n; ++i) {
      vec<A> dot{};
      for (int64_t v = 0; v < value_; v += W) dot = load(grad_ + i * value_ + v) * load(error + i * value_ + v) + dot;
      dbeta_[i] += sum<A>(dot);
    }
    through_states(before, adjoint, u);
    for (int64_t i = 0; i < rows; i += W) {
      const int64_t seen = std::min(i + W, n);
      gemm<A>(W, key_, seen, by_read_ + i * q_, q_, 1, chunk_.k, key_, dq_ + i * key_, key_, {A(1)});
      gemm<A>(W, key_, seen, by_system_ + i * q_, q_, 1, chunk_.k, key_, dk_ + i * key_, key_, {A(1)});
      gemm<A>(W, key_, n - i, by_system_ + i * q_ + i, 1, q_, chunk_.k + i * key_, key_, dk_ + i * key_, key_, {A(1)});
      gemm<A>(W, key_, n - i, by_read_ + i * q_ + i, 1, q_, chunk_.q + i * key_, key_, dk_ + i * key_, key_, {A(1)});
    }
    decay_gradients();
    return true;
  }

  // Whether no sum overflows, and no pair is so large that it would take the precision of those it does not concern.
  bool in_range(const DeltaChunk<T>& c, const A* before, double u, double dy, double arrives, double grad) const {
    constexpr double kRange = 1.0e33;  // of bounds, which are far above the numbers
    const double values = static_cast<double>(p_.value_dim), held = largest(before, p_.key_dim * value_);
    const double most = c.bound(1 + held + arrives, 1 + u + dy + grad);
    return (u + held + 1) * (dy + grad + arrives + 1) * values * most < kRange && stays_finite<A>(most * most);
  }

  // Of every pair the terms of the matrices' gradients; sums of A dA + P dP as flow_, and dbeta_, dot_ begin.
  void pairs(const A* u) {
    const int64_t rows = chunk_.padded;
    transpose<A>(u, value_, rows, value_, transposed_, q_);
    for (int64_t i = 0; i < rows; i += W) {
      gemm<A>(W, i + W, p_.value_dim, dy_ + i * value_, value_, 1, transposed_, q_, by_read_ + i * q_, q_);
      gemm<A>(W, i + W, p_.value_dim, grad_ + i * value_, value_, 1, transposed_, q_, by_system_ + i * q_, q_);
    }
    std::fill_n(flow_.get(), q_, Wide(0));
    for (int64_t i = 0; i < rows; ++i) {
      vec<A> beta{}, dot{};
      alignas(64) Wide leaving[W] = {};
      for (int64_t j = 0; j <= i; j += W) {
        const int64_t at = i * q_ + j;
        const vec<A> a = load(chunk_.pair + at), read = load(chunk_.read + at), system = load(chunk_.system + at),
                     dread = load(by_read_ + at), dsystem = load(by_system_ + at);
        dot = read * dread + dot;
        const vec<A> before = before_only(i, j, a), mine = before * dsystem;
        beta -= mine * load(chunk_.kk + at);
        vec<A> pair = read * (dread * chunk_.weight[i]) + system * dsystem;
        pair = before_only(i, j, pair);
        add_wide(leaving, pair, 1), add_wide(flow_ + j, pair, -1);
        store(by_read_ + at, a * dread * chunk_.weight[i]);
        store(by_system_ + at, mine * -chunk_.beta[i]);
      }
      for (Wide x : leaving) flow_[i] += x;
      dbeta_[i] = sum<A>(beta), dot_[i] = sum<A>(dot);
    }
  }

  // Lanes j of row i, 0 but where j < i.
  static vec<A> before_only(int64_t i, int64_t j, vec<A> values) {
    if (j + W <= i) return values;
    vec<A> index{};
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) index[w] = A(w);
    return index < splat(static_cast<A>(i - j)) ? values : vec<A>{};
  }

  // What the state that enters the chunk and the adjoint of the one that leaves it contribute; moves the adjoint.
  void through_states(const A* before, A* adjoint, const A* u) {
    const int64_t n = chunk_.n, rows = chunk_.padded;
    vec<A> dot{};
    for (int64_t i = 0; i < p_.key_dim * value_; i += W) dot = load(before + i) * load(adjoint + i) + dot;
    through_ = static_cast<Wide>(chunk_.total) * sum<A>(dot);
    transpose<A>(adjoint, value_, key_, value_, transposed_, key_);
    gemm<A>(rows, key_, p_.value_dim, u, value_, 1, transposed_, key_, scratch_, key_, {A(0), chunk_.leave});
    for (int64_t i = 0; i < n; ++i) depart_[i] = absorb(scratch_ + i * key_, chunk_.k + i * key_, A(1), dk_ + i * key_);
    transpose<A>(before, value_, key_, value_, transposed_, key_);
    gemm<A>(rows, key_, p_.value_dim, dy_, value_, 1, transposed_, key_, scratch_, key_, {A(0), chunk_.carry});
    for (int64_t i = 0; i < n; ++i) {
      const A read = absorb(scratch_ + i * key_, chunk_.q + i * key_, chunk_.weight[i], dq_ + i * key_);
      dot_[i] += read, arrive_[i] = chunk_.weight[i] * read;
    }
    for (int64_t i = 0; i < rows; i += W) store(factor_ + i, load(chunk_.carry + i) * -load(chunk_.beta + i));
    gemm<A>(rows, key_, p_.value_dim, grad_, value_, 1, transposed_, key_, scratch_, key_, {A(0), factor_});
    for (int64_t i = 0; i < n; ++i)
      arrive_[i] += absorb(scratch_ + i * key_, chunk_.k + i * key_, A(1), dk_ + i * key_);
    scale(chunk_.k, n, key_, factor_, scratch_);
    gemm<A>(p_.key_dim, value_, n, scratch_, 1, key_, grad_, value_, adjoint, value_, {chunk_.total});
    for (int64_t i = 0; i < rows; i += W) store(factor_ + i, load(chunk_.carry + i) * load(chunk_.weight + i));
    scale(chunk_.q, n, key_, factor_, scratch_);
    gemm<A>(p_.key_dim, value_, n, scratch_, 1, key_, dy_, value_, adjoint, value_, {A(1)});
  }

  // grad += scale * row; returns row . other.
  A absorb(const A* row, const A* other, A scale, A* grad) const {
    vec<A> dot{};
    for (int64_t k = 0; k < key_; k += W) {
      const vec<A> r = load(row + k);
      dot = r * load(other + k) + dot;
      store(grad + k, r * scale + load(grad + k));
    }
    return sum<A>(dot);
  }

  void decay_gradients() {
    const int64_t n = chunk_.n;
    Wide behind = through_, ahead = 0;
    for (int64_t t = 0; t < n; ++t) dg_[t] = behind, behind += depart_[t];
    for (int64_t t = n - 1; t >= 0; --t) {
      ahead += flow_[t] + arrive_[t];
      dg_[t] = chunk_.restart[t] ? Wide(0) : dg_[t] + ahead;
      // Nothing crosses a restart: what is left are roundings of pairs that lie behind it.
      if (chunk_.restart[t]) ahead = 0;
    }
  }

  void small_gradients(int64_t head) {
    const auto place = [&](void* own, void* forward) { return static_cast<A*>(reverse_ && own ? own : forward); };
    A *g = place(g_.reverse.g, g_.forward.g), *beta = place(g_.reverse.beta, g_.forward.beta);
    const uint8_t* mask = p_.reverse.mask;
    for (int64_t t = 0; t < chunk_.n; ++t) {
      const int64_t token = b_ * p_.length + chunk_.rows.tokens[t], at = token * p_.heads + head;
      g[at] = static_cast<A>(g[at] + dg_[t]), beta[at] += dbeta_[t];
      if (!g_.gate || (mask && !mask[token])) continue;
      const A change = reverse_ ? -dot_[t] : dot_[t];
      if (p_.gate_per_token)
        static_cast<A*>(g_.gate)[at] += change;
      else
        plan_.gate[b_ * p_.heads + head] += change;
    }
  }

  const GatedDeltaScanBwdParams& g_;
  const GatedDeltaScanParams& p_;
  DeltaPlan<A>& plan_;
  Notes& walked_;
  const DeltaSizes& s_;
  const int64_t q_, key_, value_;
  int64_t b_ = 0, h0_ = 0;
  bool reverse_ = false;
  DeltaVisits visits_;
  DeltaChunk<T> chunk_;
  CarefulDelta<T> careful_;
  // Per chunk and head of the bundle: the state that enters, U, v - k S0, and whether these are of products.
  Buffer<A> states_, written_, errors_;
  std::vector<uint8_t> ordinary_;
  Buffer<A> running_;
  Buffer<A> dy_, grad_, scratch_, transposed_, by_read_, by_system_, dq_, dk_, dv_;
  Buffer<A> factor_, arrive_, depart_, dbeta_, dot_;
  // What pairs that end at a visit carry across decays, less what pairs that start there do: summed over visits, a pair
  // that does not cross t cancels.
  Buffer<Wide> flow_, dg_;
  Wide through_ = 0;  // the state that crosses the whole chunk
};

template <class T>
void delta_grad(const GatedDeltaScanBwdParams& g, Notes& walked) {
  using A = acc_t<T>;
  const GatedDeltaScanParams& p = g.scan;
  DeltaPlan<A> plan;
  const DeltaSizes& s = plan.sizes = delta_sizes<A>(p, 64);
  plan.gate.resize(p.batch * p.heads);
  SsdScanParams like{};
  like.batch = p.batch, like.length = p.length, like.heads = p.heads, like.threads = p.threads;
  const auto share = [&](int64_t per, int64_t dim, void* out, Shared<A>& to) {
    plan_shared<T>(like, s.bundle, per, dim, out, to);
    if (to.own) std::fill_n(to.data, p.batch * p.length * to.slots * dim, A(0));
  };
  for (int d = 0; d < 2; ++d) {
    const GatedDeltaDirectionGrads& of = d ? g.reverse : g.forward;
    share(s.per_q, p.key_dim, of.q, plan.q[d]), share(s.per_k, p.key_dim, of.k, plan.k[d]);
  }
  share(s.per_v, p.value_dim, g.v, plan.v);
  const int64_t bundles = p.heads / s.bundle;
  const double work = static_cast<double>(s.bundle) * p.length * p.key_dim * p.value_dim;
  p.threads.run(p.batch * bundles, 1 + static_cast<int64_t>(16384 / (work + 1)), [&](int64_t begin, int64_t end) {
    DeltaGrad<T> task(g, plan, walked);
    for (int64_t i = begin; i < end; ++i) task.run(i / bundles, i % bundles * s.bundle);
  });
  for (int d = 0; d < 2; ++d) {
    const GatedDeltaDirectionGrads& of = d ? g.reverse : g.forward;
    reduce<T>(like, plan.q[d], s.per_q, of.q), reduce<T>(like, plan.k[d], s.per_k, of.k);
  }
  reduce<T>(like, plan.v, s.per_v, g.v);
  if (!g.gate || p.gate_per_token) return;
  for (int64_t h = 0; h < p.heads; ++h) {
    wide_t<A> sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) sum += plan.gate[b * p.heads + h];
    static_cast<A*>(g.gate)[h] = static_cast<A>(sum);
  }
}

}  // namespace

void gated_delta_scan_bwd_cpu(const GatedDeltaScanBwdParams& g) {
  dispatch(g.scan.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    keep_apart<T>(g.scan, g,
                  [](const GatedDeltaScanBwdParams& params, Notes& walked) { delta_grad<T>(params, walked); });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
