// The scan. One task per (batch row, bundle of heads); it walks its chunks in visiting order and keeps the running
// state in cache, as (N, P). With both directions a first walk, right to left, leaves the reverse state that enters
// each chunk; the second computes, per chunk and head,
//     Y = M X + [weight carry]_f (C h) + [weight carry]_b (C r) + D X,      M = sum_d weight_d exp(S_i - S_j) dt_j
//     C_i.B_j
#include "ssd_scan.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

template <class T>
class Scan {
  using A = acc_t<T>;
  static constexpr int W = Simd<A>::width;

 public:
  Scan(const SsdScanParams& p, const ScanSizes& s, int64_t b, int64_t first_head)
      : p_(p),
        s_(s),
        b_(b),
        h0_(first_head),
        both_(p.forward.on && p.reverse.on),
        chunk_(s.chunk),
        decays_{Decays<A>(s.chunk), Decays<A>(s.chunk)},
        x_(s.chunk * s.head_dim),
        c_(s.chunk * s.state_dim),
        bt_(s.state_dim * s.chunk),
        scratch_(s.state_dim * s.chunk),
        cb_(s.chunk * s.chunk),
        m_(s.chunk * s.chunk),
        y_(s.chunk * s.head_dim),
        state_(s.bundle * s.state) {
    if (both_) arriving_ = Buffer<A>(s.bundle * s.chunks * s.state);
    if (both_ && !p.shared_projections)
      cb_reverse_ = Buffer<A>(s.chunk * s.chunk), c_reverse_ = Buffer<A>(s.chunk * s.state_dim);
  }

  void run() {
    const bool backwards = !p_.forward.on;
    if (both_) {
      std::fill(state_.get(), state_ + s_.bundle * s_.state, A(0));
      for (int64_t c = s_.chunks - 1; c >= 0; --c) {
        std::copy(state_.get(), state_ + s_.bundle * s_.state, arriving_ + c * s_.bundle * s_.state);
        if (c > 0) visit(c, true, false);
      }
    }
    for (int64_t h = 0; h < s_.bundle; ++h) {
      const int64_t at = (b_ * p_.heads + h0_ + h) * p_.head_dim * p_.state_dim;
      load_state(p_.initial_state ? static_cast<const A*>(p_.initial_state) + at : nullptr, p_.head_dim, p_.state_dim,
                 true, s_.head_dim, s_.state, state_ + h * s_.state);
    }
    for (int64_t c = 0; c < s_.chunks; ++c) visit(backwards ? s_.chunks - 1 - c : c, backwards, true);
    if (!p_.final_state) return;
    for (int64_t h = 0; h < s_.bundle; ++h) {
      const int64_t at = (b_ * p_.heads + h0_ + h) * p_.head_dim * p_.state_dim;
      save_state(state_ + h * s_.state, p_.head_dim, p_.state_dim, true, s_.head_dim,
                 static_cast<A*>(p_.final_state) + at);
    }
  }

 private:
  const SsdScanDirection& direction(bool reverse) const { return reverse ? p_.reverse : p_.forward; }

  // One chunk: its output if wanted, then its contribution to the running state of direction `reverse`.
  void visit(int64_t index, bool reverse, bool with_output) {
    chunk_.move_to(p_, s_, b_, index);
    rows_ = round_up(chunk_.visits, W);
    if (with_output) {
      if (both_ && !p_.shared_projections) multiply_projections(true, c_reverse_, cb_reverse_);
      multiply_projections(reverse, c_, cb_);
    } else {
      gather_b(reverse);
    }
    int64_t gathered = -1;
    for (int64_t h = 0; h < s_.bundle; ++h) {
      const int64_t group = (h0_ + h) / s_.per_x;
      if (group != gathered) gather<T>(p_.x, chunk_, group, p_.head_dim, s_.chunk, x_);
      gathered = group;
      decays_[reverse].move_to(p_, chunk_, h0_ + h, reverse);
      if (with_output && both_) decays_[1].move_to(p_, chunk_, h0_ + h, true);
      A* state = state_ + h * s_.state;
      if (with_output) output(h, reverse, state, arriving_ + (index * s_.bundle + h) * s_.state);
      const Decays<A>& d = decays_[reverse];
      for (int64_t i = 0; i < rows_; i += W) store(y_ + i, load(d.leave + i) * load(d.step + i));
      for (int64_t n = 0; n < p_.state_dim; ++n)
        for (int64_t i = 0; i < rows_; i += W)
          store(scratch_ + n * s_.chunk + i, load(bt_ + n * s_.chunk + i) * load(y_ + i));
      gemm<A>(p_.state_dim, s_.head_dim, chunk_.visits, scratch_, s_.chunk, 1, x_, s_.head_dim, state, s_.head_dim,
              {d.total, nullptr});
    }
  }

  void gather_b(bool reverse) {
    gather<T>(direction(reverse).B, chunk_, h0_ / s_.per_b, p_.state_dim, s_.chunk, scratch_);
    transpose<A>(scratch_, s_.state_dim, s_.chunk, s_.state_dim, bt_, s_.chunk);
  }

