// The one place where the two devices differ. Each csrc/torch/<op>.cpp is compiled once per library: for the CPU, and,
// with LINMU_FOR_CUDA, for CUDA. (LINMU_FOR_CUDA without USE_CUDA: the CUDA kernels emulated on the CPU, for tests.)
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../linmu/common.h"

namespace linmu {

#ifdef LINMU_FOR_CUDA

// Values on a device cannot be looked at without waiting for it; there the kernels clamp or skip what is out of range.
inline constexpr bool kValuesAreReadable = false;
inline constexpr bool kTakesFloat64 = false;
// Rows that do not lie 16 bytes apart would be read an element at a time: packing them first is faster.
inline constexpr bool kPacksRows = true;
// Python scans a wider x instead, where ssd_scan or ssd_step is to divide by the mass.
inline constexpr bool kNormalizes = false;
// Its step of the convolution takes a contiguous state of K-1 inputs alone.
inline constexpr bool kStepsAnyState = false;

// Runs the host side of a kernel on the device and stream of `like`. What it allocates is torch's, and goes back to the
// caching allocator in the order of that stream.
template <class Params>
void launch_on(void (*kernel)(const Params&, const CudaContext&), const Params& p, const torch::stable::Tensor& like) {
  using torch::headeronly::ScalarType;
  CudaContext context{};
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &context.stream));
#endif
  std::vector<torch::stable::Tensor> kept;
  context.allocate = [&](int64_t bytes) {
    kept.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
    return kept.back().mutable_data_ptr();
  };
  kernel(p, context);
}

#define LINMU_LAUNCH(name, params, like) launch_on(name##_cuda, params, like)

#else

inline constexpr bool kValuesAreReadable = true;
inline constexpr bool kTakesFloat64 = true;
inline constexpr bool kPacksRows = false;
inline constexpr bool kNormalizes = true;
inline constexpr bool kStepsAnyState = true;

#define LINMU_LAUNCH(name, params, like) name##_cpu(params)

#endif

}  // namespace linmu
