// The scan. One task per (batch row, bundle of heads); it walks its chunks in visiting order and keeps the running
// state in cache, as (N, P). With both directions a first walk, right to left, leaves the reverse state that enters
// each chunk; the second computes, per chunk and head,
//     Y = M X + [weight carry]_f (C h) + [weight carry]_b (C r) + D X,      M = sum_d weight_d exp(S_i - S_j) dt_j
//     C_i.B_j
// What divides a mean, its mass, is the same of x = 1: row sums of M, and a state of one row, (N,), apart from the
// tile.
#include "scan_apart.h"
#include "ssd_scan_careful.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

// What products are computed in: pairs of bfloat16 where the inputs are bfloat16 and the processor multiplies them.
// Sums are of float, and so is a state; one that is handed out is updated by products of float as well.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool kHasPairs = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kHasPairs = false;
#endif

template <class T, bool kPairs>
class Scan {
  using A = acc_t<T>;
  using U = std::conditional_t<kPairs, bf16x2, A>;
  static constexpr int W = Simd<A>::width;
  static constexpr int64_t kPack = kPairs ? 2 : 1;

 public:
  Scan(const SsdScanParams& p, const ScanSizes& s, Notes& walked)
      : p_(p),
        s_(s),
        walked_(walked),
        both_(p.forward.on && p.reverse.on),
        units_(round_up(p.state_dim, kPack * W) / kPack),
        chunk_(s.chunk),
        decays_{Decays<A>(s.chunk), Decays<A>(s.chunk)},
        x_(s.chunk * s.head_dim),
        b_rows_(s.chunk * s.state_dim),
        scaled_(s.chunk * s.state_dim),
        factor_(s.chunk),
        cb_(s.chunk * s.chunk),
        y_(s.chunk * s.head_dim),
        state_(s.bundle * s.state),
        bound_(s.bundle),
        c_(s.chunk * units_),
        bt_(units_ * s.chunk),
        m_(s.chunk * s.chunk / kPack) {
    if (kPairs) {
      rows_of_units_ = Buffer<U>(s.chunk * units_), x_units_ = Buffer<U>(s.chunk * s.head_dim / 2);
      scaled_units_ = Buffer<U>(s.chunk * s.state_dim / 2), state_units_ = Buffer<U>(units_ * s.head_dim);
    }
    if (p.normalize) {
      mass_dim_ = units_ * kPack;
      mass_ = Buffer<A>(s.bundle * mass_dim_), masses_ = Buffer<A>(s.chunk);
      if (both_) arriving_mass_ = Buffer<A>(s.bundle * s.chunks * mass_dim_);
    }
    if (both_) arriving_ = Buffer<U>(s.bundle * s.chunks * arrival()), arriving_bound_.resize(s.chunks * s.bundle);
    if (both_ && !p.shared_projections)
      cb_reverse_ = Buffer<A>(s.chunk * s.chunk), c_reverse_ = Buffer<U>(s.chunk * units_);
  }

  void run(int64_t b, int64_t first_head) {
    b_ = b, h0_ = first_head;
    const bool backwards = !p_.forward.on;
    if (both_) arrive();
    for (int64_t h = 0; h < s_.bundle; ++h) {
      const A* from = p_.initial_state ? static_cast<const A*>(p_.initial_state) + outside(h) : nullptr;
      load_state(from, p_.head_dim, p_.state_dim, true, s_.head_dim, s_.state, state_ + h * s_.state);
      if (p_.normalize) {
        std::fill(mass(h), mass(h) + mass_dim_, A(0));
        if (from) std::copy_n(from + p_.head_dim * p_.state_dim, p_.state_dim, mass(h));
      }
      bound_[h] = largest_of(h, state_ + h * s_.state, s_.state);
    }
    for (int64_t c = 0; c < s_.chunks; ++c) visit(backwards ? s_.chunks - 1 - c : c, backwards, true);
    if (!p_.final_state) return;
    for (int64_t h = 0; h < s_.bundle; ++h) {
      A* to = static_cast<A*>(p_.final_state) + outside(h);
      save_state(state_ + h * s_.state, p_.head_dim, p_.state_dim, true, s_.head_dim, to);
      if (p_.normalize) std::copy_n(mass(h), p_.state_dim, to + p_.head_dim * p_.state_dim);
    }
  }

