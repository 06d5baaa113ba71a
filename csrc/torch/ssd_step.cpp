#include "../linmu/ssd_step.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::contiguous;

std::tuple<Tensor, Tensor> ssd_step(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A,
                                    const Tensor& B, const Tensor& C, const OptTensor& D, const OptTensor& dt_bias,
                                    bool dt_softplus, bool normalize) {
  const ScalarType type = x.scalar_type(), acc = accumulate_dtype(x);
  SsdStepParams p{};
  p.dtype = float_dtype("ssd_step", "x", x);
  Dims d("ssd_step");
  d("x", x, "B Gx P", type);
  d("dt", dt, "B H", acc);
  LINMU_CHECK(kNormalizes || !normalize, "ssd_step: the CUDA kernels do not normalize");
  d.bind("P+1", d["P"] + 1);
  d("state", state, normalize ? "B H P+1 N" : "B H P N", acc);
  d("A", A, "H", acc);
  d("B", B, "B Gb N", type);
  d("C", C, "B Gc N", type);
  d("D", D, "H", acc);
  d("dt_bias", dt_bias, "H", acc);
  d.divides("x", "Gx", "H");
  d.divides("B", "Gb", "H");
  d.divides("C", "Gc", "H");
  LINMU_CHECK(state.is_contiguous(), "ssd_step: state must be contiguous");

  p.batch = d["B"], p.heads = d["H"], p.head_dim = d["P"], p.state_dim = d["N"];
  p.groups_x = d["Gx"], p.groups_b = d["Gb"], p.groups_c = d["Gc"];
  p.dt_softplus = dt_softplus, p.normalize = normalize;
  const Tensor x_ = contiguous(x), dt_ = contiguous(dt), A_ = contiguous(A), B_ = contiguous(B), C_ = contiguous(C);
  const OptTensor D_ = linmu::contiguous(D), bias_ = linmu::contiguous(dt_bias);
  Tensor y = torch::stable::new_empty(x, {p.batch, p.heads, p.head_dim});
  Tensor log_mass =
      normalize ? torch::stable::new_empty(x, {p.batch, p.heads}, acc) : torch::stable::new_empty(x, {0}, acc);
  p.log_mass = normalize ? log_mass.mutable_data_ptr() : nullptr;
  p.state = state.mutable_data_ptr();
  p.x = x_.const_data_ptr(), p.dt = dt_.const_data_ptr(), p.A = A_.const_data_ptr();
  p.B = B_.const_data_ptr(), p.C = C_.const_data_ptr(), p.D = pointer(D_), p.dt_bias = pointer(bias_);
  p.y = y.mutable_data_ptr();
  p.threads = torch_threads();
  LINMU_LAUNCH(ssd_step, p, x);
  return {y, log_mass};
}

}  // namespace

void register_ssd_step(StableLibrary& lib) { lib.impl("ssd_step", TORCH_BOX(&ssd_step)); }

}  // namespace linmu
