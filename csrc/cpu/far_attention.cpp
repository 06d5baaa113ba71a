// What is far, mixed into what is near. One task per (row, key/value head, up to four of its query heads) walks the
// steps of leaving with the states of these heads in cache, as (N, P). Tokens that enter are summed up to 64 at a time,
// as keys' features by values; tokens that read after the same steps meet one state, 64 of them at a time.
#include "../linmu/far_attention.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"

namespace linmu {
namespace LINMU_ISA {
namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kTogether = 4;  // heads that share the features of a key

// Indices of those `at` that are in [0, end), in order of what they are, and of themselves.
struct Sorted {
  std::vector<int32_t> index, begin;  // those of step u: index[begin[u]] to index[begin[u + 1] - 1]

  Sorted(const int32_t* at, int64_t count, int64_t end) : begin(end + 1) {
    const auto within = [&](int64_t i) { return at[i] >= 0 && at[i] < end; };
    for (int64_t i = 0; i < count; ++i)
      if (within(i)) ++begin[at[i] + 1];
    for (int64_t u = 0; u < end; ++u) begin[u + 1] += begin[u];
    index.resize(begin[end]);
    std::vector<int32_t> next(begin);
    for (int64_t i = 0; i < count; ++i)
      if (within(i)) index[next[at[i]]++] = static_cast<int32_t>(i);
  }
};

template <class T>
class Far {
  using A = acc_t<T>;
  static constexpr int W = Simd<A>::width;

 public:
  explicit Far(const FarAttentionParams& p)
      : p_(p),
        dim_(round_up(p.head_dim, W)),
        features_(round_up(p.state_dim, W)),
        b_map_(p.head_dim * features_),
        c_map_(kTogether * p.head_dim * features_),
        rows_(kRows * dim_),
        values_(kRows * dim_),
        b_(kRows * features_),
        c_(kRows * features_),
        y_(kRows * dim_),
        state_(kTogether * features_ * dim_),
        mass_(kTogether * features_) {}

  void run(int64_t b, int64_t g, int64_t first, int64_t heads) {
    row_ = b, group_ = g, h0_ = first, heads_ = heads;
    const int32_t* when = p_.when + b * p_.length;
    int64_t end = p_.last ? p_.last[b] : 0;
    for (int64_t i = 0; i < p_.length; ++i) end = std::max<int64_t>(end, when[i]);
    const Sorted entering(p_.entered + (b * p_.groups + g) * p_.total, p_.total, end);
    const Sorted reading(when, p_.length, end + 1);
    begin();
    int64_t done = 0;
    for (int64_t u = 0; u <= end; ++u) {
      const bool handed_out = p_.last && p_.last[b] == u;
      const int64_t readers = reading.begin[u + 1] - reading.begin[u];
      if (!readers && !handed_out) continue;
      for (const int64_t upto = entering.begin[u]; done < upto; done += kRows)
        enter(entering.index.data() + done, std::min(kRows, upto - done));
      done = entering.begin[u];
      for (int64_t i = 0; i < readers; i += kRows)
        read(reading.index.data() + reading.begin[u] + i, std::min(kRows, readers - i));
      if (handed_out) hand_out();
    }
  }

 private:
  A* state(int64_t r) const { return state_ + r * features_ * dim_; }
  A* mass(int64_t r) const { return mass_ + r * features_; }
  int64_t outside(int64_t r) const { return (row_ * p_.heads + h0_ + r) * (p_.head_dim + 1) * p_.state_dim; }

  // Rows of N as rows of whole vectors.
  void take_map(const void* from, int64_t index, A* to) const {
    const A* src = static_cast<const A*>(from) + index * p_.head_dim * p_.state_dim;
    std::fill(to, to + p_.head_dim * features_, A(0));
    for (int64_t i = 0; i < p_.head_dim; ++i) std::copy_n(src + i * p_.state_dim, p_.state_dim, to + i * features_);
  }

