// Argument checks and small helpers for the ops. The words are those of linmu_ops/_dims.py: an error reads the same
// from Python and from C++.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../linmu/common.h"
#include "device.h"

namespace linmu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// A fault of the caller: Python sees a ValueError of these words alone. Every other exception, as of a device, stays
// what it is, a RuntimeError.
template <class... Words>
[[noreturn]] inline void refuse(const Words&... words) {
  std::ostringstream out;
  (out << ... << words);
  throw std::invalid_argument(out.str());
}

#define LINMU_CHECK(condition, ...)                 \
  do {                                              \
    if (!(condition)) ::linmu::refuse(__VA_ARGS__); \
  } while (false)

inline std::string shape_text(const Tensor& t) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << (t.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string device_text(const Tensor& t) {
  const auto device = t.device();
  std::string text;
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU: text = "cpu"; break;
    case torch::headeronly::DeviceType::CUDA: text = "cuda"; break;
    case torch::headeronly::DeviceType::Meta: text = "meta"; break;
    default: text = "another device";
  }
  return device.has_index() ? text + ":" + std::to_string(device.index()) : text;
}

// Binds axis names to sizes across the tensors of one call; the first tensor that breaks a name is the error.
class Dims {
 public:
  explicit Dims(const char* op) : op_(op) {}

  int64_t operator[](std::string_view axis) const {
    const int64_t* size = find(axis);
    if (!size) throw std::out_of_range(std::string(axis));
    return *size;
  }

  void bind(std::string_view axis, int64_t size) {
    if (int64_t* known = find(axis))
      *known = size;
    else
      sizes_.emplace_back(axis, size);
  }

  // The first tensor's device is everyone's: a kernel reads through all pointers from where it runs.
  void same_device(const char* name, const Tensor& t) {
    if (!device_.has_value()) device_ = t;
    LINMU_CHECK(t.device() == device_->device(), op_, ": ", name, " must be on ", device_text(*device_), ", got ",
                device_text(t));
  }

  void operator()(const char* name, const Tensor& t, const char* axes, ScalarType dtype) {
    same_device(name, t);
    std::array<std::string_view, 8> names;
    int64_t rank = 0;
    for (std::string_view rest = axes; !rest.empty(); ++rank) {
      const size_t end = std::min(rest.find(' '), rest.size());
      names.at(rank) = rest.substr(0, end);
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
    bool bad = t.dim() != rank;
    for (int64_t i = 0; !bad && i < rank; ++i) {
      const int64_t* known = find(names[i]);
      bad = known && *known != t.size(i);
    }
    LINMU_CHECK(!bad, op_, ": ", name, " must be ", want(names.data(), rank), ", got shape ", shape_text(t));
    for (int64_t i = 0; i < rank; ++i) bind(names[i], t.size(i));
    LINMU_CHECK(t.scalar_type() == dtype, op_, ": ", name, " must be ", dtype_name(dtype), ", got ",
                dtype_name(t.scalar_type()));
  }
  void operator()(const char* name, const OptTensor& t, const char* axes, ScalarType dtype) {
    if (t.has_value()) (*this)(name, *t, axes, dtype);
  }

  void divides(const char* name, const char* part, const char* whole) const {
    const int64_t p = (*this)[part], w = (*this)[whole];
    LINMU_CHECK(p > 0 && w % p == 0, op_, ": ", name, "'s ", part, "=", p, " must divide ", whole, "=", w);
  }

 private:
  const int64_t* find(std::string_view axis) const {
    for (const auto& [name, size] : sizes_)
      if (name == axis) return &size;
    return nullptr;
  }
  int64_t* find(std::string_view axis) { return const_cast<int64_t*>(std::as_const(*this).find(axis)); }

  std::string want(const std::string_view* names, int64_t rank) const {
    std::ostringstream text;
    text << "(";
    for (int64_t i = 0; i < rank; ++i) text << (i ? ", " : "") << names[i];
    text << (rank == 1 ? ",)" : ")");
    const char* before = " with ";
    for (int64_t i = 0; i < rank; ++i)
      if (const int64_t* size = find(names[i])) text << std::exchange(before, ", ") << names[i] << "=" << *size;
    return text.str();
  }

  const char* op_;
  OptTensor device_;
  // A handful, in literals: a step feels what a map of strings takes.
  std::vector<std::pair<std::string_view, int64_t>> sizes_;
};

inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: LINMU_CHECK(kTakesFloat64, op, ": the CUDA kernels take no float64"); return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      LINMU_CHECK(false, op, ": ", name, " must be float32 or float64 or bfloat16 or float16, got ",
                  dtype_name(t.scalar_type()));
  }
}

inline ScalarType accumulate_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const void* pointer(const OptTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

inline OptTensor contiguous(const OptTensor& t) {
  return t.has_value() ? OptTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

// Before any read through it: token_order, int32 (B, L), must be a permutation of 0..L-1 in every row.
inline void check_token_order(const char* op, const OptTensor& token_order) {
  if (!kValuesAreReadable || !token_order.has_value()) return;
  const Tensor order = torch::stable::contiguous(*token_order);
  const int64_t batch = order.size(0), length = order.size(1);
  const int32_t* at = static_cast<const int32_t*>(order.const_data_ptr());
  std::vector<bool> seen(length);
  for (int64_t b = 0; b < batch; ++b) {
    seen.assign(length, false);
    for (int64_t t = 0; t < length; ++t, ++at) {
      LINMU_CHECK(*at >= 0 && *at < length && !seen[*at], op,
                  ": token_order must hold every position 0..L-1 once per row");
      seen[*at] = true;
    }
  }
}

inline Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int64_t n, int64_t grain, const Range& body) {
            if (n > 0) torch::stable::parallel_for(0, n, grain, body);
          }};
}

}  // namespace linmu
