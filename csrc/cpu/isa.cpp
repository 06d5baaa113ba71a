// Which instruction set the processor has.
#include <cstdlib>
#include <cstring>

#include "../linmu/common.h"

namespace linmu {

const char* isa_name(Isa isa) {
#define LINMU_NAME(x) \
  if (isa == Isa::x) return #x;
  LINMU_FOR_EACH_ISA(LINMU_NAME)
#undef LINMU_NAME
  return "none";
}

static Isa detect() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  Isa best = Isa::none;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
  if (best == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::avx512bf16;
#else
  Isa best = Isa::generic;
#endif
  if (const char* wanted = std::getenv("LINMU_CPU_ISA"))
    for (int i = 1; i <= static_cast<int>(best); ++i)
      if (std::strcmp(wanted, isa_name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
  return best;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa kernel_isa(DType dtype) {
#if defined(__x86_64__) || defined(_M_X64)
  if (cpu_isa() == Isa::avx512bf16 && dtype != DType::bf16) return Isa::avx512;
#endif
  return cpu_isa();
}

}  // namespace linmu
