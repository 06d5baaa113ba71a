#include "../linmu/causal_conv1d_step.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::contiguous;

Tensor causal_conv1d_step(const Tensor& state, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                          bool silu) {
  const ScalarType type = x.scalar_type(), acc = accumulate_dtype(x);
  CausalConv1dStepParams p{};
  p.dtype = float_dtype("causal_conv1d_step", "x", x);
  Dims d("causal_conv1d_step");
  d("x", x, "B D", type);
  d("weight", weight, "D K", acc);
  d("bias", bias, "D", acc);
  LINMU_CHECK(d["K"] >= 1 && d["K"] <= 8, "causal_conv1d_step: weight must have 1 <= K <= 8, got K=", d["K"]);
  d("state", state, "B n D", type);
  LINMU_CHECK(d["n"] >= d["K"] - 1, "causal_conv1d_step: state must hold n >= ", d["K"] - 1, " inputs, got ", d["n"]);
  p.older = d["n"] - (d["K"] - 1), p.by_channel = !state.is_contiguous();
  LINMU_CHECK(!p.by_channel || torch::stable::transpose(state, 1, 2).is_contiguous(),
              "causal_conv1d_step: state must be contiguous, as it is or with channels before inputs");
  LINMU_CHECK(kStepsAnyState || (p.older == 0 && !p.by_channel),
              "causal_conv1d_step: state must be contiguous, of K-1 inputs, on CUDA");

  p.batch = d["B"], p.dim = d["D"], p.width = d["K"], p.silu = silu;
  const Tensor x_ = contiguous(x), weight_ = contiguous(weight);
  const OptTensor bias_ = linmu::contiguous(bias);
  Tensor y = torch::stable::new_empty(x, {p.batch, p.dim});
  p.state = state.mutable_data_ptr();
  p.x = x_.const_data_ptr(), p.weight = weight_.const_data_ptr(), p.bias = pointer(bias_);
  p.y = y.mutable_data_ptr();
  p.threads = torch_threads();
  LINMU_LAUNCH(causal_conv1d_step, p, x);
  return y;
}

}  // namespace

void register_causal_conv1d_step(StableLibrary& lib) { lib.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step)); }

}  // namespace linmu
