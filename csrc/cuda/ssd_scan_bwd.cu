// The gradient of the scan: what runs, in which order. See ssd_scan_gradients.cuh.
#include <algorithm>
#include <vector>

#include "ssd_scan_gradients.cuh"

namespace linmu {
namespace {

// The heads of each group, summed in order, for the plan's visits: to (B, L, groups, size).
template <class T>
__global__ void __launch_bounds__(256)
    sum_heads_kernel(const __grid_constant__ ScanPlan s, const float* from, T* to, int64_t groups, int64_t size) {
  const int64_t at = blockIdx.x * int64_t{256} + threadIdx.x, visits = s.chunks * s.chunk;
  const int64_t visit = at / size / groups, per = s.p.heads / groups;
  if (visit >= s.p.batch * visits) return;
  const int token = s.tokens[visit];
  if (token < 0) return;
  const float* first = from + at / size * per * size + at % size;
  float sum = 0;
  for (int64_t k = 0; k < per; ++k) sum += first[k * size];
  to[((visit / visits * s.p.length + token) * groups + at / size % groups) * size + at % size] = from_float<T>(sum);
}

template <class T>
int64_t shared_bytes(int chunk, const Gradients& o) {
  return GradientTiles::of<T>(chunk, o.head_dim, o.state_dim, o.state_columns, o.value_columns).bytes;
}
static_assert(GradientTiles::of<bf16>(64, 128, 128, 32, 64).bytes <= kSharedSm80);
static_assert(GradientTiles::of<bf16>(32, 256, 256, 16, 32).bytes <= kSharedSm80);
static_assert(GradientTiles::of<float>(32, 128, 128, 32, 64).bytes <= kSharedSm80);
static_assert(GradientTiles::of<float>(32, 256, 256, 16, 32).bytes <= kSharedSm90);

// The largest tiles that fit the shared memory of sm_80; failing that, all that this GPU has.
template <class T>
int fit(const SsdScanParams& p, Gradients& o) {
  o.head_dim = round_to(std::max<int64_t>(p.head_dim, 1), 32);
  o.state_dim = round_to(std::max<int64_t>(p.state_dim, 1), 32);
  const int wanted = round_to(std::clamp<int64_t>(std::min(p.chunk > 0 ? p.chunk : 64, p.length), 1, 64), 32);
  const int64_t most = shared_limit();
  for (const int64_t limit : {std::min(kSharedSm80, most), most})
    for (int chunk = wanted; chunk >= 32; chunk -= 32)
      for (const int columns : {32, 16}) {
        o.state_columns = columns, o.value_columns = columns * 2;
        if (shared_bytes<T>(chunk, o) <= limit) return chunk;
      }
  check_shared("ssd_scan_bwd", shared_bytes<T>(32, o), most);
  return 32;
}

// The same memory for each of several pieces of work, which ask for as much in the same order.
class Reused {
 public:
  explicit Reused(const CudaContext& from) : from_(from) {
    context.stream = from.stream;
    context.allocate = [this](int64_t bytes) {
      if (next_ == blocks_.size()) blocks_.push_back({nullptr, -1});
      Block& block = blocks_[next_++];
      if (block.bytes < bytes) block = {from_.allocate(bytes), bytes};
      return block.data;
    };
  }
  Reused(const Reused&) = delete;
  void again() { next_ = 0; }

