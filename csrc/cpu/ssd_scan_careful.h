// The scan of one chunk and head by its definition, visit by visit. Products over whole chunks multiply what a visit
// may not see by 0, which hides only what is finite: where they could meet anything else, the walks come here.
#pragma once
#include "finite.h"
#include "ssd_scan.h"

namespace linmu {
namespace LINMU_ISA {

// Of the chunk's rows of one group.
template <class T>
inline double largest(const SsdScanTensor& t, const Chunk& c, int64_t group, int64_t dim) {
  using A = acc_t<T>;
  constexpr int64_t W = Simd<A>::width;
  const T* data = static_cast<const T*>(t.data) + c.batch * t.batch_stride + group * t.group_stride;
  Largest<A> most;
  for (int64_t i = 0; i < c.visits; ++i) {
    const T* row = data + c.tokens[i] * t.token_stride;
    int64_t n = 0;
    for (; n + W <= dim; n += W) most.see(load(row + n));
    if (n < dim) most.see(load_n(row + n, static_cast<int>(dim - n)));
  }
  return most.value();
}

template <class T>
class Careful {
  using A = acc_t<T>;
  static constexpr int W = Simd<A>::width;

 public:
  // Adds weight_i C_i h_i to the rows of y if there is one, (visits, ld); moves the state, (N, P) in rows of ld. The
  // mass is what a channel of ones would be: it moves `mass`, (N,), and adds to `masses`, (visits,). x: the rows of x,
  // in rows of ld, where they are not those of p.x.
  void walk(const SsdScanParams& p, const ScanSizes& s, const Chunk& c, const Decays<A>& w, int64_t head, bool reverse,
            A* state, A* y, A* mass = nullptr, A* masses = nullptr, const A* x = nullptr) {
    begin(p, s, c, w, head, reverse, x);
    for (int64_t k = 0; k < c.visits; ++k) {
      const int64_t i = visit(k);
      const bool moved = move(i, state);
      if (mass) move_mass(k, mass);
      if (!moved || !y) continue;
      const A* row = c_.data() + i * np_;
      if (mass) {
        A sum = 0;
        for (int64_t n = 0; n < p.state_dim; ++n) sum += row[n] * mass[n];
        masses[i] += w.weight[i] * sum;
      }
      for (int64_t n = 0; n < p.state_dim; ++n)
        for (int64_t m = 0; m < p.head_dim; ++m) out_[m] = (n ? out_[m] : A(0)) + row[n] * state[n * pp_ + m];
      for (int64_t m = 0; m < p.head_dim; ++m) y[i * pp_ + m] += w.weight[i] * out_[m];
    }
  }

  // Per visit: gradients of the log-decay and of the step, and dy . y.
  std::vector<A> decay, step, dot;

  // As walk, then back: moves the adjoint, (N, P) in rows of ld, from the chunk's exit to its entry, and adds to the
  // gradients' rows.
  void gradients(const SsdScanParams& p, const ScanSizes& s, const Chunk& c, const Decays<A>& w, int64_t head,
                 bool reverse, A* state, A* adjoint, const A* x_rows, const A* dy, A* dx, A* db, A* dc) {
    begin(p, s, c, w, head, reverse, x_rows);
    const int64_t N = p.state_dim, P = p.head_dim, size = N * pp_;
    states_.assign((c.visits + 1) * size, A(0));
    std::copy(state, state + size, states_.begin());
    for (int64_t k = 0; k < c.visits; ++k) {
      move(visit(k), state);
      std::copy(state, state + size, states_.begin() + (k + 1) * size);
    }
    for (auto* list : {&decay, &step, &dot}) list->assign(c.visits, A(0));
    for (int64_t k = c.visits - 1; k >= 0; --k) {
      const int64_t i = visit(k);
      if (on(i)) {
        const A *before = states_.data() + k * size, *after = before + size;
        const A *x = x_.data() + i * pp_, *b = b_.data() + i * np_, *cs = c_.data() + i * np_, *g = dy + i * pp_;
        const A weight = w.weight[i], factor = std::exp(w.step[i] * rate_);
        A through = 0;
        for (int64_t n = 0; n < N; ++n) {
          A* a = adjoint + n * pp_;
          A read = 0, wrote = 0;
          for (int64_t m = 0; m < P; ++m) {
            read += g[m] * after[n * pp_ + m];
            a[m] += weight * g[m] * cs[n];
            wrote += x[m] * a[m];
            dx[i * pp_ + m] += w.step[i] * b[n] * a[m];
            if (!restarts(k)) through += a[m] * before[n * pp_ + m];
            a[m] *= factor;
          }
          dc[i * np_ + n] += weight * read, dot[i] += cs[n] * read;
          db[i * np_ + n] += w.step[i] * wrote, step[i] += b[n] * wrote;
        }
        decay[i] = restarts(k) ? A(0) : factor * through;
      }
      if (restarts(k)) std::fill(adjoint, adjoint + size, A(0));
    }
  }

