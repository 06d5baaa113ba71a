#include "../linmu/gated_norm.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// The inputs, checked, with the Params that point into them. A gate is often a part of a projection: rows keep their
// strides.
struct Inputs {
  Tensor x, z;
  OptTensor weight;
  GatedNormParams p{};

  Inputs(const Tensor& x_, const Tensor& z_, const OptTensor& weight_, int64_t group_size, bool norm_before_gate,
         double eps, Dims& d)
      : x(rows(x_)), z(rows(z_)), weight(linmu::contiguous(weight_)) {
    p.dtype = float_dtype("gated_norm", "x", x);
    d("x", x, "B L D", x.scalar_type());
    d("z", z, "B L D", x.scalar_type());
    d("weight", weight, "D", accumulate_dtype(x));
    p.batch = d["B"], p.length = d["L"], p.dim = d["D"], p.group_size = group_size;
    LINMU_CHECK(group_size >= 1 && p.dim % group_size == 0, "gated_norm: group_size must divide D=", p.dim, ", got ",
                group_size);
    p.norm_before_gate = norm_before_gate, p.eps = eps;
    p.x = at(x), p.z = at(z);
    p.weight = pointer(weight);
    p.threads = torch_threads();
  }

  static Tensor rows(const Tensor& t) { return t.dim() == 3 && t.size(2) > 1 && t.stride(2) != 1 ? contiguous(t) : t; }
  static GatedNormTensor at(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
};

Tensor gated_norm(const Tensor& x, const Tensor& z, const OptTensor& weight, int64_t group_size, bool norm_before_gate,
                  double eps) {
  Dims d("gated_norm");
  Inputs in(x, z, weight, group_size, norm_before_gate, eps, d);
  Tensor out = new_empty(x, {d["B"], d["L"], d["D"]});
  in.p.out = out.mutable_data_ptr();
  LINMU_LAUNCH(gated_norm_fwd, in.p, x);
  return out;
}

std::vector<Tensor> gated_norm_bwd(const Tensor& grad_out, const Tensor& x, const Tensor& z, const OptTensor& weight,
                                   int64_t group_size, bool norm_before_gate, double eps) {
  Dims d("gated_norm");
  const Inputs in(x, z, weight, group_size, norm_before_gate, eps, d);
  d("grad_out", grad_out, "B L D", x.scalar_type());
  const Tensor dy = Inputs::rows(grad_out);
  Tensor dx = new_empty(x, {d["B"], d["L"], d["D"]}), dz = new_empty(x, {d["B"], d["L"], d["D"]});
  Tensor dweight = weight ? new_empty(*in.weight, {d["D"]}) : new_empty(x, {0});
  GatedNormBwdParams q{};
  q.forward = in.p;
  q.grad_out = Inputs::at(dy);
  q.dx = dx.mutable_data_ptr(), q.dz = dz.mutable_data_ptr();
  q.dweight = weight ? dweight.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(gated_norm_bwd, q, x);
  return {dx, dz, dweight};
}

}  // namespace

void register_gated_norm(StableLibrary& lib) {
  lib.impl("gated_norm", TORCH_BOX(&gated_norm));
  lib.impl("gated_norm_bwd", TORCH_BOX(&gated_norm_bwd));
}

}  // namespace linmu
