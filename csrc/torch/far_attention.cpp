#include "../linmu/far_attention.h"

#include "ops.h"
#include "token_rows.h"

namespace linmu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
constexpr const char* kOp = "far_attention";

const int32_t* within(const Tensor& t, const char* name, int64_t least, int64_t most) {
  const int32_t* at = static_cast<const int32_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i)
    LINMU_CHECK(at[i] >= least && at[i] <= most, kOp, ": ", name, " must be in ", least, "..", most, ", got ", at[i]);
  return at;
}

Tensor far_attention(const Tensor& y, const Tensor& lse, const Tensor& rest, const Tensor& q, const Tensor& k,
                     const Tensor& v, const Tensor& steps, const Tensor& entered, const Tensor& when,
                     const Tensor& b_map, const Tensor& c_map, const Tensor& scale, const Tensor& rates,
                     const OptTensor& z_gate, const OptTensor& initial_state, const OptTensor& last,
                     double softmax_scale) {
  const ScalarType type = q.scalar_type(), acc = accumulate_dtype(q);
  FarAttentionParams p{};
  p.dtype = float_dtype(kOp, "q", q);
  Dims d(kOp);
  d("q", q, "B L H P", type);
  d("k", k, "B T G P", type);
  d.divides("k", "G", "H");
  d("v", v, "B T G P", type);
  d("y", y, "B L H P", type);
  p.batch = d["B"], p.length = d["L"], p.total = d["T"], p.heads = d["H"], p.groups = d["G"], p.head_dim = d["P"];
  d.bind("H/G", p.heads / p.groups), d.bind("HP", p.heads * p.head_dim), d.bind("P+1", p.head_dim + 1);
  d("lse", lse, "B L H", acc);
  d("rest", rest, "B L H", acc);
  d("steps", steps, "B T G H/G", acc);
  d("entered", entered, "B G T", ScalarType::Int);
  d("when", when, "B L", ScalarType::Int);
  d("b_map", b_map, "G P N", acc);
  d("c_map", c_map, "H P N", acc);
  d("scale", scale, "H", acc);
  d("rates", rates, "H", acc);
  d("z_gate", z_gate, "B L HP", type);
  d("initial_state", initial_state, "B H P+1 N", acc);
  d("last", last, "B", ScalarType::Int);
  p.state_dim = d["N"];
  LINMU_CHECK(y.is_contiguous(), kOp, ": y must be contiguous");
  LINMU_CHECK(p.total < INT32_MAX && p.length < INT32_MAX, kOp, ": k must be of T < ", INT32_MAX, " tokens, got ",
              p.total);

  Tensor q_ = q, k_ = k, v_ = v;
  const Tensor lse_ = contiguous(lse), rest_ = contiguous(rest), steps_ = contiguous(steps);
  const Tensor entered_ = contiguous(entered), when_ = contiguous(when), b_map_ = contiguous(b_map);
  const Tensor c_map_ = contiguous(c_map), scale_ = contiguous(scale), rates_ = contiguous(rates);
  const OptTensor z_ = linmu::contiguous(z_gate), state_ = linmu::contiguous(initial_state);
  const OptTensor last_ = linmu::contiguous(last);
  p.entered = within(entered_, "entered", -1, p.total), p.when = within(when_, "when", -1, p.total);
  p.last = last_.has_value() ? within(*last_, "last", 0, p.total) : nullptr;
  p.q = rows(q_), p.k = rows(k_), p.v = rows(v_), p.softmax_scale = softmax_scale;
  p.lse = lse_.const_data_ptr(), p.rest = rest_.const_data_ptr(), p.steps = steps_.const_data_ptr();
  p.b_map = b_map_.const_data_ptr(), p.c_map = c_map_.const_data_ptr();
  p.scale = scale_.const_data_ptr(), p.rates = rates_.const_data_ptr();
  p.z_gate = pointer(z_), p.initial_state = pointer(state_);
  Tensor state =
      last.has_value() ? new_empty(q, {p.batch, p.heads, p.head_dim + 1, p.state_dim}, acc) : new_empty(q, {0}, acc);
  p.y = y.mutable_data_ptr();
  p.final_state = last.has_value() ? state.mutable_data_ptr() : nullptr;
  p.threads = torch_threads();
  LINMU_LAUNCH(far_attention, p, q);
  return state;
}

}  // namespace

void register_far_attention(StableLibrary& lib) { lib.impl("far_attention", TORCH_BOX(&far_attention)); }

}  // namespace linmu
