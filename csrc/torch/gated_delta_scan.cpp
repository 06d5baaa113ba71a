#include "../linmu/gated_delta_scan.h"

#include "ops.h"
#include "scan.h"

namespace linmu {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;
constexpr const char* kOp = "gated_delta_scan";

// One direction's arguments, as the caller gives them.
struct Direction {
  OptTensor q, k, g, beta, mask, seq_idx;
};

// The arguments the two ops share, checked and kept alive for as long as the Params point into them.
struct Inputs : Kept {
  GatedDeltaScanParams p{};
  ScalarType type, acc;
  Tensor v;
  Direction forward, reverse;
  OptTensor gate, initial_state;

  void check(Dims& d, const Direction& of, const std::string& prefix) const {
    const auto each = [&](const char* name, const OptTensor& t, const char* axes, ScalarType dtype) {
      d((prefix + name).c_str(), t, axes, dtype);
    };
    each("q", of.q, "B L Gq K", type);
    each("k", of.k, "B L Gk K", type);
    each("g", of.g, "B L H", acc);
    each("beta", of.beta, "B L H", acc);
    each("mask", of.mask, "B L", ScalarType::Bool);
    each("seq_idx", of.seq_idx, "B L", ScalarType::Int);
  }
  // What is given takes the place of what stands there.
  void point(GatedDeltaDirection& at, const Direction& given) {
    if (given.q.has_value()) at.q = strided(*given.q);
    if (given.k.has_value()) at.k = strided(*given.k);
    if (given.g.has_value()) at.g = small(given.g);
    if (given.beta.has_value()) at.beta = small(given.beta);
    if (given.mask.has_value()) at.mask = static_cast<const uint8_t*>(small(given.mask));
    if (given.seq_idx.has_value()) at.seq_idx = static_cast<const int32_t*>(small(given.seq_idx));
  }
};

// The one list of INPUTS of linmu_ops/gated_delta_scan.py: the ops' own signatures are made of this one's.
Inputs checked(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta, double scale,
               bool use_qk_l2norm_in_kernel, const std::string& direction, const OptTensor& reverse_q,
               const OptTensor& reverse_k, const OptTensor& reverse_g, const OptTensor& reverse_beta,
               const OptTensor& reverse_mask, const OptTensor& reverse_seq_idx, const OptTensor& gate,
               const OptTensor& seq_idx, const OptTensor& token_order, const OptTensor& initial_state) {
  Inputs in;
  in.v = v, in.type = q.scalar_type(), in.acc = accumulate_dtype(q);
  in.forward = {q, k, g, beta, std::nullopt, seq_idx};
  in.reverse = {reverse_q, reverse_k, reverse_g, reverse_beta, reverse_mask, reverse_seq_idx};
  in.gate = gate, in.initial_state = initial_state;
  GatedDeltaScanParams& p = in.p;
  p.dtype = float_dtype(kOp, "q", q);
  Dims d(kOp);
  in.check(d, in.forward, "");
  d("v", v, "B L Gv V", in.type);
  in.check(d, in.reverse, "reverse.");
  p.gate_per_token = gate.has_value() && gate->dim() != 1;
  d("gate", gate, p.gate_per_token ? "B L H" : "H", in.acc);
  d("token_order", token_order, "B L", ScalarType::Int);
  d("initial_state", initial_state, "B H K V", in.acc);
  LINMU_CHECK(d["H"] > 0, kOp, ": g must have at least one head, got H=0");
  d.divides("q", "Gq", "H");
  d.divides("k", "Gk", "H");
  d.divides("v", "Gv", "H");

  p.batch = d["B"], p.length = d["L"], p.heads = d["H"], p.key_dim = d["K"], p.value_dim = d["V"];
  p.groups_q = d["Gq"], p.groups_k = d["Gk"], p.groups_v = d["Gv"];
  p.scale = scale, p.normalize = use_qk_l2norm_in_kernel;
  p.v = in.strided(v);
  p.gate = in.small(gate), p.initial_state = in.small(initial_state);
  check_token_order(kOp, token_order);
  p.token_order = static_cast<const int32_t*>(in.small(token_order));
  in.point(p.forward, in.forward);
  p.reverse = p.forward;
  in.point(p.reverse, in.reverse);
  turn_on(p, kOp, direction);
  p.threads = torch_threads();
  return in;
}

std::tuple<Tensor, Tensor> forward(Inputs in, bool return_final_state) {
  GatedDeltaScanParams& p = in.p;
  Tensor y = new_empty(in.v, {p.batch, p.length, p.heads, p.value_dim});
  Tensor state = return_final_state ? new_empty(in.v, {p.batch, p.heads, p.key_dim, p.value_dim}, in.acc)
                                    : new_empty(in.v, {0}, in.acc);
  p.y = y.mutable_data_ptr();
  p.final_state = return_final_state ? state.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(gated_delta_scan, p, in.v);
  return {y, state};
}

// In the order of DIFFERENTIABLE in linmu_ops/gated_delta_scan.py.
std::vector<Tensor> backward(Inputs in, const Tensor& grad_y, const OptTensor& grad_final_state) {
  GatedDeltaScanBwdParams p{};
  p.scan = in.p;
  Dims d(kOp);
  d("k", in.forward.k, "B L Gk K", in.type);
  d("v", in.v, "B L Gv V", in.type);
  d("g", in.forward.g, "B L H", in.acc);
  d("grad_y", grad_y, "B L H V", in.type);
  d("grad_final_state", grad_final_state, "B H K V", in.acc);
  p.grad_y = in.strided(grad_y);
  p.grad_final_state = in.small(grad_final_state);

  std::vector<Tensor> grads;
  const auto grad = [&](const OptTensor& of, void** out, bool unused = false) {
    if (!of.has_value()) return grads.push_back(new_empty(in.v, {0}));
    grads.push_back(new_zeros(*of, of->sizes()));  // what is masked has a gradient of 0, and sums begin with 0
    if (!unused) *out = grads.back().mutable_data_ptr();
  };
  const bool only_reverse = !in.p.forward.on;
  // What the reverse direction has of its own takes the place of the forward one's where it runs alone.
  GatedDeltaDirectionGrads& first = only_reverse ? p.reverse : p.forward;
  const auto replaced = [&](const OptTensor& own) { return only_reverse && own.has_value(); };
  grad(in.forward.q, &first.q, replaced(in.reverse.q));
  grad(in.forward.k, &first.k, replaced(in.reverse.k));
  grad(in.v, &p.v);
  grad(in.forward.g, &first.g, replaced(in.reverse.g));
  grad(in.forward.beta, &first.beta, replaced(in.reverse.beta));
  grad(in.reverse.q, &p.reverse.q);
  grad(in.reverse.k, &p.reverse.k);
  grad(in.reverse.g, &p.reverse.g);
  grad(in.reverse.beta, &p.reverse.beta);
  grad(in.gate, &p.gate);
  grad(in.initial_state, &p.initial_state);
  LINMU_LAUNCH(gated_delta_scan_bwd, p, in.v);
  return grads;
}

using Forward = ForwardOp<checked, forward>;
using Backward = BackwardOp<checked, backward>;

}  // namespace

void register_gated_delta_scan(StableLibrary& lib) {
  lib.impl("gated_delta_scan", TORCH_BOX(&Forward::call));
  lib.impl("gated_delta_scan_bwd", TORCH_BOX(&Backward::call));
}

}  // namespace linmu