  void begin() {
    take_map(p_.b_map, group_, b_map_);
    std::fill(state_.get(), state_ + heads_ * features_ * dim_, A(0));
    std::fill(mass_.get(), mass_ + heads_ * features_, A(0));
    for (int64_t r = 0; r < heads_; ++r) {
      take_map(p_.c_map, h0_ + r, c_map_ + r * p_.head_dim * features_);
      if (!p_.initial_state) continue;
      const A* from = static_cast<const A*>(p_.initial_state) + outside(r);
      for (int64_t m = 0; m < p_.head_dim; ++m)
        for (int64_t n = 0; n < p_.state_dim; ++n) state(r)[n * dim_ + m] = *from++;
      std::copy_n(from, p_.state_dim, mass(r));
    }
  }

  void hand_out() const {
    for (int64_t r = 0; r < heads_; ++r) {
      A* to = static_cast<A*>(p_.final_state) + outside(r);
      for (int64_t m = 0; m < p_.head_dim; ++m)
        for (int64_t n = 0; n < p_.state_dim; ++n) *to++ = state(r)[n * dim_ + m];
      std::copy_n(mass(r), p_.state_dim, to);
    }
  }

  // Rows of one head, widened, zeros up to whole vectors.
  void gather(const TokenRows<const void*>& from, int64_t head, const int32_t* tokens, int64_t count, A* out) const {
    const T* data = static_cast<const T*>(from.data) + row_ * from.batch + head * from.head;
    for (int64_t i = 0; i < count; ++i, out += dim_) {
      const T* src = data + tokens[i] * from.token;
      for_each_vector<A>(p_.head_dim, [&](int64_t m, auto lanes) { store(out + m, lanes.load(src + m)); });
    }
  }

  // Features of `count` rows: softmax of factor * rows map, zeros up to whole vectors.
  void map(int64_t count, const A* map, A factor, A* out) const {
    gemm<A>(count, features_, p_.head_dim, rows_.get(), dim_, 1, map, features_, out, features_);
    for (int64_t i = 0; i < count; ++i, out += features_) {
      vec<A> most = splat(-std::numeric_limits<A>::infinity());
      for_each_vector<A>(p_.state_dim, [&](int64_t n, auto lanes) {
        const vec<A> x = load(out + n) * factor, seen = lanes.only(x - most);  // 0 where no feature is
        store(out + n, x);
        most = seen > vec<A>{} ? x : most;
      });
      A top = most[0];
      for (int w = 1; w < W; ++w) top = most[w] > top ? most[w] : top;
      vec<A> total{};
      for_each_vector<A>(p_.state_dim, [&](int64_t n, auto lanes) {
        const vec<A> e = lanes.only(exp(load(out + n) - top));
        store(out + n, e);
        total = total + e;
      });
      const A share = 1 / sum<A>(total);
      for (int64_t n = 0; n < features_; n += W) store(out + n, load(out + n) * share);
    }
  }

  void enter(const int32_t* tokens, int64_t count) {
    gather(p_.k, group_, tokens, count, rows_);
    gather(p_.v, group_, tokens, count, values_);
    map(count, b_map_, A(1), b_);
    alignas(64) A weight[kRows] = {};
    for (int64_t r = 0; r < heads_; ++r) {
      const double rate = static_cast<const A*>(p_.rates)[h0_ + r];
      const A* steps = static_cast<const A*>(p_.steps) + row_ * p_.total * p_.heads + h0_ + r;
      double later = 0;  // by how much, in logs, a token decays after it has entered
      for (int64_t j = count - 1; j >= 0; --j) {
        weight[j] = static_cast<A>(-later);
        later += rate * static_cast<double>(steps[tokens[j] * p_.heads]);
      }
      for (int64_t j = 0; j < kRows; j += W) store(weight + j, exp(load(weight + j)));
      for (int64_t j = 0; j < count; ++j) weight[j] *= steps[tokens[j] * p_.heads];
      const A through = static_cast<A>(std::exp(-later));
      for (int64_t n = 0; n < features_; n += W) {
        vec<A> total = load(mass(r) + n) * through;
        for (int64_t j = 0; j < count; ++j) {
          const vec<A> x = load(b_ + j * features_ + n) * weight[j];
          store(c_ + j * features_ + n, x);
          total = total + x;
        }
        store(mass(r) + n, total);
      }
      gemm<A>(p_.state_dim, dim_, count, c_.get(), 1, features_, values_.get(), dim_, state(r), dim_, {through});
    }
  }

