#include "../linmu/window_attention.h"

#include <tuple>

#include "ops.h"
#include "token_rows.h"

namespace linmu {
namespace {

using torch::stable::contiguous;
constexpr const char* kOp = "window_attention";

// Everything the kernels read through or write through is checked here, before they run.
struct Table {
  Tensor tokens, offsets;
  OptTensor coords;
  std::vector<uint8_t> covered;

  Table(const Tensor& tokens_, const Tensor& offsets_, const OptTensor& coords_, int64_t num_tokens, int64_t bias_size,
        const std::vector<int64_t>& window, WindowAttentionParams& p)
      : tokens(contiguous(tokens_)), offsets(contiguous(offsets_)), coords(linmu::contiguous(coords_)) {
    const int64_t num_visual = tokens.size(0), num_offsets = offsets.size(0);
    p.num_windows = num_offsets - 1, p.num_visual = num_visual;
    p.tokens = static_cast<const int32_t*>(tokens.const_data_ptr());
    p.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
    p.coords = static_cast<const int32_t*>(pointer(coords));
    LINMU_CHECK(!bias_size || coords.has_value(), kOp, ": bias needs coords");
    if (!kValuesAreReadable) {
      LINMU_CHECK(num_offsets > 0, kOp, ": offsets must start with 0, got an empty tensor");
      p.max_tokens = window[0] * window[1] * window[2];
      return;
    }
    covered.resize(static_cast<size_t>(num_tokens));
    LINMU_CHECK(num_offsets > 0 && p.offsets[0] == 0, kOp, ": offsets must start with 0, got ",
                num_offsets > 0 ? std::to_string(p.offsets[0]) : "an empty tensor");
    for (int64_t w = 0; w < p.num_windows; ++w) {
      const int64_t size = static_cast<int64_t>(p.offsets[w + 1]) - p.offsets[w];
      LINMU_CHECK(size >= 0, kOp, ": offsets must not decrease, got ", p.offsets[w + 1], " after ", p.offsets[w]);
      p.max_tokens = std::max(p.max_tokens, size);
    }
    LINMU_CHECK(p.offsets[p.num_windows] == num_visual, kOp, ": offsets must end with ", num_visual,
                ", the number of tokens, got ", p.offsets[p.num_windows]);
    for (int64_t i = 0; i < num_visual; ++i) {
      const int64_t t = p.tokens[i];
      LINMU_CHECK(t >= 0 && t < num_tokens, kOp, ": tokens must be in 0..", num_tokens - 1, ", got ", t);
      LINMU_CHECK(!covered[t], kOp, ": tokens must hold each token at most once, got ", t, " twice");
      covered[t] = 1;
    }
    p.covered = num_visual == num_tokens ? nullptr : covered.data();
    for (int64_t i = 0; bias_size && i < num_visual; ++i)
      LINMU_CHECK(p.coords[i] >= 0 && p.coords[i] <= (bias_size - 1) / 2, kOp, ": coords must be in 0..",
                  (bias_size - 1) / 2, ", got ", p.coords[i]);
  }
};

struct Inputs {
  Tensor q, k, v;
  OptTensor bias, cos, sin;
  WindowAttentionParams params{};
  std::optional<Table> table;

  Inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& tokens, const Tensor& offsets,
         const OptTensor& coords, const std::vector<int64_t>& window, double scale, const OptTensor& bias_,
         const OptTensor& cos_, const OptTensor& sin_, bool interleaved, bool causal)
      : q(q_),
        k(k_),
        v(v_),
        bias(linmu::contiguous(bias_)),
        cos(linmu::contiguous(cos_)),
        sin(linmu::contiguous(sin_)) {
    const ScalarType type = q.scalar_type(), acc = accumulate_dtype(q);
    WindowAttentionParams& p = params;
    p.dtype = float_dtype(kOp, "q", q);
    Dims d(kOp);
    d("q", q, "B L H P", type);
    d("k", k, "B L G P", type);
    d("v", v, "B L G P", type);
    d.divides("k", "G", "H");
    d("tokens", tokens, "V", ScalarType::Int);
    d("offsets", offsets, "W", ScalarType::Int);
    d("coords", coords, "V", ScalarType::Int);
    p.batch = d["B"], p.length = d["L"], p.heads = d["H"], p.groups = d["G"], p.head_dim = d["P"];
    LINMU_CHECK(p.batch * p.length <= INT32_MAX, kOp, ": q must have at most ", INT32_MAX, " tokens, got ",
                p.batch * p.length);
    LINMU_CHECK(window.size() == 3 && window[0] > 0 && window[1] > 0 && window[2] > 0, kOp,
                ": window must be three positive sizes, got ", window.size());
    if (bias.has_value()) {
      d("bias", bias, "H T Y X", acc);
      LINMU_CHECK(d["T"] == 2 * window[0] - 1 && d["Y"] == 2 * window[1] - 1 && d["X"] == 2 * window[2] - 1, kOp,
                  ": bias must be (H, 2wt-1, 2wh-1, 2ww-1) with (wt, wh, ww)=(", window[0], ", ", window[1], ", ",
                  window[2], "), got shape ", shape_text(*bias));
      p.bias_size = d["T"] * d["Y"] * d["X"];
    }
    LINMU_CHECK(cos.has_value() == sin.has_value(), kOp, ": cos and sin must be given together");
    if (cos.has_value()) {
      d("cos", cos, cos->dim() == 3 && cos->size(0) == 1 ? "1 L R" : "B L R", acc);
      d("sin", sin, cos->size(0) == 1 ? "1 L R" : "B L R", acc);
      p.rotary_dim = d["R"], p.rotary_batch = cos->size(0) == p.batch;
      LINMU_CHECK(p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim, kOp,
                  ": cos must have an even R of at most P=", p.head_dim, ", got R=", p.rotary_dim);
    }
    table.emplace(tokens, offsets, coords, p.batch * p.length, p.bias_size, window, p);
    p.q = rows(q), p.k = rows(k), p.v = rows(v);
    p.bias = pointer(bias), p.cos = pointer(cos), p.sin = pointer(sin);
    p.scale = scale, p.interleaved = interleaved, p.causal = causal;
    p.threads = torch_threads();
  }
};

std::tuple<Tensor, Tensor> window_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tokens,
                                            const Tensor& offsets, const OptTensor& coords, std::vector<int64_t> window,
                                            double scale, const OptTensor& bias, const OptTensor& cos,
                                            const OptTensor& sin, bool interleaved, bool causal) {
  Inputs in(q, k, v, tokens, offsets, coords, window, scale, bias, cos, sin, interleaved, causal);
  WindowAttentionParams& p = in.params;
  Tensor out = torch::stable::new_empty(q, {p.batch, p.length, p.heads, p.head_dim});
  Tensor lse = torch::stable::new_empty(q, {tokens.size(0), p.heads}, accumulate_dtype(q));
  p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr();
  LINMU_LAUNCH(window_attention, p, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_bwd(
    const Tensor& grad_out, const OptTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& tokens, const Tensor& offsets, const OptTensor& coords,
    std::vector<int64_t> window, double scale, const OptTensor& bias, const OptTensor& cos, const OptTensor& sin,
    bool interleaved, bool causal) {
  Inputs in(q, k, v, tokens, offsets, coords, window, scale, bias, cos, sin, interleaved, causal);
  WindowAttentionBwdParams p{};
  p.forward = in.params;
  const WindowAttentionParams& f = p.forward;
  const ScalarType type = q.scalar_type(), acc = accumulate_dtype(q);
  Dims d(kOp);
  d("q", q, "B L H P", type);
  d("tokens", tokens, "V", ScalarType::Int);
  d("grad_out", grad_out, "B L H P", type);
  d("out", out, "B L H P", type);
  d("lse", lse, "V H", acc);
  d("grad_lse", grad_lse, "V H", acc);
  Tensor grad_out_ = grad_out;
  const Tensor out_ = contiguous(out), lse_ = contiguous(lse);
  const OptTensor grad_lse_ = linmu::contiguous(grad_lse);
  p.grad_out = rows(grad_out_), p.grad_lse = pointer(grad_lse_);
  p.forward.out = const_cast<void*>(out_.const_data_ptr());
  p.forward.lse = const_cast<void*>(lse_.const_data_ptr());
  Tensor dq = torch::stable::new_empty(q, {f.batch, f.length, f.heads, f.head_dim});
  Tensor dk = torch::stable::new_empty(q, {f.batch, f.length, f.groups, f.head_dim});
  Tensor dv = torch::stable::new_empty(q, {f.batch, f.length, f.groups, f.head_dim});
  Tensor dbias = bias.has_value()
                     ? torch::stable::new_empty(*bias, {f.heads, bias->size(1), bias->size(2), bias->size(3)})
                     : torch::stable::new_empty(q, {0}, acc);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.dbias = bias.has_value() ? dbias.mutable_data_ptr() : nullptr;
  LINMU_LAUNCH(window_attention_bwd, p, q);
  return {dq, dk, dv, dbias};
}

}  // namespace

void register_window_attention(StableLibrary& lib) {
  lib.impl("window_attention", TORCH_BOX(&window_attention));
  lib.impl("window_attention_bwd", TORCH_BOX(&window_attention_bwd));
}

}  // namespace linmu
