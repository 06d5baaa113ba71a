#include "../linmu/branch_mix_norm.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// The inputs, checked and contiguous, with the Params that point into them.
struct Inputs {
  Tensor a, b, mix;
  OptTensor mask, weight, bias;
  BranchMixNormParams p{};

  Inputs(const Tensor& a_, const Tensor& b_, const Tensor& mix_, const OptTensor& mask_, const OptTensor& weight_,
         const OptTensor& bias_, const std::string& norm, double eps, Dims& d)
      : a(contiguous(a_)),
        b(contiguous(b_)),
        mix(contiguous(mix_)),
        mask(linmu::contiguous(mask_)),
        weight(linmu::contiguous(weight_)),
        bias(linmu::contiguous(bias_)) {
    const ScalarType type = a.scalar_type(), acc = accumulate_dtype(a);
    p.dtype = float_dtype("branch_mix_norm", "a", a);
    d("a", a, "B L D", type);
    d("b", b, "B L D", type);
    p.mix_by = mix.dim() == 2 ? MixBy::token : mix.dim() == 1 && mix.size(0) == 1 ? MixBy::scalar : MixBy::channel;
    d("mix", mix, p.mix_by == MixBy::token ? "B L" : p.mix_by == MixBy::scalar ? "1" : "D", acc);
    d("mask", mask, "B L", ScalarType::Bool);
    d("weight", weight, "D", acc);
    d("bias", bias, "D", acc);
    LINMU_CHECK(norm == "layer" || norm == "rms" || norm == "none",
                "branch_mix_norm: norm must be one of layer, rms, none, got '", norm, "'");
    p.norm = norm == "layer" ? Norm::layer : norm == "rms" ? Norm::rms : Norm::none;
    p.rows = d["B"] * d["L"], p.dim = d["D"], p.eps = eps;
    p.a = a.const_data_ptr(), p.b = b.const_data_ptr(), p.mix = mix.const_data_ptr();
    p.mask = static_cast<const bool*>(pointer(mask));
    p.weight = pointer(weight), p.bias = pointer(bias);
    p.threads = torch_threads();
  }
};

Tensor branch_mix_norm(const Tensor& a, const Tensor& b, const Tensor& mix, const OptTensor& mask,
                       const OptTensor& weight, const OptTensor& bias, std::string norm, double eps) {
  Dims d("branch_mix_norm");
  Inputs in(a, b, mix, mask, weight, bias, norm, eps, d);
  Tensor out = new_empty(a, {d["B"], d["L"], d["D"]});
  in.p.out = out.mutable_data_ptr();
  LINMU_LAUNCH(branch_mix_norm_fwd, in.p, a);
  return out;
}

std::vector<Tensor> branch_mix_norm_bwd(const Tensor& grad_out, const Tensor& a, const Tensor& b, const Tensor& mix,
                                        const OptTensor& mask, const OptTensor& weight, const OptTensor& bias,
                                        std::string norm, double eps) {
  Dims d("branch_mix_norm");
  const Inputs in(a, b, mix, mask, weight, bias, norm, eps, d);
  d("grad_out", grad_out, "B L D", a.scalar_type());
  const Tensor dy = contiguous(grad_out);
  Tensor da = new_empty(a, {d["B"], d["L"], d["D"]}), db = new_empty(a, {d["B"], d["L"], d["D"]});
  Tensor dmix = in.p.mix_by == MixBy::token ? new_empty(in.mix, {d["B"], d["L"]}) : new_empty(in.mix, {mix.size(0)});
  Tensor dweight = weight ? new_empty(*in.weight, {d["D"]}) : new_empty(a, {0});
  Tensor dbias = bias ? new_empty(*in.bias, {d["D"]}) : new_empty(a, {0});
  BranchMixNormBwdParams q{};
  q.forward = in.p;
  q.grad_out = dy.const_data_ptr();
  q.da = da.mutable_data_ptr(), q.db = db.mutable_data_ptr(), q.dmix = dmix.mutable_data_ptr();
  q.dweight = weight ? dweight.mutable_data_ptr() : nullptr;
  q.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(branch_mix_norm_bwd, q, a);
  return {da, db, dmix, dweight, dbias};
}

}  // namespace

void register_branch_mix_norm(StableLibrary& lib) {
  lib.impl("branch_mix_norm", TORCH_BOX(&branch_mix_norm));
  lib.impl("branch_mix_norm_bwd", TORCH_BOX(&branch_mix_norm_bwd));
}

}  // namespace linmu
