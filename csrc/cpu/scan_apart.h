// What a segment may not see changes no bit of it. A chunk that meets values too large for products, or not finite, is
// walked by the definition, which rounds otherwise, also for those of its visits that see no such value. So the scan
// then runs once more, on copies in which the tokens at fault are zeros, and what sees none of these is taken from
// there. Of a row whose chunks are all products nothing is read here.
#pragma once
#include <algorithm>

#include "../linmu/gated_delta_scan.h"
#include "finite.h"
#include "gemm.h"

namespace linmu {
namespace LINMU_ISA {

// One more run of a scan or of its gradient. `Scan` is the scan's Params. Each method below puts a copy, or a place for
// what is computed, where its argument pointed to.
template <class Scan>
class Apart {
 public:
  // through: results see the whole of their token's segment, as gradients do, and not only what comes before it.
  Apart(const Scan& p, bool through)
      : p_(p),
        through_(through),
        sizes_(p.batch * p.length),
        entering_(p.batch),
        leaving_(p.batch),
        hidden_(p.batch * p.length),
        hidden_entering_(p.batch),
        hidden_leaving_(p.batch),
        seen_(p.length) {}

  // (B, L, groups, dim).
  template <class T>
  void token(SsdScanTensor& t, int64_t groups, int64_t dim) {
    const int64_t L = p_.length, size = groups * dim;
    T* copy = make<T>(p_.batch * L * size);
    for (int64_t i = 0; i < p_.batch * L; ++i) {
      const T* from = static_cast<const T*>(t.data) + i / L * t.batch_stride + i % L * t.token_stride;
      for (int64_t g = 0; g < groups; ++g) std::copy_n(from + g * t.group_stride, dim, copy + i * size + g * dim);
      sizes_[i] = std::max(sizes_[i], largest_of(copy + i * size, size));
    }
    tokens_.push_back({reinterpret_cast<char*>(copy), size * static_cast<int64_t>(sizeof(T))});
    t = {copy, L * size, size, dim};
  }
  // (B, L, size), contiguous, or null.
  template <class T>
  void token(const void*& data, int64_t size) {
    if (!data) return;
    SsdScanTensor t{data, p_.length * size, size, size};
    token<T>(t, 1, size);
    data = t.data;
  }
  // Likewise, of logs of decays: those far below 0, and -inf too, only leave nothing.
  template <class T>
  void log_decay(const void*& data, int64_t size) {
    const std::vector<double> sizes = sizes_;
    token<T>(data, size);
    sizes_ = sizes;
    for (int64_t i = 0; i < p_.batch * p_.length * size; ++i) {
      const T x = static_cast<const T*>(data)[i];
      if (!(x < T(0))) sizes_[i / size] = std::max(sizes_[i / size], largest_of(&x, 1));
    }
  }
  // (B, size), or null: what enters the first visit, and the gradient of what leaves the last one.
  template <class T>
  void state(const void*& data, int64_t size, bool enters) {
    if (!data) return;
    T* copy = make<T>(p_.batch * size);
    std::copy_n(static_cast<const T*>(data), p_.batch * size, copy);
    std::vector<double>& sizes = enters ? entering_ : leaving_;
    for (int64_t b = 0; b < p_.batch; ++b) sizes[b] = largest_of(copy + b * size, size);
    (enters ? entering_states_ : leaving_states_)
        .push_back({reinterpret_cast<char*>(copy), size * static_cast<int64_t>(sizeof(T))});
    data = copy;
  }

  enum Of { kToken, kEntering, kLeaving, kBatch };  // whose result: a token's, a state's, or a sum over all
  template <class T>
  void result(void*& data, int64_t size, Of of) {
    if (!data) return;
    const int64_t rows = of == kToken   ? p_.batch * p_.length
                         : of == kBatch ? 1
                                        : p_.batch,
                  bytes = size * static_cast<int64_t>(sizeof(T));
    char* place = reinterpret_cast<char*>(make<T>(rows * size));
    results_.push_back({static_cast<char*>(data), place, rows, bytes, of});
    data = place;
  }

  // run: computes the results of the copies. A row is done when nothing hidden makes it walk any more.
  template <class Run>
  void finish(Notes& walked, const Run& run) {
    std::vector<int64_t> rows;
    for (int64_t b = 0; b < p_.batch; ++b)
      if (walked.has(b)) rows.push_back(b);
    const auto drop = [&](auto&& done) { rows.erase(std::remove_if(rows.begin(), rows.end(), done), rows.end()); };
    for (const double limit : kLimits) {
      bool changed = false;
      for (const int64_t b : rows) changed = hide(b, limit) || changed;
      drop([&](int64_t b) { return !spares(b); });
      if (rows.empty()) return;
      if (!changed) continue;
      walked.clear();
      for (const Result& r : results_) std::fill_n(r.place, r.rows * r.bytes, char(0));
      run();
      drop([&](int64_t b) {
        if (walked.has(b)) return false;
        take(b);
        return true;
      });
    }
  }

 private:
  struct Copy {
    char* data;
    int64_t bytes;  // of a token, or of a row
  };
  struct Result {
    char *data, *place;
    int64_t rows, bytes;
    Of of;
  };