 private:
  const SsdScanDirection& direction(bool reverse) const { return reverse ? p_.reverse : p_.forward; }

  // Where a head's state lies in the caller's tensors.
  int64_t outside(int64_t h) const { return (b_ * p_.heads + h0_ + h) * (p_.head_dim + p_.normalize) * p_.state_dim; }

  // The state of the mass: at hand, and the reverse one that enters a chunk.
  A* mass(int64_t h) const { return mass_ + h * mass_dim_; }
  A* arriving_mass(int64_t chunk, int64_t h) const { return arriving_mass_ + (chunk * s_.bundle + h) * mass_dim_; }
  double largest_of(int64_t h, const A* state, int64_t size) const {
    const double most = largest(state, size);
    return p_.normalize ? std::max(most, largest(mass(h), mass_dim_)) : most;
  }

  // The reverse state that enters a chunk, in units, of one head.
  int64_t arrival() const { return kPairs ? units_ * s_.head_dim : s_.state; }
  U* arriving(int64_t chunk, int64_t h) const { return arriving_ + (chunk * s_.bundle + h) * arrival(); }

  // Right to left: the reverse state that enters each chunk.
  void arrive() {
    std::fill(state_.get(), state_ + s_.bundle * s_.state, A(0));
    std::fill(bound_.begin(), bound_.end(), 0.0);
    if (p_.normalize) std::fill(mass(0), mass(s_.bundle), A(0));
    for (int64_t c = s_.chunks - 1; c >= 0; --c) {
      for (int64_t h = 0; h < s_.bundle; ++h) {
        arriving_bound_[c * s_.bundle + h] = bound_[h];
        if (p_.normalize) std::copy_n(mass(h), mass_dim_, arriving_mass(c, h));
        if constexpr (kPairs)
          pair_rows(state_ + h * s_.state, round_up(p_.state_dim, 2), s_.head_dim, arriving(c, h));
        else if (c == s_.chunks - 1)
          std::fill(arriving(c, h), arriving(c, h) + s_.state, A(0));
      }
      if (c > 0) visit(c, true, false);
    }
  }

  // One chunk: its output if wanted, then its contribution to the running state of direction `reverse`.
  void visit(int64_t index, bool reverse, bool with_output) {
    chunk_.move_to(p_, s_, b_, index);
    rows_ = round_up(chunk_.visits, W);
    prefetch_next(index + (reverse ? -1 : 1), reverse, with_output);
    const bool in_units = kPairs && !(with_output && p_.final_state);
    read_projections(reverse, with_output);
    int64_t gathered = -1;
    double x = 0;
    for (int64_t h = 0; h < s_.bundle; ++h) {
      const int64_t group = (h0_ + h) / s_.per_x;
      if (group != gathered) x = read_x(group, in_units);
      gathered = group;
      move_decays(h, reverse, with_output);
      A* state = state_ + h * s_.state;
      const double before = bound_[h];
      if (!stays_finite<A>(bound(index, h, reverse, with_output, x))) {
        by_definition(index, h, reverse, with_output);
        continue;
      }
      bound_[h] = next_bound(reverse, before, x);
      if (with_output) output(index, h, reverse, state);
      if constexpr (!kPairs) {
        if (!with_output) {
          advance(h, reverse, in_units, arriving(index, h), arriving(index - 1, h));
          continue;
        }
      }
      advance(h, reverse, in_units, state, state);
    }
  }

  // Moves the mass, and the state, which is in place where it is of pairs.
  void advance(int64_t h, bool reverse, bool in_units, const A* from, A* to) {
    const Decays<A>& d = decays_[reverse];
    if (p_.normalize) update_mass(d, mass(h));
    if constexpr (kPairs) {
      if (in_units) {
        pair_rows(b_rows_, rows_, s_.state_dim, scaled_units_, d.leave, d.step);
        gemm<U>(p_.state_dim, s_.head_dim, (chunk_.visits + 1) / 2, scaled_units_, 1, s_.state_dim, x_units_,
                s_.head_dim, to, s_.head_dim, {d.total});
        return;
      }
    }
    update(d, from, to);
  }

