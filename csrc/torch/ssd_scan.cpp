#include "../linmu/ssd_scan.h"

#include "checks.h"
#include "ops.h"

namespace linmu {
namespace {

using torch::stable::new_empty;
using torch::stable::new_zeros;

// A dimension of size 1 may have any stride, even one that TMA refuses: it is as if packed.
int64_t stride(const Tensor& t, int64_t dim) {
  if (t.size(dim) != 1) return t.stride(dim);
  int64_t packed = 1;
  for (int64_t i = dim + 1; i < t.dim(); ++i) packed *= t.size(i);
  return packed > 0 ? packed : 1;
}

// Whether rows of whole 16 bytes lie where pieces of 16 bytes and TMA can read them. Of other rows it is true:
// packing would not help them.
bool in_pieces(const Tensor& t) {
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  if (t.size(3) * size % 16) return true;
  for (int64_t i = 0; i < 3; ++i)
    if (stride(t, i) <= 0 || stride(t, i) * size % 16) return false;
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// The arguments the two ops share, checked and kept alive for as long as the Params point into them.
struct Inputs {
  SsdScanParams p{};
  ScalarType type, acc;
  std::vector<Tensor> kept;

  const void* small(const OptTensor& t) {
    if (!t.has_value()) return nullptr;
    kept.push_back(torch::stable::contiguous(*t));
    return kept.back().const_data_ptr();
  }
  SsdScanTensor strided(const Tensor& t) {
    if (t.size(3) > 1 && t.stride(3) != 1)
      kept.push_back(torch::stable::contiguous(t));
    else
      kept.push_back(in_pieces(t) || !kPacksRows ? t
                     : t.is_contiguous()         ? torch::stable::clone(t)
                                                 : torch::stable::contiguous(t));
    const Tensor& k = kept.back();
    return {k.const_data_ptr(), stride(k, 0), stride(k, 1), stride(k, 2)};
  }
};

Inputs checked(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D,
               const OptTensor& dt_bias, bool dt_softplus, const std::string& direction, const OptTensor& reverse_dt,
               const OptTensor& reverse_dt_bias, const OptTensor& reverse_A, const OptTensor& reverse_B,
               const OptTensor& reverse_C, const OptTensor& gate, const OptTensor& reverse_mask,
               const OptTensor& reverse_seq_idx, const OptTensor& seq_idx, const OptTensor& token_order,
               const OptTensor& initial_state, int64_t chunk_size) {
  Inputs in;
  SsdScanParams& p = in.p;
  const ScalarType type = in.type = x.scalar_type(), acc = in.acc = accumulate_dtype(x);
  p.dtype = float_dtype("ssd_scan", "x", x);
  Dims d("ssd_scan");
  d("x", x, "B L Gx P", type);
  d("dt", dt, "B L H", acc);
  d("A", A, "H", acc);
  d("B", B, "B L Gb N", type);
  d("C", C, "B L Gc N", type);
  d("D", D, "H", acc);
  d("dt_bias", dt_bias, "H", acc);
  d("reverse_dt", reverse_dt, "B L H", acc);
  d("reverse_dt_bias", reverse_dt_bias, "H", acc);
  d("reverse_A", reverse_A, "H", acc);
  d("reverse_B", reverse_B, "B L Gb N", type);
  d("reverse_C", reverse_C, "B L Gc N", type);
  p.gate_per_token = gate.has_value() && gate->dim() != 1;
  d("gate", gate, p.gate_per_token ? "B L H" : "H", acc);
  d("reverse_mask", reverse_mask, "B L", ScalarType::Bool);
  d("reverse_seq_idx", reverse_seq_idx, "B L", ScalarType::Int);
  d("seq_idx", seq_idx, "B L", ScalarType::Int);
  d("token_order", token_order, "B L", ScalarType::Int);
  d("initial_state", initial_state, "B H P N", acc);
  LINMU_CHECK(d["H"] > 0, "ssd_scan: dt must have at least one head, got H=0");
  d.divides("x", "Gx", "H");
  d.divides("B", "Gb", "H");
  d.divides("C", "Gc", "H");
  const bool known = direction == "forward" || direction == "reverse" || direction == "both";
  LINMU_CHECK(known, "ssd_scan: direction must be one of forward, reverse, both, got '", direction, "'");

  p.batch = d["B"], p.length = d["L"], p.heads = d["H"], p.head_dim = d["P"], p.state_dim = d["N"];
  p.groups_x = d["Gx"], p.groups_b = d["Gb"], p.groups_c = d["Gc"];
  p.dt_softplus = dt_softplus, p.chunk = chunk_size;
  p.x = in.strided(x);
  p.D = in.small(D), p.gate = in.small(gate), p.initial_state = in.small(initial_state);
  p.reverse_mask = static_cast<const uint8_t*>(in.small(reverse_mask));
  check_token_order("ssd_scan", token_order);
  p.token_order = static_cast<const int32_t*>(in.small(token_order));
  SsdScanDirection &f = p.forward, &r = p.reverse;
  f.on = direction != "reverse", r.on = direction != "forward";
  f.dt = in.small(dt), f.dt_bias = in.small(dt_bias), f.A = in.small(A);
  f.B = in.strided(B), f.C = in.strided(C);
  f.seq_idx = static_cast<const int32_t*>(in.small(seq_idx));
  r.dt = reverse_dt.has_value() ? in.small(reverse_dt) : f.dt;
  r.dt_bias = reverse_dt_bias.has_value() ? in.small(reverse_dt_bias) : f.dt_bias;
  r.A = reverse_A.has_value() ? in.small(reverse_A) : f.A;
  r.B = reverse_B.has_value() ? in.strided(*reverse_B) : f.B;
  r.C = reverse_C.has_value() ? in.strided(*reverse_C) : f.C;
  r.seq_idx = reverse_seq_idx.has_value() ? static_cast<const int32_t*>(in.small(reverse_seq_idx)) : f.seq_idx;
  p.shared_projections = !reverse_B.has_value() && !reverse_C.has_value();
  p.threads = torch_threads();
  return in;
}

std::tuple<Tensor, Tensor> ssd_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                    const Tensor& C, const OptTensor& D, const OptTensor& dt_bias, bool dt_softplus,
                                    const std::string& direction, const OptTensor& reverse_dt,
                                    const OptTensor& reverse_dt_bias, const OptTensor& reverse_A,
                                    const OptTensor& reverse_B, const OptTensor& reverse_C, const OptTensor& gate,
                                    const OptTensor& reverse_mask, const OptTensor& reverse_seq_idx,
                                    const OptTensor& seq_idx, const OptTensor& token_order,
                                    const OptTensor& initial_state, bool return_final_state, int64_t chunk_size) {
  Inputs in =
      checked(x, dt, A, B, C, D, dt_bias, dt_softplus, direction, reverse_dt, reverse_dt_bias, reverse_A, reverse_B,
              reverse_C, gate, reverse_mask, reverse_seq_idx, seq_idx, token_order, initial_state, chunk_size);
  SsdScanParams& p = in.p;
  Tensor y = new_empty(x, {p.batch, p.length, p.heads, p.head_dim});
  Tensor state = return_final_state ? new_empty(x, {p.batch, p.heads, p.head_dim, p.state_dim}, in.acc)
                                    : new_empty(x, {0}, in.acc);
  p.y = y.mutable_data_ptr();
  p.final_state = return_final_state ? state.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(ssd_scan, p, x);
  return {y, state};
}

// In the order of DIFFERENTIABLE in linmu_ops/ssd_scan.py.
std::vector<Tensor> ssd_scan_bwd(const Tensor& grad_y, const OptTensor& grad_final_state, const Tensor& x,
                                 const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                 const OptTensor& D, const OptTensor& dt_bias, bool dt_softplus,
                                 const std::string& direction, const OptTensor& reverse_dt,
                                 const OptTensor& reverse_dt_bias, const OptTensor& reverse_A,
                                 const OptTensor& reverse_B, const OptTensor& reverse_C, const OptTensor& gate,
                                 const OptTensor& reverse_mask, const OptTensor& reverse_seq_idx,
                                 const OptTensor& seq_idx, const OptTensor& token_order, const OptTensor& initial_state,
                                 int64_t chunk_size) {
  Inputs in =
      checked(x, dt, A, B, C, D, dt_bias, dt_softplus, direction, reverse_dt, reverse_dt_bias, reverse_A, reverse_B,
              reverse_C, gate, reverse_mask, reverse_seq_idx, seq_idx, token_order, initial_state, chunk_size);
  SsdScanBwdParams p{};
  p.scan = in.p;
  Dims d("ssd_scan");
  d("x", x, "B L Gx P", in.type);
  d("dt", dt, "B L H", in.acc);
  d("B", B, "B L Gb N", in.type);
  d("grad_y", grad_y, "B L H P", in.type);
  d("grad_final_state", grad_final_state, "B H P N", in.acc);
  p.grad_y = in.strided(grad_y);
  p.grad_final_state = in.small(grad_final_state);

  std::vector<Tensor> grads;
  // Where only the reverse direction runs with a tensor of its own, the forward one has no part and its gradient is 0.
  const auto grad = [&](const OptTensor& of, void** out, bool unused = false) {
    if (!of.has_value()) return grads.push_back(new_empty(x, {0}));
    grads.push_back(unused ? new_zeros(*of, of->sizes()) : new_empty(*of, of->sizes()));
    if (!unused) *out = grads.back().mutable_data_ptr();
  };
  const bool only_reverse = !in.p.forward.on;
  SsdScanDirectionGrads &f = only_reverse ? p.reverse : p.forward, &r = p.reverse;
  grad(x, &p.x);
  grad(dt, &f.dt, only_reverse && reverse_dt.has_value());
  grad(A, &f.A, only_reverse && reverse_A.has_value());
  grad(B, &f.B, only_reverse && reverse_B.has_value());
  grad(C, &f.C, only_reverse && reverse_C.has_value());
  grad(D, &p.D);
  grad(dt_bias, &f.dt_bias, only_reverse && reverse_dt_bias.has_value());
  grad(reverse_dt, &r.dt);
  grad(reverse_dt_bias, &r.dt_bias);
  grad(reverse_A, &r.A);
  grad(reverse_B, &r.B);
  grad(reverse_C, &r.C);
  grad(gate, &p.gate);
  grad(initial_state, &p.initial_state);
  LINMU_LAUNCH(ssd_scan_bwd, p, x);
  return grads;
}

}  // namespace

void register_ssd_scan(StableLibrary& lib) {
  lib.impl("ssd_scan", TORCH_BOX(&ssd_scan));
  lib.impl("ssd_scan_bwd", TORCH_BOX(&ssd_scan_bwd));
}

}  // namespace linmu