  void read(const int32_t* tokens, int64_t count) {
    for (int64_t r = 0; r < heads_; ++r) {
      const int64_t h = h0_ + r;
      gather(p_.q, h, tokens, count, rows_);
      const A factor = static_cast<const A*>(p_.scale)[h] * static_cast<A>(p_.softmax_scale);
      map(count, c_map_ + r * p_.head_dim * features_, factor, c_);
      gemm<A>(count, dim_, p_.state_dim, c_.get(), features_, 1, state(r), dim_, y_.get(), dim_);
      for (int64_t i = 0; i < count; ++i) {
        vec<A> total{};
        for (int64_t n = 0; n < features_; n += W) total = load(c_ + i * features_ + n) * load(mass(r) + n) + total;
        mix(row_ * p_.length + tokens[i], h, y_ + i * dim_, sum<A>(total));
      }
    }
  }

  // Gives a token its share of what is far, whose sums are `far` and whose weights are `total`.
  void mix(int64_t token, int64_t h, const A* far, A total) const {
    const int64_t at = token * p_.heads + h;
    const bool empty = total < A(kLeastMass);
    const A log_total = empty ? A(kLeastLogTotal) : std::max(std::log(total), A(kLeastLogTotal));
    const A rest = static_cast<const A*>(p_.rest)[at], lse = static_cast<const A*>(p_.lse)[at];
    const A share = 1 / (1 + std::exp(-(rest + log_total - lse))), factor = empty ? A(0) : 1 / total;
    T* y = static_cast<T*>(p_.y) + at * p_.head_dim;
    const T* z = p_.z_gate ? static_cast<const T*>(p_.z_gate) + at * p_.head_dim : nullptr;
    for_each_vector<A>(p_.head_dim, [&](int64_t m, auto lanes) {
      vec<A> mean = empty ? vec<A>{} : load(far + m) * factor;
      if (z) {
        const vec<A> gate = lanes.load(z + m);
        mean = mean * (gate * sigmoid(gate));
      }
      // As torch.lerp does, which is exact at both ends.
      const vec<A> near = lanes.load(y + m), apart = mean - near;
      lanes.store(y + m, share < A(0.5) ? near + apart * share : mean - apart * (1 - share));
    });
  }

  const FarAttentionParams& p_;
  int64_t row_ = 0, group_ = 0, h0_ = 0, heads_ = 0;
  const int64_t dim_, features_;  // P and N, up to whole vectors
  Buffer<A> b_map_, c_map_, rows_, values_, b_, c_, y_;
  Buffer<A> state_, mass_;  // per head of the task
};

}  // namespace

void far_attention_cpu(const FarAttentionParams& p) {
  if (!p.heads) return;
  dispatch(p.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t shared = p.heads / p.groups, parts = (shared + kTogether - 1) / kTogether;
    const double work = static_cast<double>(p.length + p.total) * p.head_dim * p.state_dim * kTogether;
    p.threads.run(p.batch * p.groups * parts, 1 + static_cast<int64_t>(65536 / (work + 1)),
                  [&](int64_t begin, int64_t end) {
                    Far<T> far(p);
                    for (int64_t task = begin; task < end; ++task) {
                      const int64_t part = task % parts, bg = task / parts, g = bg % p.groups;
                      const int64_t from = shared * part / parts, to = shared * (part + 1) / parts;
                      far.run(bg / p.groups, g, g * shared + from, to - from);
                    }
                  });
  });
}

}  // namespace LINMU_ISA
}  // namespace linmu