  // C B^T where the direction needs it: on and below the diagonal, on and above it, or everywhere.
  void multiply_projections(bool reverse, A* c, A* cb) {
    gather_b(reverse);
    gather<T>(direction(reverse).C, chunk_, h0_ / s_.per_c, p_.state_dim, s_.chunk, c);
    const bool all = both_ && p_.shared_projections;
    for (int64_t i = 0; i < rows_; i += W) {
      const int64_t from = all || !reverse ? 0 : i, to = all || reverse ? rows_ : i + W;
      gemm<A>(W, to - from, p_.state_dim, c + i * s_.state_dim, s_.state_dim, 1, bt_ + from, s_.chunk,
              cb + i * s_.chunk + from, s_.chunk);
    }
  }

  void output(int64_t h, bool reverse, const A* state, const A* arriving) {
    const Decays<A>& d = decays_[reverse];
    for (int64_t i = 0; i < rows_; ++i) combine_row(i, reverse);
    for (int64_t i = 0; i < rows_; i += W) {
      const int64_t from = both_ || !reverse ? 0 : i, to = std::min(both_ || reverse ? rows_ : i + W, chunk_.visits);
      gemm<A>(W, s_.head_dim, to - from, m_ + i * s_.chunk + from, s_.chunk, 1, x_ + from * s_.head_dim, s_.head_dim,
              y_ + i * s_.head_dim, s_.head_dim);
    }
    add_carried(d, c_, state);
    if (both_) add_carried(decays_[1], p_.shared_projections ? c_ : c_reverse_, arriving);
    write(h0_ + h);
  }

  // Row i of M.
  void combine_row(int64_t i, bool reverse) {
    const A* cb = cb_ + i * s_.chunk;
    const A* cb_reverse = both_ && !p_.shared_projections ? cb_reverse_ + i * s_.chunk : cb;
    A* m = m_ + i * s_.chunk;
    const int64_t own = i / W;
    if (!reverse) {
      const Decays<A>& d = decays_[0];
      for (int64_t j = 0; j < own; ++j) {
        const A s = d.weight[i] * d.row[i] * d.at_block(own, j);
        store(m + j * W, load(cb + j * W) * s * (load(d.col + j * W) * load(d.step + j * W)));
      }
      store(m + own * W, load(cb + own * W) * d.weight[i] * (d.diagonal(i) * load(d.step + own * W)));
    }
    if (reverse || both_) {
      const Decays<A>& d = decays_[1];
      vec<A> mine = load(cb_reverse + own * W) * d.weight[i] * (d.diagonal(i) * load(d.step + own * W));
      if (both_) mine += load(m + own * W);
      store(m + own * W, mine);
      for (int64_t j = own + 1; j * W < rows_; ++j) {
        const A s = d.weight[i] * d.row[i] * d.at_block(own, j);
        store(m + j * W, load(cb_reverse + j * W) * s * (load(d.col + j * W) * load(d.step + j * W)));
      }
    }
  }

  void add_carried(const Decays<A>& d, const A* c, const A* state) {
    A* factor = scratch_;
    for (int64_t i = 0; i < rows_; i += W) store(factor + i, load(d.weight + i) * load(d.carry + i));
    gemm<A>(rows_, s_.head_dim, p_.state_dim, c, s_.state_dim, 1, state, s_.head_dim, y_, s_.head_dim, {A(1), factor});
  }

  void write(int64_t h) {
    const A skip = p_.D ? static_cast<const A*>(p_.D)[h] : A(0);
    T* y = static_cast<T*>(p_.y) + (b_ * p_.length * p_.heads + h) * p_.head_dim;
    for (int64_t i = 0; i < chunk_.visits; ++i) {
      T* out = y + chunk_.tokens[i] * p_.heads * p_.head_dim;
      const A *row = y_ + i * s_.head_dim, *x = x_ + i * s_.head_dim;
      int64_t n = 0;
      for (; n + W <= p_.head_dim; n += W) store(out + n, p_.D ? load(x + n) * skip + load(row + n) : load(row + n));
      if (n < p_.head_dim)
        store_n(out + n, p_.D ? load(x + n) * skip + load(row + n) : load(row + n), static_cast<int>(p_.head_dim - n));
    }
  }

  const SsdScanParams& p_;
  const ScanSizes& s_;
  const int64_t b_, h0_;
  const bool both_;
  int64_t rows_ = 0;  // visits of the chunk at hand, rounded up to the vector width
  Chunk chunk_;
  Decays<A> decays_[2];
  Buffer<A> x_, c_, c_reverse_, bt_, scratch_, cb_, cb_reverse_, m_, y_;
  Buffer<A> state_, arriving_;  // per head of the bundle; the reverse state that enters each chunk
};

template <class T>
void scan(const SsdScanParams& p) {
  const ScanSizes s = scan_sizes<acc_t<T>>(p);
  const int64_t bundles = p.heads / s.bundle;
  const double work = static_cast<double>(s.bundle) * p.length * p.head_dim * p.state_dim;
  p.threads.run(p.batch * bundles, 1 + static_cast<int64_t>(65536 / (work + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) Scan<T>(p, s, i / bundles, i % bundles * s.bundle).run();
  });
}

}  // namespace

void ssd_scan_cpu(const SsdScanParams& p) {
  dispatch(p.dtype, [&](auto* t) { scan<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