  // B, and C B^T where there is an output.
  void read_projections(bool reverse, bool with_output) {
    gather<T>(direction(reverse).B, chunk_, h0_ / s_.per_b, p_.state_dim, s_.chunk, b_rows_);
    measure(reverse, with_output);
    if (!with_output) return;
    if (both_ && !p_.shared_projections) multiply_projections(true, c_reverse_, cb_reverse_);
    multiply_projections(reverse, c_, cb_);
  }
  // The largest magnitude in it.
  double read_x(int64_t group, bool in_units) {
    if (!in_units || p_.D) gather<T>(p_.x, chunk_, group, p_.head_dim, s_.chunk, x_);
    if constexpr (kPairs) gather_pairs(p_.x, chunk_, group, p_.head_dim, rows_, x_units_);
    return std::max(largest<T>(p_.x, chunk_, group, p_.head_dim), p_.normalize ? 1.0 : 0.0);
  }
  void move_decays(int64_t h, bool reverse, bool with_output) {
    decays_[reverse].move_to(p_, chunk_, h0_ + h, reverse);
    if (with_output && both_) decays_[1].move_to(p_, chunk_, h0_ + h, true);
  }

  void update(const Decays<A>& d, const A* from, A* to) {
    scale_rows<A>(b_rows_, rows_, s_.state_dim, d.leave, d.step, scaled_);
    gemm<A>(p_.state_dim, s_.head_dim, chunk_.visits, scaled_, 1, s_.state_dim, x_, s_.head_dim, to, s_.head_dim,
            {d.total, nullptr, from});
  }

  void update_mass(const Decays<A>& d, A* mass) {
    for (int64_t i = 0; i < chunk_.visits; ++i) factor_[i] = d.leave[i] * d.step[i];
    const auto columns = [&](int64_t n, auto vectors) {
      constexpr int kVectors = vectors;
      vec<A> sum[kVectors];
      for (int k = 0; k < kVectors; ++k) sum[k] = load(mass + n + k * W) * d.total;
      for (int64_t i = 0; i < chunk_.visits; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) sum[k] = load(b_rows_ + i * s_.state_dim + n + k * W) * factor_[i] + sum[k];
      for (int k = 0; k < kVectors; ++k) store(mass + n + k * W, sum[k]);
    };
    int64_t n = 0;
    for (; n + 4 * W <= s_.state_dim; n += 4 * W) columns(n, std::integral_constant<int, 4>{});
    for (; n < s_.state_dim; n += W) columns(n, std::integral_constant<int, 1>{});
  }

  // The largest magnitudes in this chunk's B and C, of each direction that it computes.
  void measure(bool reverse, bool with_output) {
    for (int d = 0; d < 2; ++d) {
      if (d != reverse && !(with_output && both_)) continue;
      const SsdScanDirection& of = direction(d);
      b_most_[d] = largest<T>(of.B, chunk_, h0_ / s_.per_b, p_.state_dim);
      c_most_[d] = with_output ? largest<T>(of.C, chunk_, h0_ / s_.per_c, p_.state_dim) : 0.0;
    }
  }

  double next_bound(int d, double state, double x) const {
    return decays_[d].growth * (state + b_most_[d] * x * decays_[d].steps);
  }

  // Of everything that is summed for this chunk and head, x the largest magnitude in its x.
  double bound(int64_t index, int64_t h, bool reverse, bool with_output, double x) const {
    double most = x;
    for (int d = 0; d < 2; ++d) {
      if (d != reverse && !(with_output && both_)) continue;
      const double state = d == reverse ? bound_[h] : arriving_bound_[index * s_.bundle + h];
      const double products = c_most_[d] * b_most_[d] * static_cast<double>(p_.state_dim);
      most += next_bound(d, state, x) + b_most_[d] * decays_[d].steps + products;
      most += decays_[d].growth * decays_[d].steps * products * (1 + x);
      most += decays_[d].growth * c_most_[d] * state * static_cast<double>(p_.state_dim);
    }
    return most;
  }

