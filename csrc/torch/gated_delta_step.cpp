#include "../linmu/gated_delta_step.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::contiguous;

Tensor gated_delta_step(const Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                        const Tensor& beta, double scale, bool use_qk_l2norm_in_kernel) {
  const ScalarType type = q.scalar_type(), acc = accumulate_dtype(q);
  GatedDeltaStepParams p{};
  p.dtype = float_dtype("gated_delta_step", "q", q);
  Dims d("gated_delta_step");
  d("q", q, "B Gq K", type);
  d("g", g, "B H", acc);
  d("k", k, "B Gk K", type);
  d("v", v, "B Gv V", type);
  d("state", state, "B H K V", acc);
  d("beta", beta, "B H", acc);
  d.divides("q", "Gq", "H");
  d.divides("k", "Gk", "H");
  d.divides("v", "Gv", "H");
  LINMU_CHECK(state.is_contiguous(), "gated_delta_step: state must be contiguous");

  p.batch = d["B"], p.heads = d["H"], p.key_dim = d["K"], p.value_dim = d["V"];
  p.groups_q = d["Gq"], p.groups_k = d["Gk"], p.groups_v = d["Gv"];
  p.scale = scale, p.normalize = use_qk_l2norm_in_kernel;
  const Tensor q_ = contiguous(q), k_ = contiguous(k), v_ = contiguous(v), g_ = contiguous(g), b_ = contiguous(beta);
  Tensor y = torch::stable::new_empty(q, {p.batch, p.heads, p.value_dim});
  p.state = state.mutable_data_ptr();
  p.q = q_.const_data_ptr(), p.k = k_.const_data_ptr(), p.v = v_.const_data_ptr();
  p.g = g_.const_data_ptr(), p.beta = b_.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.threads = torch_threads();
  LINMU_LAUNCH(gated_delta_step, p, q);
  return y;
}

}  // namespace

void register_gated_delta_step(StableLibrary& lib) { lib.impl("gated_delta_step", TORCH_BOX(&gated_delta_step)); }

}  // namespace linmu
