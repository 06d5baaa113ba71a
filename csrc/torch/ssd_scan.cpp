#include "../linmu/ssd_scan.h"

#include "ops.h"
#include "scan.h"

namespace linmu {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

// One direction's arguments, as the caller gives them.
struct Direction {
  OptTensor dt, A, B, C, dt_bias, mask, seq_idx;
};

// The arguments the two ops share, checked and kept alive for as long as the Params point into them.
struct Inputs : Kept {
  SsdScanParams p{};
  ScalarType type, acc;
  Tensor x;
  Direction forward, reverse;
  OptTensor D, gate, initial_state;

  void check(Dims& d, const Direction& of, const std::string& prefix) const {
    const auto each = [&](const char* name, const OptTensor& t, const char* axes, ScalarType dtype) {
      d((prefix + name).c_str(), t, axes, dtype);
    };
    each("dt", of.dt, "B L H", acc);
    each("A", of.A, "H", acc);
    each("B", of.B, "B L Gb N", type);
    each("C", of.C, "B L Gc N", type);
    each("dt_bias", of.dt_bias, "H", acc);
    each("mask", of.mask, "B L", ScalarType::Bool);
    each("seq_idx", of.seq_idx, "B L", ScalarType::Int);
  }
  // What is given takes the place of what stands there.
  void point(SsdScanDirection& at, const Direction& given) {
    if (given.dt.has_value()) at.dt = small(given.dt);
    if (given.A.has_value()) at.A = small(given.A);
    if (given.B.has_value()) at.B = strided(*given.B);
    if (given.C.has_value()) at.C = strided(*given.C);
    if (given.dt_bias.has_value()) at.dt_bias = small(given.dt_bias);
    if (given.mask.has_value()) at.mask = static_cast<const uint8_t*>(small(given.mask));
    if (given.seq_idx.has_value()) at.seq_idx = static_cast<const int32_t*>(small(given.seq_idx));
  }
};

// The one list of INPUTS of linmu_ops/ssd_scan.py: the ops' own signatures are made of this one's.
Inputs checked(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D,
               const OptTensor& dt_bias, bool dt_softplus, const std::string& direction, const OptTensor& reverse_dt,
               const OptTensor& reverse_A, const OptTensor& reverse_B, const OptTensor& reverse_C,
               const OptTensor& reverse_dt_bias, const OptTensor& reverse_mask, const OptTensor& reverse_seq_idx,
               const OptTensor& gate, const OptTensor& seq_idx, const OptTensor& token_order,
               const OptTensor& initial_state, bool normalize) {
  Inputs in;
  in.x = x, in.type = x.scalar_type(), in.acc = accumulate_dtype(x);
  in.forward = {dt, A, B, C, dt_bias, std::nullopt, seq_idx};
  in.reverse = {reverse_dt, reverse_A, reverse_B, reverse_C, reverse_dt_bias, reverse_mask, reverse_seq_idx};
  in.D = D, in.gate = gate, in.initial_state = initial_state;
  SsdScanParams& p = in.p;
  p.dtype = float_dtype("ssd_scan", "x", x);
  Dims d("ssd_scan");
  d("x", x, "B L Gx P", in.type);
  in.check(d, in.forward, "");
  in.check(d, in.reverse, "reverse.");
  d("D", D, "H", in.acc);
  p.gate_per_token = gate.has_value() && gate->dim() != 1;
  d("gate", gate, p.gate_per_token ? "B L H" : "H", in.acc);
  d("token_order", token_order, "B L", ScalarType::Int);
  LINMU_CHECK(kNormalizes || !normalize, "ssd_scan: the CUDA kernels do not normalize");
  d.bind("P+1", d["P"] + 1);
  d("initial_state", initial_state, normalize ? "B H P+1 N" : "B H P N", in.acc);
  LINMU_CHECK(d["H"] > 0, "ssd_scan: dt must have at least one head, got H=0");
  d.divides("x", "Gx", "H");
  d.divides("B", "Gb", "H");
  d.divides("C", "Gc", "H");

  p.batch = d["B"], p.length = d["L"], p.heads = d["H"], p.head_dim = d["P"], p.state_dim = d["N"];
  p.groups_x = d["Gx"], p.groups_b = d["Gb"], p.groups_c = d["Gc"];
  p.dt_softplus = dt_softplus;
  p.x = in.strided(x);
  p.normalize = normalize;
  p.D = in.small(D), p.gate = in.small(gate), p.initial_state = in.small(initial_state);
  check_token_order("ssd_scan", token_order);
  p.token_order = static_cast<const int32_t*>(in.small(token_order));
  in.point(p.forward, in.forward);
  p.reverse = p.forward;
  in.point(p.reverse, in.reverse);
  turn_on(p, "ssd_scan", direction);
  p.shared_projections = !reverse_B.has_value() && !reverse_C.has_value();
  p.threads = torch_threads();
  return in;
}

std::tuple<Tensor, Tensor, Tensor> forward(Inputs in, bool return_final_state, bool for_gradient) {
  SsdScanParams& p = in.p;
  p.wide_y = p.normalize && for_gradient;
  const int64_t rows = p.head_dim + p.normalize;
  Tensor y = new_empty(in.x, {p.batch, p.length, p.heads, p.head_dim}, p.wide_y ? in.acc : in.type);
  Tensor mass = p.normalize ? new_empty(in.x, {p.batch, p.length, p.heads}, in.acc) : new_empty(in.x, {0}, in.acc);
  Tensor state = return_final_state ? new_empty(in.x, {p.batch, p.heads, rows, p.state_dim}, in.acc)
                                    : new_empty(in.x, {0}, in.acc);
  p.y = y.mutable_data_ptr();
  p.mass = p.normalize ? mass.mutable_data_ptr() : nullptr;
  p.final_state = return_final_state ? state.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(ssd_scan, p, in.x);
  return {y, mass, state};
}

// In the order of DIFFERENTIABLE in linmu_ops/ssd_scan.py.
std::vector<Tensor> backward(Inputs in, const Tensor& grad_y, const OptTensor& grad_mass,
                             const OptTensor& grad_final_state, const OptTensor& y, const OptTensor& mass) {
  SsdScanBwdParams p{};
  p.scan = in.p;
  Dims d("ssd_scan");
  d("x", in.x, "B L Gx P", in.type);
  d("dt", in.forward.dt, "B L H", in.acc);
  d("B", in.forward.B, "B L Gb N", in.type);
  d("grad_y", grad_y, "B L H P", p.scan.normalize ? in.acc : in.type);
  d.bind("P+1", d["P"] + 1);
  d("grad_final_state", grad_final_state, p.scan.normalize ? "B H P+1 N" : "B H P N", in.acc);
  d("y", y, "B L H P", in.acc);
  d("mass", mass, "B L H", in.acc);
  d("grad_mass", grad_mass, "B L H", in.acc);
  const bool given = y.has_value() && mass.has_value();
  LINMU_CHECK(given == p.scan.normalize, "ssd_scan: y and mass must be given where it normalizes");
  if (given) {
    p.scan.y = const_cast<void*>(in.small(y)), p.scan.mass = const_cast<void*>(in.small(mass));
    p.grad_mass = in.small(grad_mass);
  }
  p.grad_y = in.strided(grad_y);
  p.grad_final_state = in.small(grad_final_state);

  std::vector<Tensor> grads;
  const auto grad = [&](const OptTensor& of, void** out, bool unused = false) {
    if (!of.has_value()) return grads.push_back(new_empty(in.x, {0}));
    grads.push_back(unused ? new_zeros(*of, of->sizes()) : new_empty(*of, of->sizes()));
    if (!unused) *out = grads.back().mutable_data_ptr();
  };
  // `instead`: what runs in place of this direction, where it does not. What has no part in it has a gradient of 0.
  const auto direction = [&](const Direction& of, SsdScanDirectionGrads& out, const Direction& instead) {
    grad(of.dt, &out.dt, instead.dt.has_value());
    grad(of.A, &out.A, instead.A.has_value());
    grad(of.B, &out.B, instead.B.has_value());
    grad(of.C, &out.C, instead.C.has_value());
    grad(of.dt_bias, &out.dt_bias, instead.dt_bias.has_value());
  };
  const bool only_reverse = !in.p.forward.on;
  grad(in.x, &p.x);
  direction(in.forward, only_reverse ? p.reverse : p.forward, only_reverse ? in.reverse : Direction{});
  direction(in.reverse, p.reverse, {});
  grad(in.D, &p.D);
  grad(in.gate, &p.gate);
  grad(in.initial_state, &p.initial_state);
  LINMU_LAUNCH(ssd_scan_bwd, p, in.x);
  return grads;
}

using Forward = ForwardOp<checked, forward>;
using Backward = BackwardOp<checked, backward>;

}  // namespace

void register_ssd_scan(StableLibrary& lib) {
  lib.impl("ssd_scan", TORCH_BOX(&Forward::call));
  lib.impl("ssd_scan_bwd", TORCH_BOX(&Backward::call));
}

}  // namespace linmu