  CudaContext context;

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  const CudaContext& from_;
  std::vector<Block> blocks_;
  size_t next_ = 0;
};

// The states of all chunks are too much memory for long sequences: the row's chunks are worked through in ranges. What
// h and g are where each range begins comes from walks of their own.
template <class T>
class Backward {
 public:
  Backward(const SsdScanBwdParams& gradients, const CudaContext& context)
      : g(gradients), p(gradients.scan), outer(context), work(context) {
    p.final_state = nullptr;
    o.separate = p.forward.on && p.reverse.on && !p.shared_projections;
    chunk = fit<T>(p, o);
    chunks = ceil_div(p.length, chunk), size = p.head_dim * p.state_dim;
    const int64_t directions = p.forward.on && p.reverse.on ? 2 : 1, columns = p.head_dim + 4 * p.state_dim;
    const int64_t visit = directions * static_cast<int64_t>(sizeof(Visit) + sizeof(VisitSums) + 8) + columns * 4;
    const int64_t per_chunk = p.batch * p.heads * (directions * size * 8 + chunk * visit);
    range = std::clamp<int64_t>(workspace_limit() / std::max<int64_t>(per_chunk, 1), 1, std::max<int64_t>(chunks, 1));
    ranges = std::max<int64_t>(ceil_div(chunks, range), 1);
    o.dy = g.grad_y;
    o.fast_x = fast_rows(p.x, p.head_dim, p.dtype), o.fast_dy = fast_rows(g.grad_y, p.head_dim, p.dtype);
  }

  void run() {
    for (int d = 0; d < 2; ++d) {
      const SsdScanDirection& of = d ? p.reverse : p.forward;
      if (!of.on) continue;
      o.fast_b[d] = fast_rows(of.B, p.state_dim, p.dtype), o.fast_c[d] = fast_rows(of.C, p.state_dim, p.dtype);
      const bool owner = d == 0 || !p.forward.on;  // of the caller's initial and final state
      for (int adjoint = 0; adjoint < 2; ++adjoint) {
        starts[d][adjoint].assign(ranges, nullptr);
        for (float*& start : starts[d][adjoint])
          if (ranges > 1) start = allocate<float>(outer, p.batch * p.heads * size);
        const void* given = !owner ? nullptr : adjoint ? g.grad_final_state : p.initial_state;
        starts[d][adjoint][upwards(d, adjoint) ? 0 : ranges - 1] = static_cast<float*>(const_cast<void*>(given));
      }
    }
    if (ranges > 1) find_starts();
    totals = allocate<Totals>(outer, p.batch * chunks * p.heads);
    for (int64_t k = 0; k < ranges; ++k) run_range(k);
    head_gradients(g, totals, chunks, outer);
  }

 private:
  // Whether a walk goes from the first range to the last.
  static bool upwards(int d, int adjoint) { return d == adjoint; }

  ScanPlan plan(int64_t k) {
    work.again();
    return plan_scan(p, chunk, k * range, std::min(range, chunks - k * range), work.context);
  }
  Walk walk(const ScanPlan& s, int d, int adjoint, int64_t k) const {
    const SsdScanDirection& of = s.direction(d);
    Walk w{};
    w.rows = adjoint ? g.grad_y : p.x, w.row_groups = adjoint ? p.heads : p.groups_x;
    w.columns = adjoint ? of.C : of.B, w.column_groups = adjoint ? p.groups_c : p.groups_b;
    w.fast_rows = adjoint ? o.fast_dy : o.fast_x, w.fast_columns = adjoint ? o.fast_c[d] : o.fast_b[d];
    w.direction = d, w.adjoint = adjoint, w.wide = w.exact = true;
    w.initial = starts[d][adjoint][k];
    return w;
  }

  void find_starts() {
    for (const bool up : {true, false})
      for (int64_t step = 0; step + 1 < ranges; ++step) {
        const int64_t k = up ? step : ranges - 1 - step;
        const ScanPlan s = plan(k);
        Walk walks[2];
        int count = 0;
        for (int d = 0; d < 2; ++d)
          for (int adjoint = 0; adjoint < 2; ++adjoint) {
            if (!s.direction(d).on || upwards(d, adjoint) != up) continue;
            walks[count] = walk(s, d, adjoint, k);
            walks[count++].leaving = starts[d][adjoint][up ? k + 1 : k - 1];
          }
        walk_states(s, walks, count, work.context);
      }
  }