  void by_definition(int64_t index, int64_t h, bool reverse, bool with_output) {
    walked_.note(b_);
    A* state = state_ + h * s_.state;
    if constexpr (!kPairs) {
      if (!with_output) {
        std::copy(arriving(index, h), arriving(index, h) + s_.state, arriving(index - 1, h));
        state = arriving(index - 1, h);
      }
    }
    std::fill(y_.get(), y_ + s_.chunk * s_.head_dim, A(0));
    if (p_.normalize) std::fill(masses_.get(), masses_ + s_.chunk, A(0));
    A* own_mass = p_.normalize ? mass(h) : nullptr;
    careful_.walk(p_, s_, chunk_, decays_[reverse], h0_ + h, reverse, state, with_output ? y_.get() : nullptr, own_mass,
                  masses_);
    bound_[h] = largest_of(h, state, round_up(p_.state_dim * s_.head_dim, W));
    if (!with_output) return;
    if (both_) {
      std::vector<A> entering(s_.state);
      unpack(arriving(index, h), entering.data());
      std::vector<A> entering_mass(mass_dim_);
      if (own_mass) std::copy_n(arriving_mass(index, h), mass_dim_, entering_mass.data());
      careful_.walk(p_, s_, chunk_, decays_[1], h0_ + h, true, entering.data(), y_,
                    own_mass ? entering_mass.data() : nullptr, masses_);
    }
    write(h0_ + h, true);
  }

  void unpack(const U* state, A* out) const {
    if constexpr (kPairs) {
      for (int64_t n = 0; n < p_.state_dim; ++n)
        for (int64_t m = 0; m < s_.head_dim; ++m) {
          const uint32_t pair = state[n / 2 * s_.head_dim + m].bits;
          out[n * s_.head_dim + m] = widen(bf16{static_cast<uint16_t>(n % 2 ? pair >> 16 : pair & 0xffff)});
        }
    } else {
      std::copy(state, state + s_.state, out);
    }
  }

  // The next chunk's rows, while this one is computed.
  void prefetch_next(int64_t index, bool reverse, bool with_output) const {
    const int64_t t0 = index * s_.chunk, last = (h0_ + s_.bundle - 1) / s_.per_x;
    prefetch<T>(direction(reverse).B, p_, b_, t0, s_.chunk, h0_ / s_.per_b, p_.state_dim);
    for (int64_t x = h0_ / s_.per_x; x <= last; ++x) prefetch<T>(p_.x, p_, b_, t0, s_.chunk, x, p_.head_dim);
    if (!with_output) return;
    prefetch<T>(direction(reverse).C, p_, b_, t0, s_.chunk, h0_ / s_.per_c, p_.state_dim);
    if (!both_ || p_.shared_projections) return;
    prefetch<T>(p_.reverse.B, p_, b_, t0, s_.chunk, h0_ / s_.per_b, p_.state_dim);
    prefetch<T>(p_.reverse.C, p_, b_, t0, s_.chunk, h0_ / s_.per_c, p_.state_dim);
  }

  // The rows of B or C, in units, zeros beyond the chunk's visits and the state's size.
  void gather_units(const SsdScanTensor& t, int64_t group, U* out) {
    if constexpr (kPairs) {
      const T* data = static_cast<const T*>(t.data) + b_ * t.batch_stride + group * t.group_stride;
      std::memset(static_cast<void*>(out), 0, s_.chunk * units_ * sizeof(U));
      for (int64_t i = 0; i < chunk_.visits; ++i)
        std::memcpy(static_cast<void*>(out + i * units_), data + chunk_.tokens[i] * t.token_stride,
                    p_.state_dim * sizeof(T));
    } else {
      gather<T>(t, chunk_, group, p_.state_dim, s_.chunk, out);
    }
  }

  // C B^T where the direction needs it: on and below the diagonal, on and above it, or everywhere.
  void multiply_projections(bool reverse, U* c, A* cb) {
    const SsdScanDirection& d = direction(reverse);
    if constexpr (kPairs) {
      gather_units(d.B, h0_ / s_.per_b, rows_of_units_);
      transpose<float>(reinterpret_cast<const float*>(rows_of_units_.get()), units_, s_.chunk, units_,
                       reinterpret_cast<float*>(bt_.get()), s_.chunk);
    } else {
      if (reverse && both_) gather_units(d.B, h0_ / s_.per_b, scaled_);
      transpose<A>(reverse && both_ ? scaled_ : b_rows_, units_, s_.chunk, units_, bt_, s_.chunk);
    }
    gather_units(d.C, h0_ / s_.per_c, c);
    const bool all = both_ && p_.shared_projections;
    const int64_t k = (p_.state_dim + kPack - 1) / kPack;
    for (int64_t i = 0; i < rows_; i += W) {
      const int64_t from = all || !reverse ? 0 : i, to = all || reverse ? rows_ : i + W;
      gemm<U>(W, to - from, k, c + i * units_, units_, 1, bt_ + from, s_.chunk, cb + i * s_.chunk + from, s_.chunk);
    }
  }

