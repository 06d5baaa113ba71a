// Entry points of liblinmu_cpu.so and liblinmu_cuda.so, called through ctypes. Registration happens here, under
// try/catch, and never in a static initialiser: a stale binary must be an error message, not a dead process.
#include <cstdio>
#include <memory>
#include <string>

#include "../linmu/common.h"
#include "ops.h"

#ifndef LINMU_NAMESPACE
#define LINMU_NAMESPACE "linmu"
#endif
#ifdef USE_CUDA
#define LINMU_KEY "CUDA"
#else
#define LINMU_KEY "CPU"
#endif

namespace linmu {
namespace {

using Register = void (*)(StableLibrary&);
constexpr Register kOps[] = {
    register_branch_mix_norm,  register_causal_conv1d, register_causal_conv1d_step,
    register_ssd_scan,         register_ssd_step,      register_window_attention,
#ifndef LINMU_FOR_CUDA
    register_exact_step,       register_far_attention, register_gated_delta_scan,
    register_gated_delta_step, register_gated_norm,    register_near_attention,
#endif
};
#ifdef LINMU_FOR_CUDA
std::string target() { return "archs=" LINMU_CUDA_ARCHS; }
bool runs_here() { return true; }
#else
std::string target() { return std::string("isa=") + isa_name(cpu_isa()); }
bool runs_here() { return cpu_isa() != Isa::none; }
#endif

}  // namespace
}  // namespace linmu

LINMU_EXPORT const char* linmu_build_info() {
  static const std::string info =
      std::string("schema_hash=" LINMU_SCHEMA_HASH "\ntorch=" LINMU_TORCH_VERSION "\ncompiler=" LINMU_COMPILER "\n") +
      linmu::target() + "\n";
  return info.c_str();
}

// 0, or 1 with the reason in message.
LINMU_EXPORT int linmu_register(const char* schema_hash, char* message, int size) {
  using namespace linmu;
  try {
    if (std::string(schema_hash) != LINMU_SCHEMA_HASH) {
      std::snprintf(message, size, "it was built for other op schemas (%s, now %s)", LINMU_SCHEMA_HASH, schema_hash);
      return 1;
    }
    if (!runs_here()) {
      std::snprintf(message, size, "this processor has no AVX2");
      return 1;
    }
    auto lib =
        std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, LINMU_NAMESPACE, LINMU_KEY, __FILE__, __LINE__);
    for (const auto register_op : kOps) register_op(*lib);
    lib.release();  // registrations live as long as the process
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
    return 1;
  }
}
