// What the ops of both scans share: tensors that live as long as the Params point into them, and the functions of
// their schemas.
#pragma once
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../linmu/ssd_scan.h"
#include "checks.h"

namespace linmu {

// A dimension of size 1 may have any stride, even one that TMA refuses: it is as if packed.
inline int64_t stride(const Tensor& t, int64_t dim) {
  if (t.size(dim) != 1) return t.stride(dim);
  int64_t packed = 1;
  for (int64_t i = dim + 1; i < t.dim(); ++i) packed *= t.size(i);
  return packed > 0 ? packed : 1;
}

// Whether rows of whole 16 bytes lie where pieces of 16 bytes and TMA can read them. Of other rows it is true:
// packing would not help them.
inline bool in_pieces(const Tensor& t) {
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  if (t.size(3) * size % 16) return true;
  for (int64_t i = 0; i < 3; ++i)
    if (stride(t, i) <= 0 || stride(t, i) * size % 16) return false;
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Keeps tensors alive for as long as the Params point into them.
class Kept {
 public:
  const void* small(const OptTensor& t) {
    if (!t.has_value()) return nullptr;
    tensors_.push_back(torch::stable::contiguous(*t));
    return tensors_.back().const_data_ptr();
  }
  SsdScanTensor strided(const Tensor& t) {
    if (t.size(3) > 1 && t.stride(3) != 1)
      tensors_.push_back(torch::stable::contiguous(t));
    else
      tensors_.push_back(in_pieces(t) || !kPacksRows ? t
                         : t.is_contiguous()         ? torch::stable::clone(t)
                                                     : torch::stable::contiguous(t));
    const Tensor& k = tensors_.back();
    return {k.const_data_ptr(), stride(k, 0), stride(k, 1), stride(k, 2)};
  }

 private:
  std::vector<Tensor> tensors_;
};

// Which directions run. `Params` has a `forward` and a `reverse`.
template <class Params>
void turn_on(Params& p, const char* op, const std::string& direction) {
  const bool known = direction == "forward" || direction == "reverse" || direction == "both";
  LINMU_CHECK(known, op, ": direction must be one of forward, reverse, both, got '", direction, "'");
  p.forward.on = direction != "reverse", p.reverse.on = direction != "forward";
}

// The function of an op's schema, of two parts: one checks the arguments that the op shares with its gradient, one
// launches, given these and what comes behind them in the schema. At the end is the chunk size.
template <auto checked, auto run>
struct ForwardOp;

template <class Inputs, class... T, Inputs (*checked)(T...), class Result, class... Last,
          Result (*run)(Inputs, Last...)>
struct ForwardOp<checked, run> {
  static Result call(T... inputs, Last... last, int64_t chunk_size) {
    Inputs in = checked(inputs...);
    in.p.chunk = chunk_size;
    return run(std::move(in), last...);
  }
};

// That of its gradient, whose own arguments come before the shared ones.
template <auto checked, auto run>
struct BackwardOp;

template <class Inputs, class... T, Inputs (*checked)(T...), class... Grads,
          std::vector<Tensor> (*run)(Inputs, Grads...)>
struct BackwardOp<checked, run> {
  static std::vector<Tensor> call(Grads... grads, T... inputs, int64_t chunk_size) {
    Inputs in = checked(inputs...);
    in.p.chunk = chunk_size;
    return run(std::move(in), grads...);
  }
};

}  // namespace linmu