  void run_range(int64_t k) {
    const ScanPlan s = plan(k);
    const int64_t states = p.batch * p.heads * s.chunks;
    for (int d = 0; d < 2; ++d) {
      if (!s.direction(d).on) continue;
      Walk walks[2];
      for (int adjoint = 0; adjoint < 2; ++adjoint) {
        walks[adjoint] = walk(s, d, adjoint, k);
        walks[adjoint].entering = allocate<float>(work.context, states * size);
      }
      if ((d == 0 || !p.forward.on) && k == (upwards(d, 1) ? ranges - 1 : 0))
        walks[1].leaving = static_cast<float*>(g.initial_state);
      o.entering[d] = static_cast<const float*>(walks[0].entering);
      o.leaving[d] = static_cast<const float*>(walks[1].entering);
      walk_states(s, walks, 2, work.context);
      for (int of = 0; of < 2 && std::is_same_v<T, half16>; ++of)
        o.scale[of][d] = narrow_states(s, static_cast<const float*>(walks[of].entering), nullptr, work.context);
      o.sums[d] = allocate<VisitSums>(work.context, states * s.chunk);
      o.through[d] = allocate<double>(work.context, states);
    }
    // Gradients of one head per group, made in one pass, are stored as they are; others per head, and then summed.
    struct Shared {
      PerHead from;
      void* to;
      int64_t groups, size;
    } shared[5];
    int sums = 0;
    const auto per_head = [&](void* to, int64_t groups, int64_t columns, bool once) {
      if (groups == p.heads && once) return PerHead{to, false};
      const PerHead partial{allocate<float>(work.context, states * s.chunk * columns), true};
      shared[sums++] = {partial, to, groups, columns};
      return partial;
    };
    const SsdScanDirectionGrads& main = p.forward.on ? g.forward : g.reverse;
    o.x = per_head(g.x, p.groups_x, p.head_dim, !o.separate);
    const int first = p.forward.on ? 0 : 1;
    o.B[first] = per_head(main.B, p.groups_b, p.state_dim, !o.separate || g.reverse.B);
    o.C[first] = per_head(main.C, p.groups_c, p.state_dim, !o.separate || g.reverse.C);
    if (o.separate) {
      o.B[1] = g.reverse.B ? per_head(g.reverse.B, p.groups_b, p.state_dim, true) : o.B[0];
      o.C[1] = g.reverse.C ? per_head(g.reverse.C, p.groups_c, p.state_dim, true) : o.C[0];
    }
    launch("ssd_scan_bwd", gradients_kernel<T>, blocks_of(states), kThreads, shared_bytes<T>(s.chunk, o), outer, s, o);
    for (int i = 0; i < sums; ++i) {
      const int64_t values = p.batch * s.chunks * s.chunk * shared[i].groups * shared[i].size;
      launch("ssd_scan_bwd", sum_heads_kernel<T>, blocks_of(ceil_div(values, 256)), 256, 0, outer, s,
             static_cast<const float*>(shared[i].from.data), static_cast<T*>(shared[i].to), shared[i].groups,
             shared[i].size);
    }
    visit_gradients(g, s, o.sums, o.through, totals, chunks, outer);
  }

  const SsdScanBwdParams& g;
  SsdScanParams p;
  const CudaContext& outer;
  Reused work;
  Gradients o{};
  int chunk;
  int64_t chunks, size, range, ranges;  // chunks per row, numbers per state, chunks per range, ranges
  std::vector<float*> starts[2][2];     // per direction, of h and of g: where each range begins
  Totals* totals;
};

}  // namespace

void ssd_scan_bwd_cuda(const SsdScanBwdParams& g, const CudaContext& context) {
  dispatch_cuda("ssd_scan_bwd", g.scan.dtype,
                [&](auto* t) { Backward<std::remove_pointer_t<decltype(t)>>(g, context).run(); });
}

}  // namespace linmu