  void output(int64_t index, int64_t h, bool reverse, const A* state) {
    if (p_.normalize)
      for (int64_t i = 0; i < rows_; ++i) combine_row<true>(i);
    else
      for (int64_t i = 0; i < rows_; ++i) combine_row<false>(i);
    const int64_t ldm = s_.chunk / kPack;
    const U* x;
    if constexpr (kPairs)
      x = x_units_;
    else
      x = x_;
    for (int64_t i = 0; i < rows_; i += W) {
      const int64_t from = both_ || !reverse ? 0 : i, to = std::min(both_ || reverse ? rows_ : i + W, chunk_.visits);
      gemm<U>(W, s_.head_dim, (to - from + kPack - 1) / kPack, m_ + i * ldm + from / kPack, ldm, 1,
              x + from / kPack * s_.head_dim, s_.head_dim, y_ + i * s_.head_dim, s_.head_dim);
    }
    const U* here;
    if constexpr (kPairs) {
      pair_rows(state, round_up(p_.state_dim, 2), s_.head_dim, state_units_);
      here = state_units_;
    } else {
      here = state;
    }
    add_carried(decays_[reverse], c_, here, p_.normalize ? mass(h) : nullptr);
    if (both_)
      add_carried(decays_[1], p_.shared_projections ? c_ : c_reverse_, arriving(index, h),
                  p_.normalize ? arriving_mass(index, h) : nullptr);
    write(h0_ + h);
  }

  // Row i of M, and the sum of it.
  template <bool kSum>
  void combine_row(int64_t i) {
    const int64_t own = i / W;
    vec<A> mine{}, sum{};
    const auto put = [&](int64_t j, vec<A> values) {
      if constexpr (kSum) sum += values;
      this->put(i, j, values);
    };
    if (p_.forward.on) {
      const Decays<A>& d = decays_[0];
      const A* cb = cb_ + i * s_.chunk;
      const A outer = d.weight[i] * d.row[i];
      for (int64_t j = 0; j < own; ++j)
        put(j * W, load(cb + j * W) * (outer * d.at_block(own, j)) * (load(d.col + j * W) * load(d.step + j * W)));
      mine = load(cb + own * W) * d.weight[i] * (d.diagonal(i) * load(d.step + own * W));
    }
    if (p_.reverse.on) {
      const Decays<A>& d = decays_[1];
      const A* cb = (both_ && !p_.shared_projections ? cb_reverse_ : cb_) + i * s_.chunk;
      const A outer = d.weight[i] * d.row[i];
      mine += load(cb + own * W) * d.weight[i] * (d.diagonal(i) * load(d.step + own * W));
      for (int64_t j = own + 1; j * W < rows_; ++j)
        put(j * W, load(cb + j * W) * (outer * d.at_block(own, j)) * (load(d.col + j * W) * load(d.step + j * W)));
    }
    put(own * W, mine);
    if constexpr (kSum) masses_[i] = LINMU_ISA::sum<A>(sum);
  }

  void put(int64_t i, int64_t j, vec<A> values) {
    if constexpr (kPairs)
      store(reinterpret_cast<bf16*>(m_.get()) + i * s_.chunk + j, values);
    else
      store(m_ + i * s_.chunk + j, values);
  }

  void add_carried(const Decays<A>& d, const U* c, const U* state, const A* mass) {
    for (int64_t i = 0; i < rows_; i += W) store(factor_ + i, load(d.weight + i) * load(d.carry + i));
    for (int64_t i = 0; mass && i < chunk_.visits; ++i) masses_[i] += factor_[i] * read_mass(c + i * units_, mass);
    gemm<U>(rows_, s_.head_dim, (p_.state_dim + kPack - 1) / kPack, c, units_, 1, state, s_.head_dim, y_, s_.head_dim,
            {A(1), factor_});
  }

  // A row of C, as it lies in units, times the state of the mass.
  A read_mass(const U* c, const A* mass) const {
    using Element = std::conditional_t<kPairs, bf16, A>;
    const Element* row = reinterpret_cast<const Element*>(c);
    vec<A> dot{};
    for (int64_t n = 0; n < mass_dim_; n += W) dot = load(row + n) * load(mass + n) + dot;
    return sum<A>(dot);
  }

