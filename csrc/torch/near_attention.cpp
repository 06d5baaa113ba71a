#include "../linmu/near_attention.h"

#include <tuple>

#include "ops.h"
#include "token_rows.h"

namespace linmu {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
constexpr const char* kOp = "near_attention";

const int32_t* within(const Tensor& t, const char* name, int64_t least, int64_t most) {
  const int32_t* at = static_cast<const int32_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i)
    LINMU_CHECK(at[i] >= least && at[i] <= most, kOp, ": ", name, " must be in ", least, "..", most, ", got ", at[i]);
  return at;
}

// Everything the kernels read through or write through is checked here, before they run.
struct Inputs {
  Tensor q, k, v, low, high, which, listed;
  NearAttentionParams params{};

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& low_, const Tensor& high_,
         const Tensor& which_, const Tensor& listed_, double scale)
      : q(q_),
        k(k_),
        v(v_),
        low(contiguous(low_)),
        high(contiguous(high_)),
        which(contiguous(which_)),
        listed(contiguous(listed_)) {
    const ScalarType type = q.scalar_type();
    NearAttentionParams& p = params;
    p.dtype = float_dtype(kOp, "q", q);
    Dims d(kOp);
    d("q", q, "B L H P", type);
    d("k", k, "B T G P", type);
    d("v", v, "B T G P", type);
    d.divides("k", "G", "H");
    d("low", low, "B L", ScalarType::Int);
    d("high", high, "B L", ScalarType::Int);
    d("which", which, "B G L", ScalarType::Int);
    d("listed", listed, "n m", ScalarType::Int);
    p.batch = d["B"], p.length = d["L"], p.total = d["T"], p.heads = d["H"], p.groups = d["G"], p.head_dim = d["P"];
    LINMU_CHECK(p.total >= p.length, kOp, ": k must be of T >= L=", p.length, " tokens, got ", p.total);
    LINMU_CHECK(p.total <= INT32_MAX, kOp, ": k must be of T <= ", INT32_MAX, " tokens, got ", p.total);
    p.low = within(low, "low", 0, p.total), p.high = within(high, "high", 0, p.total);
    p.which = within(which, "which", -1, d["n"] - 1), p.listed = within(listed, "listed", -1, p.total - 1);
    p.list_size = d["m"], p.scale = scale;
    p.q = rows(q), p.k = rows(k), p.v = rows(v);
    p.threads = torch_threads();
  }
};

std::tuple<Tensor, Tensor> near_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& low,
                                          const Tensor& high, const Tensor& which, const Tensor& listed, double scale) {
  Inputs in(q, k, v, low, high, which, listed, scale);
  NearAttentionParams& p = in.params;
  Tensor y = new_empty(q, {p.batch, p.length, p.heads, p.head_dim});
  Tensor lse = new_empty(q, {p.batch, p.length, p.heads}, accumulate_dtype(q));
  p.y = y.mutable_data_ptr(), p.lse = lse.mutable_data_ptr();
  LINMU_LAUNCH(near_attention, p, q);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> near_attention_bwd(const Tensor& grad_y, const OptTensor& grad_lse, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& lse,
                                                      const Tensor& low, const Tensor& high, const Tensor& which,
                                                      const Tensor& listed, double scale) {
  Inputs in(q, k, v, low, high, which, listed, scale);
  NearAttentionBwdParams p{};
  p.forward = in.params;
  const NearAttentionParams& f = p.forward;
  const ScalarType type = q.scalar_type(), acc = accumulate_dtype(q);
  Dims d(kOp);
  d("q", q, "B L H P", type);
  d("grad_y", grad_y, "B L H P", type);
  d("lse", lse, "B L H", acc);
  d("grad_lse", grad_lse, "B L H", acc);
  Tensor grad_y_ = grad_y;
  const Tensor lse_ = contiguous(lse);
  const OptTensor grad_lse_ = linmu::contiguous(grad_lse);
  p.grad_y = rows(grad_y_), p.grad_lse = pointer(grad_lse_);
  p.forward.lse = const_cast<void*>(lse_.const_data_ptr());
  Tensor dq = new_empty(q, {f.batch, f.length, f.heads, f.head_dim});
  Tensor dk = new_empty(q, {f.batch, f.total, f.groups, f.head_dim});
  Tensor dv = new_empty(q, {f.batch, f.total, f.groups, f.head_dim});
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  LINMU_LAUNCH(near_attention_bwd, p, q);
  return {dq, dk, dv};
}

}  // namespace

void register_near_attention(StableLibrary& lib) {
  lib.impl("near_attention", TORCH_BOX(&near_attention));
  lib.impl("near_attention_bwd", TORCH_BOX(&near_attention_bwd));
}

}  // namespace linmu