 private:
  void begin(const SsdScanParams& p, const ScanSizes& s, const Chunk& c, const Decays<A>& w, int64_t head, bool reverse,
             const A* x) {
    const SsdScanDirection& d = reverse ? p.reverse : p.forward;
    chunk_ = &c, decays_ = &w, reverse_ = reverse, state_dim_ = p.state_dim, head_dim_ = p.head_dim;
    pp_ = round_up(p.head_dim, W), np_ = round_up(p.state_dim, W);
    rate_ = static_cast<const A*>(d.A)[head];
    x_.resize(c.visits * pp_), b_.resize(c.visits * np_), c_.resize(c.visits * np_), out_.resize(pp_);
    if (x)
      std::copy(x, x + c.visits * pp_, x_.data());
    else
      gather<T>(p.x, c, head / s.per_x, p.head_dim, c.visits, x_.data());
    gather<T>(d.B, c, head / s.per_b, p.state_dim, c.visits, b_.data());
    gather<T>(d.C, c, head / s.per_c, p.state_dim, c.visits, c_.data());
  }

  int64_t visit(int64_t k) const { return reverse_ ? chunk_->visits - 1 - k : k; }
  bool on(int64_t i) const { return !reverse_ || chunk_->keep[i]; }
  bool restarts(int64_t k) const {
    const std::vector<int32_t>& segment = chunk_->segment[reverse_];
    return segment[visit(k)] != (k ? segment[visit(k - 1)] : 0);
  }

  // One visit; false if it takes no part.
  bool move(int64_t i, A* state) const {
    if (restarts(reverse_ ? chunk_->visits - 1 - i : i)) std::fill(state, state + state_dim_ * pp_, A(0));
    if (!on(i)) return false;
    const A step = decays_->step[i], factor = std::exp(step * rate_);
    const A *x = x_.data() + i * pp_, *b = b_.data() + i * np_;
    for (int64_t n = 0; n < state_dim_; ++n)
      for (int64_t m = 0; m < head_dim_; ++m) state[n * pp_ + m] = factor * state[n * pp_ + m] + step * x[m] * b[n];
    return true;
  }

  // The k-th visit's, after `move`.
  void move_mass(int64_t k, A* mass) const {
    const int64_t i = visit(k);
    if (restarts(k)) std::fill(mass, mass + state_dim_, A(0));
    if (!on(i)) return;
    const A step = decays_->step[i], factor = std::exp(step * rate_), *b = b_.data() + i * np_;
    for (int64_t n = 0; n < state_dim_; ++n) mass[n] = factor * mass[n] + step * b[n];
  }

  const Chunk* chunk_ = nullptr;
  const Decays<A>* decays_ = nullptr;
  bool reverse_ = false;
  int64_t state_dim_ = 0, head_dim_ = 0, pp_ = 0, np_ = 0;
  A rate_ = 0;
  std::vector<A> x_, b_, c_, out_, states_;
};

}  // namespace LINMU_ISA
}  // namespace linmu
