#include "../linmu/exact_step.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

std::tuple<Tensor, Tensor> exact_step(const Tensor& keys, const Tensor& values, const Tensor& steps,
                                      const OptTensor& sinks, const Tensor& seen, const Tensor& ssm, const Tensor& q,
                                      const Tensor& k, const Tensor& v, const Tensor& dt, const Tensor& dt_bias,
                                      const Tensor& rest, const Tensor& c_map, const Tensor& scale,
                                      const OptTensor& cos, const OptTensor& sin, const OptTensor& z_gate,
                                      const OptTensor& real, int64_t window, double softmax_scale, bool interleaved,
                                      bool nothing_beyond, int64_t far_limit) {
  const ScalarType type = q.scalar_type(), acc = accumulate_dtype(q);
  ExactStepParams p{};
  p.dtype = float_dtype("exact_step", "q", q);
  Dims d("exact_step");
  d("q", q, "B H P", type);
  d("k", k, "B G P", type);
  d.divides("k", "G", "H");
  d("v", v, "B G P", type);
  d("keys", keys, "B G n P", type);
  d("values", values, "B G n P", type);
  p.batch = d["B"], p.heads = d["H"], p.groups = d["G"], p.head_dim = d["P"];
  d.bind("H/G", p.heads / p.groups), d.bind("HP", p.heads * p.head_dim), d.bind("P+1", p.head_dim + 1);
  d("sinks", sinks, "B s", ScalarType::Bool);
  p.sinks = sinks.has_value() ? d["s"] : 0;
  d.bind("n-s", d["n"] - p.sinks);
  d("steps", steps, "B G n-s H/G", acc);
  d("seen", seen, "B", ScalarType::Long);
  d("ssm", ssm, "B H P+1 N", acc);
  d("dt", dt, "B H", acc);
  d("dt_bias", dt_bias, "H", acc);
  d("rest", rest, "B H", acc);
  p.wide_map = c_map.scalar_type() != type;
  d("c_map", c_map, "H P N", p.wide_map ? acc : type);
  d("scale", scale, "H", acc);
  d("z_gate", z_gate, "B HP", type);
  d("real", real, "B", ScalarType::Bool);
  p.state_dim = d["N"];
  LINMU_CHECK(cos.has_value() == sin.has_value(), "exact_step: cos must be given with sin, got one of them");
  if (cos.has_value()) {
    d.bind("1", 1);
    const bool one = cos->dim() == 2 && cos->size(0) == 1;
    d("cos", cos, one ? "1 R" : "B R", acc);
    d("sin", sin, one ? "1 R" : "B R", acc);
    p.rotary = d["R"], p.rotary_rows = one ? 1 : p.batch;
    LINMU_CHECK(p.rotary % 2 == 0 && p.rotary <= p.head_dim, "exact_step: cos must be of even R <= P=", p.head_dim,
                ", got R=", p.rotary);
  }
  // Compared before it is added to: it may be as large as an integer can be.
  LINMU_CHECK(window >= 1, "exact_step: window must be >= 1, got ", window);
  p.window = window;
  const bool fits = window <= d["n"] && p.sinks + p.ring() <= d["n"];
  LINMU_CHECK(fits, "exact_step: keys must be of n >= s + window + min(window, ", kLeave, ") places, got ", d["n"]);
  p.kept = d["n"] - p.sinks - p.ring();
  LINMU_CHECK(keys.is_contiguous(), "exact_step: keys must be contiguous");
  LINMU_CHECK(values.is_contiguous(), "exact_step: values must be contiguous");
  LINMU_CHECK(steps.is_contiguous(), "exact_step: steps must be contiguous");
  LINMU_CHECK(seen.is_contiguous(), "exact_step: seen must be contiguous");
  LINMU_CHECK(!sinks.has_value() || sinks->is_contiguous(), "exact_step: sinks must be contiguous");

  p.seen = static_cast<int64_t*>(seen.mutable_data_ptr());
  for (int64_t b = 0; b < p.batch; ++b)
    LINMU_CHECK(p.seen[b] >= 0 && p.seen[b] < kMostSeen, "exact_step: seen must be from 0 to 2**62 - 1, got ",
                p.seen[b]);
  p.softmax_scale = softmax_scale, p.interleaved = interleaved, p.nothing_beyond = nothing_beyond;
  LINMU_CHECK(far_limit >= 1, "exact_step: far_limit must be >= 1, got ", far_limit);
  p.far_limit = far_limit;
  const Tensor ssm_ = contiguous(ssm), q_ = contiguous(q), k_ = contiguous(k), v_ = contiguous(v);
  const Tensor dt_ = contiguous(dt), bias_ = contiguous(dt_bias), rest_ = contiguous(rest);
  const Tensor map_ = contiguous(c_map), scale_ = contiguous(scale);
  const OptTensor cos_ = linmu::contiguous(cos), sin_ = linmu::contiguous(sin), z_ = linmu::contiguous(z_gate);
  const OptTensor real_ = linmu::contiguous(real);
  p.keys = keys.mutable_data_ptr(), p.values = values.mutable_data_ptr(), p.steps = steps.mutable_data_ptr();
  p.there = sinks.has_value() ? static_cast<uint8_t*>(sinks->mutable_data_ptr()) : nullptr;
  p.ssm = ssm_.const_data_ptr(), p.q = q_.const_data_ptr(), p.k = k_.const_data_ptr(), p.v = v_.const_data_ptr();
  p.dt = dt_.const_data_ptr(), p.dt_bias = bias_.const_data_ptr(), p.rest = rest_.const_data_ptr();
  p.c_map = map_.const_data_ptr(), p.scale = scale_.const_data_ptr();
  p.cos = pointer(cos_), p.sin = pointer(sin_), p.z_gate = pointer(z_);
  p.real = static_cast<const uint8_t*>(pointer(real_));
  Tensor y = new_empty(q, {p.batch, p.heads * p.head_dim});
  Tensor due = new_empty(q, {p.batch}, ScalarType::Bool);
  p.y = y.mutable_data_ptr(), p.due = static_cast<uint8_t*>(due.mutable_data_ptr());
  p.threads = torch_threads();
  LINMU_LAUNCH(exact_step, p, q);
  return {y, due};
}

}  // namespace

void register_exact_step(StableLibrary& lib) { lib.impl("exact_step", TORCH_BOX(&exact_step)); }

}  // namespace linmu
