#include "../linmu/causal_conv1d.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// The inputs, checked and contiguous, with the Params that point into them.
struct Inputs {
  Tensor x, weight;
  OptTensor bias, seq_idx, token_order, initial_state;
  CausalConv1dParams p{};

  Inputs(const Tensor& x_, const Tensor& weight_, const OptTensor& bias_, bool silu, const OptTensor& seq_idx_,
         const OptTensor& token_order_, const OptTensor& initial_state_, Dims& d)
      : x(contiguous(x_)),
        weight(contiguous(weight_)),
        bias(linmu::contiguous(bias_)),
        seq_idx(linmu::contiguous(seq_idx_)),
        token_order(linmu::contiguous(token_order_)),
        initial_state(linmu::contiguous(initial_state_)) {
    const ScalarType acc = accumulate_dtype(x);
    p.dtype = float_dtype("causal_conv1d", "x", x);
    d("x", x, "B L D", x.scalar_type());
    d("weight", weight, "D K", acc);
    d("bias", bias, "D", acc);
    LINMU_CHECK(d["K"] >= 1 && d["K"] <= 8, "causal_conv1d: weight must have 1 <= K <= 8, got K=", d["K"]);
    d("seq_idx", seq_idx, "B L", ScalarType::Int);
    d("token_order", token_order, "B L", ScalarType::Int);
    d.bind("K-1", d["K"] - 1);
    d("initial_state", initial_state, "B K-1 D", x.scalar_type());
    check_token_order("causal_conv1d", token_order);
    p.batch = d["B"], p.length = d["L"], p.dim = d["D"], p.width = d["K"], p.silu = silu;
    p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.bias = pointer(bias);
    p.seq_idx = static_cast<const int32_t*>(pointer(seq_idx));
    p.token_order = static_cast<const int32_t*>(pointer(token_order));
    p.initial_state = pointer(initial_state);
    p.threads = torch_threads();
  }
};

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptTensor& bias, bool silu,
                                         const OptTensor& seq_idx, const OptTensor& token_order,
                                         const OptTensor& initial_state, bool return_final_state) {
  Dims d("causal_conv1d");
  Inputs in(x, weight, bias, silu, seq_idx, token_order, initial_state, d);
  CausalConv1dParams& p = in.p;
  Tensor y = new_empty(x, {p.batch, p.length, p.dim});
  Tensor state = return_final_state ? new_empty(x, {p.batch, p.width - 1, p.dim}) : new_empty(x, {0});
  p.y = y.mutable_data_ptr();
  p.final_state = return_final_state ? state.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(causal_conv1d_fwd, p, x);
  return {y, state};
}

std::vector<Tensor> causal_conv1d_bwd(const Tensor& grad_y, const OptTensor& grad_final_state, const Tensor& x,
                                      const Tensor& weight, const OptTensor& bias, bool silu, const OptTensor& seq_idx,
                                      const OptTensor& token_order, const OptTensor& initial_state) {
  Dims d("causal_conv1d");
  const Inputs in(x, weight, bias, silu, seq_idx, token_order, initial_state, d);
  d("grad_y", grad_y, "B L D", x.scalar_type());
  d("grad_final_state", grad_final_state, "B K-1 D", x.scalar_type());
  const CausalConv1dParams& p = in.p;
  const Tensor dy = contiguous(grad_y);
  const OptTensor dstate = linmu::contiguous(grad_final_state);
  Tensor dx = new_empty(x, {p.batch, p.length, p.dim});
  Tensor dweight = new_empty(in.weight, {p.dim, p.width});
  Tensor dbias = bias ? new_empty(in.weight, {p.dim}) : new_empty(x, {0});
  Tensor dinitial = initial_state ? new_empty(x, {p.batch, p.width - 1, p.dim}) : new_empty(x, {0});
  CausalConv1dBwdParams q{};
  q.forward = p;
  q.grad_y = dy.const_data_ptr(), q.grad_final_state = pointer(dstate);
  q.dx = dx.mutable_data_ptr(), q.dweight = dweight.mutable_data_ptr();
  q.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  q.dinitial_state = initial_state ? dinitial.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(causal_conv1d_bwd, q, x);
  return {dx, dweight, dbias, dinitial};
}

}  // namespace

void register_causal_conv1d(StableLibrary& lib) {
  lib.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  lib.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
}

}  // namespace linmu