  // Of products all is finite: there a product by the inverse mass, and its error taken off, is a division.
  void write(int64_t h, bool divides = false) {
    const A skip = p_.D ? static_cast<const A*>(p_.D)[h] : A(0);
    const int64_t first = b_ * p_.length * p_.heads + h;
    for (int64_t i = 0; i < chunk_.visits; ++i) {
      const int64_t at = first + chunk_.tokens[i] * p_.heads;
      const A *row = y_ + i * s_.head_dim, *x = x_ + i * s_.head_dim;
      const auto value = [&](int64_t n) { return p_.D ? load(x + n) * skip + load(row + n) : load(row + n); };
      if (p_.normalize) {
        const A mass = masses_[i] + skip;
        const bool empty = mass < A(kLeastMass);
        static_cast<A*>(p_.mass)[at] = empty ? A(0) : mass;
        const A factor = 1 / mass;
        const auto mean = [&](int64_t n) {
          const vec<A> v = value(n), first = divides ? v / mass : v * factor;
          return empty ? vec<A>{} : divides ? first : (v - first * mass) * factor + first;
        };
        if (p_.wide_y)
          each(static_cast<A*>(p_.y) + at * p_.head_dim, mean);
        else
          each(static_cast<T*>(p_.y) + at * p_.head_dim, mean);
      } else {
        each(static_cast<T*>(p_.y) + at * p_.head_dim, value);
      }
    }
  }

  // A row of y.
  template <class Y, class F>
  void each(Y* out, F&& value) const {
    int64_t n = 0;
    for (; n + W <= p_.head_dim; n += W) store(out + n, value(n));
    if (n < p_.head_dim) store_n(out + n, value(n), static_cast<int>(p_.head_dim - n));
  }

  const SsdScanParams& p_;
  const ScanSizes& s_;
  Notes& walked_;
  int64_t b_ = 0, h0_ = 0;
  const bool both_;
  const int64_t units_;  // per row of B and C
  int64_t rows_ = 0;     // visits of the chunk at hand, rounded up to the vector width
  int64_t mass_dim_ = 0;
  Chunk chunk_;
  Decays<A> decays_[2];
  Buffer<A> x_, b_rows_, scaled_, factor_, cb_, cb_reverse_, y_;
  Buffer<A> state_, mass_;   // per head of the bundle
  Buffer<A> masses_;         // per visit of the chunk, of the head at hand
  Buffer<A> arriving_mass_;  // as arriving_
  // Largest magnitudes: of states at hand per head, of those that enter chunks, of B and C.
  std::vector<double> bound_, arriving_bound_;
  double b_most_[2] = {}, c_most_[2] = {};
  Careful<T> careful_;
  Buffer<U> arriving_;  // per chunk and head of the bundle
  Buffer<U> c_, c_reverse_, bt_, m_;
  Buffer<U> rows_of_units_, x_units_, scaled_units_, state_units_;  // of pairs only
};

template <class T, bool kPairs>
void scan(const SsdScanParams& p, Notes& walked) {
  // A bundle keeps a state per chunk and head for the second walk, as much as its x: of both directions fewer heads
  // share C B^T, for 2 % of the time, so that two threads hold an eighth of inputs and outputs.
  const ScanSizes s = scan_sizes<acc_t<T>>(p, p.forward.on && p.reverse.on ? kBundle / 2 : kBundle);
  const int64_t bundles = p.heads / s.bundle;
  const double work = static_cast<double>(s.bundle) * p.length * p.head_dim * p.state_dim;
  p.threads.run(p.batch * bundles, 1 + static_cast<int64_t>(65536 / (work + 1)), [&](int64_t begin, int64_t end) {
    Scan<T, kPairs> task(p, s, walked);
    for (int64_t i = begin; i < end; ++i) task.run(i / bundles, i % bundles * s.bundle);
  });
}

}  // namespace

void ssd_scan_cpu(const SsdScanParams& p) {
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    keep_apart<T>(p, p, [](const SsdScanParams& params, Notes& walked) {
      // A mean's gradient is a difference of what it is made of: products of bfloat16 would leave too little of it.
      if (kHasPairs<T> && !params.wide_y)
        scan<T, kHasPairs<T>>(params, walked);
      else
        scan<T, false>(params, walked);
    });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
