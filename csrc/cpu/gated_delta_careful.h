// The gated delta rule of one chunk and head by its definition, visit by visit. Products over whole chunks multiply
// what a visit may not see by 0, which hides only what is finite: where they could meet anything else, the walks come
// here. So they do where keys are so short that the visits of a chunk overwrite the state several times over.
#pragma once
#include "gated_delta_scan.h"

namespace linmu {
namespace LINMU_ISA {

template <class T>
class CarefulDelta {
  using A = acc_t<T>;

 public:
  CarefulDelta(const GatedDeltaScanParams& p, const DeltaSizes& s)
      : K_(p.key_dim), V_(p.value_dim), key_(s.key), value_(s.value) {}

  // Moves the state, rows of `value`; fills the rows of y if there is one.
  void walk(const DeltaChunk<T>& c, A* state, A* y) {
    for (int64_t i = 0; i < c.n; ++i) {
      move(c, i, state);
      for (int64_t v = 0; y && v < V_; ++v) y[i * value_ + v] = 0;
      for (int64_t k = 0; y && k < K_; ++k)
        for (int64_t v = 0; v < V_; ++v) y[i * value_ + v] += c.q[i * key_ + k] * state[k * value_ + v];
    }
  }

  // Per visit: gradients of g and of beta, and dy . y.
  std::vector<A> decay, beta, dot;

  // As walk, from `state`, then back: moves the adjoint from the chunk's exit to its entry, and adds to the gradients'
  // rows. dy has no weights yet.
  void gradients(const DeltaChunk<T>& c, const A* state, A* adjoint, const A* dy, A* dq, A* dk, A* dv) {
    const int64_t size = K_ * value_;
    std::vector<A> states((c.n + 1) * size), error((c.n + 1) * V_), at_key(V_), before(size);
    std::copy(state, state + size, states.begin());
    for (int64_t i = 0; i < c.n; ++i) {
      A* next = states.data() + (i + 1) * size;
      std::copy(next - size, next, next);
      move(c, i, next);
      std::copy(error_.begin(), error_.end(), error.begin() + i * V_);
    }
    for (auto* list : {&decay, &beta, &dot}) list->assign(c.n, A(0));
    for (int64_t i = c.n - 1; i >= 0; --i) {
      const A *after = states.data() + (i + 1) * size, *entered = after - size, *g = dy + i * value_;
      const A *q = c.q + i * key_, *k = c.k + i * key_, *e = error.data() + i * V_;
      A through = 0;
      std::fill(at_key.begin(), at_key.end(), A(0));
      for (int64_t n = 0; n < K_; ++n) {
        A seen = 0, wrote = 0;
        A* a = adjoint + n * value_;
        for (int64_t v = 0; v < V_; ++v) {
          seen += after[n * value_ + v] * g[v];
          a[v] += c.weight[i] * q[n] * g[v];
          at_key[v] += k[n] * a[v];
          wrote += a[v] * c.beta[i] * e[v];
        }
        dq[i * key_ + n] += c.weight[i] * seen, dot[i] += q[n] * seen, dk[i * key_ + n] += wrote;
      }
      for (int64_t v = 0; v < V_; ++v) {
        beta[i] += at_key[v] * e[v];
        at_key[v] *= c.beta[i], dv[i * value_ + v] += at_key[v];
      }
      for (int64_t n = 0; n < K_; ++n) {
        A* a = adjoint + n * value_;
        A forgot = 0;
        for (int64_t v = 0; v < V_; ++v) {
          a[v] -= k[n] * at_key[v];
          if (c.restart[i]) {
            a[v] = 0;
            continue;
          }
          const A held = c.decay[i] * entered[n * value_ + v];
          forgot += held * at_key[v], through += held * a[v], a[v] *= c.decay[i];
        }
        dk[i * key_ + n] -= forgot;
      }
      decay[i] = through;
    }
  }

 private:
  // One visit; leaves v - k S' in error_.
  void move(const DeltaChunk<T>& c, int64_t i, A* state) {
    const A *k = c.k + i * key_, *v = c.v + i * value_;
    error_.assign(v, v + V_);
    for (int64_t n = 0; n < K_; ++n)
      for (int64_t m = 0; m < V_; ++m) {
        A& s = state[n * value_ + m];
        s = c.restart[i] ? A(0) : s * c.decay[i];
        error_[m] -= k[n] * s;
      }
    for (int64_t n = 0; n < K_; ++n)
      for (int64_t m = 0; m < V_; ++m) state[n * value_ + m] += k[n] * (c.beta[i] * error_[m]);
  }

  const int64_t K_, V_, key_, value_;
  std::vector<A> error_;
};

}  // namespace LINMU_ISA
}  // namespace linmu
