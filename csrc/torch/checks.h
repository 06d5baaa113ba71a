// Argument checks and small helpers for the ops. The words are those of linmu_ops/_dims.py: an error reads the same
// from Python and from C++.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
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

  int64_t operator[](const std::string& axis) const { return sizes_.at(axis); }

  void bind(const char* axis, int64_t size) { sizes_[axis] = size; }

  // The first tensor's device is everyone's: a kernel reads through all pointers from where it runs.
  void same_device(const char* name, const Tensor& t) {
    if (!device_.has_value()) device_ = t;
    LINMU_CHECK(t.device() == device_->device(), op_, ": ", name, " must be on ", device_text(*device_), ", got ",
                device_text(t));
  }

  void operator()(const char* name, const Tensor& t, const char* axes, ScalarType dtype) {
    same_device(name, t);
    std::istringstream in(axes);
    std::vector<std::string> names;
    for (std::string a; in >> a;) names.push_back(a);
    bool bad = t.dim() != static_cast<int64_t>(names.size());
    for (size_t i = 0; !bad && i < names.size(); ++i) {
      const auto at = sizes_.find(names[i]);
      bad = at != sizes_.end() && at->second != t.size(static_cast<int64_t>(i));
    }
    LINMU_CHECK(!bad, op_, ": ", name, " must be ", want(names), ", got shape ", shape_text(t));
    for (size_t i = 0; i < names.size(); ++i) sizes_[names[i]] = t.size(static_cast<int64_t>(i));
    LINMU_CHECK(t.scalar_type() == dtype, op_, ": ", name, " must be ", dtype_name(dtype), ", got ",
                dtype_name(t.scalar_type()));
  }
  void operator()(const char* name, const OptTensor& t, const char* axes, ScalarType dtype) {
    if (t.has_value()) (*this)(name, *t, axes, dtype);
  }

  void divides(const char* name, const char* part, const char* whole) const {
    const int64_t p = sizes_.at(part), w = sizes_.at(whole);
    LINMU_CHECK(p > 0 && w % p == 0, op_, ": ", name, "'s ", part, "=", p, " must divide ", whole, "=", w);
  }

 private:
  std::string want(const std::vector<std::string>& names) const {
    std::string axes, known;
    for (const auto& a : names) {
      axes += (axes.empty() ? "" : ", ") + a;
      auto at = sizes_.find(a);
      if (at != sizes_.end()) known += (known.empty() ? " with " : ", ") + a + "=" + std::to_string(at->second);
    }
    return "(" + axes + (names.size() == 1 ? ",)" : ")") + known;
  }

  const char* op_;
  OptTensor device_;
  std::map<std::string, int64_t> sizes_;
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
