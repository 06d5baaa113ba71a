// The gated delta rule. One task per (batch row, bundle of heads), which walks its chunks in visiting order, in either
// direction or in one after the other, and keeps the running states in cache. Per chunk and head (gated_delta_scan.h
// has the equations): R, U, the output, the next state.
#include "gated_delta_careful.h"
#include "scan_apart.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

template <class T>
class DeltaScan {
  using A = acc_t<T>;
  static constexpr int W = Simd<A>::width;

 public:
  DeltaScan(const GatedDeltaScanParams& p, const DeltaSizes& s, Notes& walked)
      : p_(p),
        s_(s),
        walked_(walked),
        both_(p.forward.on && p.reverse.on),
        chunk_(p, s),
        careful_(p, s),
        u_(s.chunk * s.value),
        y_(s.chunk * s.value),
        scaled_(s.chunk * s.key),
        factor_(s.chunk),
        state_(s.bundle * s.state()) {
    // The sum of two directions is rounded once.
    if (both_ && !std::is_same_v<T, A>) sum_ = Buffer<A>(s.bundle * p.length * p.value_dim);
  }

  void run(int64_t b, int64_t first_head) {
    b_ = b, h0_ = first_head;
    chunk_.forget();
    if (p_.forward.on) scan(false, true);
    if (p_.reverse.on) scan(true, !both_);
    if (sum_)
      for (int64_t h = 0; h < s_.bundle; ++h)
        for (int64_t t = 0; t < p_.length; ++t) copy(sum_ + (h * p_.length + t) * p_.value_dim, output(t, h0_ + h));
  }

 private:
  T* output(int64_t token, int64_t head) const {
    return static_cast<T*>(p_.y) + ((b_ * p_.length + token) * p_.heads + head) * p_.value_dim;
  }

  void copy(const A* from, T* to) const {
    for_each_vector<A>(p_.value_dim, [&](int64_t i, auto lanes) { lanes.store(to + i, lanes.load(from + i)); });
  }

  // own: this direction has the initial and the final state, and is the first to write.
  void scan(bool reverse, bool own) {
    visits_.move_to(p_, b_, reverse);
    const int64_t at = (b_ * p_.heads + h0_) * p_.key_dim * p_.value_dim, size = p_.key_dim * p_.value_dim;
    const A* from = own ? static_cast<const A*>(p_.initial_state) : nullptr;
    for (int64_t h = 0; h < s_.bundle; ++h)
      load_delta_state(from ? from + at + h * size : nullptr, p_, s_, state_ + h * s_.state());
    if (own && visits_.count() < p_.length)
      for (int64_t t = 0; t < p_.length; ++t) std::fill_n(output(t, h0_), s_.bundle * p_.value_dim, T{});
    const int64_t chunks = (visits_.count() + s_.chunk - 1) / s_.chunk;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t h = 0; h < s_.bundle; ++h) {
        chunk_.move_to(visits_, b_, c, h0_ + h, reverse);
        if (!products(state_ + h * s_.state())) {
          if (s_.products) walked_.note(b_);
          careful_.walk(chunk_, state_ + h * s_.state(), y_);
        }
        write(h, !own);
      }
    if (!own || !p_.final_state) return;
    const int32_t left = visits_.count() ? visits_.segments.back() : 0;
    for (int64_t h = 0; h < s_.bundle; ++h) {
      if (left != visits_.last) std::fill_n(state_ + h * s_.state(), s_.state(), A(0));
      save_delta_state(state_ + h * s_.state(), p_, s_, static_cast<A*>(p_.final_state) + at + h * size);
    }
  }

  // The chunk's output, and the next state; false, and nothing done, where products may not take the definition's
  // place.
  bool products(A* state) {
    const DeltaChunk<T>& c = chunk_;
    const int64_t n = c.n, rows = c.padded, key = s_.key, value = s_.value;
    const double before = largest(state, p_.key_dim * value);
    if (!c.safe || !stays_finite<A>(c.bound(before, largest(c.v + 0, rows * value)))) return false;
    for (int64_t i = 0; i < rows; i += W) store(factor_ + i, -load(c.carry + i));
    gemm<A>(rows, value, p_.key_dim, c.k, key, 1, state, value, u_, value, {A(1), factor_, c.v});
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = 0; v < value; v += W) store(u_ + i * value + v, load(u_ + i * value + v) * c.beta[i]);
    c.solve(u_);
    if (!stays_finite<A>(c.bound(before, largest(u_ + 0, rows * value)))) return false;
    for (int64_t i = 0; i < rows; i += W)
      gemm<A>(W, value, std::min(i + W, n), c.read + i * s_.chunk, s_.chunk, 1, u_, value, y_ + i * value, value);
    gemm<A>(rows, value, p_.key_dim, c.q, key, 1, state, value, y_, value, {A(1), c.carry});
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < key; k += W) store(scaled_ + i * key + k, load(c.k + i * key + k) * c.leave[i]);
    gemm<A>(p_.key_dim, value, n, scaled_, 1, key, u_, value, state, value, {c.total});
    return true;
  }

  void write(int64_t h, bool add) {
    for (int64_t i = 0; i < chunk_.n; ++i) {
      const int64_t token = chunk_.rows.tokens[i];
      const A *row = y_ + i * s_.value, weight = chunk_.weight[i];
      const auto put = [&](auto* to) {
        for_each_vector<A>(p_.value_dim, [&](int64_t v, auto lanes) {
          const vec<A> y = lanes.load(row + v) * weight;
          lanes.store(to + v, add ? lanes.load(to + v) + y : y);
        });
      };
      if (sum_)
        put(sum_ + (h * p_.length + token) * p_.value_dim);
      else
        put(output(token, h0_ + h));
    }
  }

  const GatedDeltaScanParams& p_;
  const DeltaSizes& s_;
  Notes& walked_;
  int64_t b_ = 0, h0_ = 0;
  const bool both_;
  DeltaVisits visits_;
  DeltaChunk<T> chunk_;
  CarefulDelta<T> careful_;
  Buffer<A> u_, y_, scaled_, factor_;
  Buffer<A> state_;  // per head of the bundle
  Buffer<A> sum_;    // per head of the bundle and token
};

template <class T>
void delta_scan(const GatedDeltaScanParams& p, Notes& walked) {
  const DeltaSizes s = delta_sizes<acc_t<T>>(p, 32);
  const int64_t bundles = p.heads / s.bundle;
  const double work = static_cast<double>(s.bundle) * p.length * p.key_dim * p.value_dim;
  p.threads.run(p.batch * bundles, 1 + static_cast<int64_t>(65536 / (work + 1)), [&](int64_t begin, int64_t end) {
    DeltaScan<T> task(p, s, walked);
    for (int64_t i = begin; i < end; ++i) task.run(i / bundles, i % bundles * s.bundle);
  });
}

}  // namespace

void gated_delta_scan_cpu(const GatedDeltaScanParams& p) {
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    keep_apart<T>(p, p, [](const GatedDeltaScanParams& params, Notes& walked) { delta_scan<T>(params, walked); });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
