// Entry points of liblinmu_cpu.so, called through ctypes. Registration happens here, under try/catch, and never in a
// static initialiser: a stale binary must be an error message, not a dead process.
#include <cstdio>
#include <memory>
#include <string>

#include "../linmu/common.h"
#include "ops.h"

#define LINMU_EXPORT extern "C" __attribute__((visibility("default")))

LINMU_EXPORT const char* linmu_build_info() {
  static const std::string info = std::string("schema_hash=" LINMU_SCHEMA_HASH "\ntorch=" LINMU_TORCH_VERSION
                                              "\ncompiler=" LINMU_COMPILER "\nisa=") +
                                  linmu::isa_name(linmu::cpu_isa()) + "\n";
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
    if (cpu_isa() == Isa::none) {
      std::snprintf(message, size, "this processor has no AVX2");
      return 1;
    }
    auto lib = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "linmu", "CPU", __FILE__, __LINE__);
    register_branch_mix_norm_cpu(*lib);
    register_causal_conv1d_cpu(*lib);
    register_causal_conv1d_step_cpu(*lib);
    register_ssd_scan_cpu(*lib);
    register_ssd_step_cpu(*lib);
    register_window_attention_cpu(*lib);
    lib.release();  // registrations live as long as the process
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
    return 1;
  }
}