  template <class T>
  T* make(int64_t size) {
    buffers_.emplace_back(std::max<int64_t>(size, 1) * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(buffers_.back().get());
  }

  template <class T>
  static double largest_of(const T* values, int64_t size) {
    Largest<acc_t<T>> most;
    for_each_vector<acc_t<T>>(size, [&](int64_t i, auto lanes) { most.see(lanes.load(values + i)); });
    return most.value();
  }

  // Whether there is more to hide of this row than before.
  bool hide(int64_t b, double limit) {
    bool changed = false;
    const auto too_large = [&](double size, double most, uint8_t& hidden) {
      if (hidden || size <= most) return false;
      changed = true, hidden = 1;
      return true;
    };
    const auto clear = [](const std::vector<Copy>& copies, int64_t i) {
      for (const Copy& c : copies) std::fill_n(c.data + i * c.bytes, c.bytes, char(0));
    };
    for (int64_t i = b * p_.length; i < (b + 1) * p_.length; ++i)
      if (too_large(sizes_[i], limit, hidden_[i])) clear(tokens_, i);
    if (too_large(entering_[b], limit * limit, hidden_entering_[b])) clear(entering_states_, b);
    if (too_large(leaving_[b], limit * limit, hidden_leaving_[b])) clear(leaving_states_, b);
    return changed;
  }

  // Marks which of a row's tokens and states see what is hidden. Whether there are tokens that do not.
  bool spares(int64_t b) {
    const int64_t L = p_.length;
    const uint8_t* hidden = hidden_.data() + b * L;
    std::copy_n(hidden, L, seen_.begin());
    for (const bool reverse : {false, true}) {
      const auto& d = reverse ? p_.reverse : p_.forward;
      if (!d.on) continue;
      const bool own = !reverse || !p_.forward.on;  // has the initial and the final state
      const auto at = [&](int64_t k) {
        const int64_t t = reverse ? L - 1 - k : k;
        return p_.token_order ? static_cast<int64_t>(p_.token_order[b * L + t]) : t;
      };
      const auto restarts = [&](int64_t k) {
        return d.seq_idx && d.seq_idx[b * L + at(k)] != d.seq_idx[b * L + at(k - 1)];
      };
      for (int64_t first = 0, end = 0; first < L; first = end) {
        bool sees = own && first == 0 && hidden_entering_[b];
        for (end = first; end < L && (end == first || !restarts(end)); ++end) {
          const int64_t i = at(end);
          if (d.mask && !d.mask[b * L + i]) continue;
          sees = sees || hidden[i], seen_[i] = seen_[i] || sees;
        }
        sees = sees || (own && end == L && hidden_leaving_[b]);
        for (int64_t k = first; through_ && sees && k < end; ++k)
          if (!d.mask || d.mask[b * L + at(k)]) seen_[at(k)] = 1;
        if (own && first == 0) entering_seen_ = sees;
        if (own && end == L) leaving_seen_ = sees;
      }
    }
    return std::find(seen_.begin(), seen_.end(), uint8_t(0)) != seen_.end();
  }

  void take(int64_t b) {
    spares(b);
    const auto copy = [](const Result& r, int64_t i) {
      std::copy_n(r.place + i * r.bytes, r.bytes, r.data + i * r.bytes);
    };
    for (const Result& r : results_) {
      if ((r.of == kEntering && !entering_seen_) || (r.of == kLeaving && !leaving_seen_)) copy(r, b);
      for (int64_t i = 0; r.of == kToken && i < p_.length; ++i)
        if (!seen_[i]) copy(r, b * p_.length + i);
    }
  }

  const Scan& p_;
  const bool through_;
  std::vector<Buffer<char>> buffers_;
  std::vector<Copy> tokens_, entering_states_, leaving_states_;
  std::vector<Result> results_;
  std::vector<double> sizes_, entering_, leaving_;  // largest magnitudes per token, and per row of states
  std::vector<uint8_t> hidden_, hidden_entering_, hidden_leaving_;
  std::vector<uint8_t> seen_;  // of the row at hand
  bool entering_seen_ = false, leaving_seen_ = false;
};

// What each scan and each gradient reads and computes.
template <class T>
void read_apart(Apart<SsdScanParams>& a, SsdScanParams& p) {
  using A = acc_t<T>;
  a.template token<T>(p.x, p.groups_x, p.head_dim);
  for (SsdScanDirection* d : {&p.forward, &p.reverse}) {
    if (!d->on) continue;
    a.template token<A>(d->dt, p.heads);
    a.template token<T>(d->B, p.groups_b, p.state_dim), a.template token<T>(d->C, p.groups_c, p.state_dim);
  }
  if (p.gate_per_token) a.template token<A>(p.gate, p.heads);
  a.template state<A>(p.initial_state, p.heads * (p.head_dim + p.normalize) * p.state_dim, true);
}
template <class T>
void read_apart(Apart<GatedDeltaScanParams>& a, GatedDeltaScanParams& p) {
  using A = acc_t<T>;
  a.template token<T>(p.v, p.groups_v, p.value_dim);
  for (GatedDeltaDirection* d : {&p.forward, &p.reverse}) {
    if (!d->on) continue;
    a.template token<T>(d->q, p.groups_q, p.key_dim), a.template token<T>(d->k, p.groups_k, p.key_dim);
    a.template log_decay<A>(d->g, p.heads), a.template token<A>(d->beta, p.heads);
  }
  if (p.gate_per_token) a.template token<A>(p.gate, p.heads);
  a.template state<A>(p.initial_state, p.heads * p.key_dim * p.value_dim, true);
}

template <class T>
void all_apart(Apart<SsdScanParams>& a, SsdScanParams& p) {
  using A = acc_t<T>;
  using Kind = Apart<SsdScanParams>;
  read_apart<T>(a, p);
  if (p.wide_y)
    a.template result<A>(p.y, p.heads * p.head_dim, Kind::kToken);
  else
    a.template result<T>(p.y, p.heads * p.head_dim, Kind::kToken);
  if (p.normalize) a.template result<A>(p.mass, p.heads, Kind::kToken);
  a.template result<A>(p.final_state, p.heads * (p.head_dim + p.normalize) * p.state_dim, Kind::kLeaving);
}
template <class T>
void all_apart(Apart<GatedDeltaScanParams>& a, GatedDeltaScanParams& p) {
  using Kind = Apart<GatedDeltaScanParams>;
  read_apart<T>(a, p);
  a.template result<T>(p.y, p.heads * p.value_dim, Kind::kToken);
  a.template result<acc_t<T>>(p.final_state, p.heads * p.key_dim * p.value_dim, Kind::kLeaving);
}
template <class T>
void all_apart(Apart<GatedDeltaScanParams>& a, GatedDeltaScanBwdParams& g) {
  using A = acc_t<T>;
  using Kind = Apart<GatedDeltaScanParams>;
  GatedDeltaScanParams& p = g.scan;
  const int64_t state = p.heads * p.key_dim * p.value_dim;
  read_apart<T>(a, p);
  a.template token<T>(g.grad_y, p.heads, p.value_dim);
  a.template state<A>(g.grad_final_state, state, false);
  for (GatedDeltaDirectionGrads* d : {&g.forward, &g.reverse}) {
    a.template result<T>(d->q, p.groups_q * p.key_dim, Kind::kToken);
    a.template result<T>(d->k, p.groups_k * p.key_dim, Kind::kToken);
    a.template result<A>(d->g, p.heads, Kind::kToken), a.template result<A>(d->beta, p.heads, Kind::kToken);
  }
  a.template result<T>(g.v, p.groups_v * p.value_dim, Kind::kToken);
  a.template result<A>(g.gate, p.heads, p.gate_per_token ? Kind::kToken : Kind::kBatch);
  a.template result<A>(g.initial_state, state, Kind::kEntering);
}
template <class T>
void all_apart(Apart<SsdScanParams>& a, SsdScanBwdParams& g) {
  using A = acc_t<T>;
  using Kind = Apart<SsdScanParams>;
  SsdScanParams& p = g.scan;
  const int64_t state = p.heads * (p.head_dim + p.normalize) * p.state_dim;
  read_apart<T>(a, p);
  if (p.normalize) {
    const void *y = p.y, *mass = p.mass;
    a.template token<A>(y, p.heads * p.head_dim), a.template token<A>(mass, p.heads);
    p.y = const_cast<void*>(y), p.mass = const_cast<void*>(mass);
    a.template token<A>(g.grad_y, p.heads, p.head_dim), a.template token<A>(g.grad_mass, p.heads);
  } else {
    a.template token<T>(g.grad_y, p.heads, p.head_dim);
  }
  a.template state<A>(g.grad_final_state, state, false);
  for (SsdScanDirectionGrads* d : {&g.forward, &g.reverse}) {
    a.template result<A>(d->dt, p.heads, Kind::kToken);
    a.template result<T>(d->B, p.groups_b * p.state_dim, Kind::kToken);
    a.template result<T>(d->C, p.groups_c * p.state_dim, Kind::kToken);
    a.template result<A>(d->A, p.heads, Kind::kBatch), a.template result<A>(d->dt_bias, p.heads, Kind::kBatch);
  }
  a.template result<T>(g.x, p.groups_x * p.head_dim, Kind::kToken);
  a.template result<A>(g.D, p.heads, Kind::kBatch);
  a.template result<A>(g.gate, p.heads, p.gate_per_token ? Kind::kToken : Kind::kBatch);
  a.template result<A>(g.initial_state, state, Kind::kEntering);
}

// run(params, walked), of a scan or of its gradient, whose Params hold `scan`.
template <class T, class Scan, class Params, class Run>
void keep_apart(const Scan& scan, const Params& params, const Run& run) {
  Notes walked(scan.batch);
  run(params, walked);
  if (!walked.any()) return;
  Params copies = params;
  Apart<Scan> apart(scan, !std::is_same_v<Scan, Params>);
  all_apart<T>(apart, copies);
  apart.finish(walked, [&] { run(copies, walked); });
}

}  // namespace LINMU_ISA
}  // namespace linmu
