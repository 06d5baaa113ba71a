// Types shared by every kernel. Nothing under csrc/linmu, csrc/cpu or csrc/cuda includes torch.
#pragma once
#include <cstdint>
#include <functional>

// What ctypes calls.
#define LINMU_EXPORT extern "C" __attribute__((visibility("default")))

namespace linmu {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
  uint16_t bits;
};
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
using f16 = __fp16;  // the same numbers; this compiler has no other name for them in C++
#elif defined(__FLT16_MAX__)
using f16 = _Float16;
#endif

// Splits [0, n) over threads, at least `grain` items each; torch's own pool in practice.
using Range = std::function<void(int64_t begin, int64_t end)>;
struct Threads {
  int count;
  void (*run)(int64_t n, int64_t grain, const Range& body);
};

// What the host side of a CUDA kernel gets: the stream (a cudaStream_t) to launch on, and uninitialised device memory,
// aligned to 256 bytes, that lives until the work queued on that stream is done.
struct CudaContext {
  void* stream;
  std::function<void*(int64_t bytes)> allocate;
};

// The type sums are kept in: double for double, float for everything narrower.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

// Calls f with a null pointer of the element type: dispatch(dtype, [&](auto* t) { using T = ...; }).
template <class F>
void dispatch(DType dtype, F&& f) {
#if defined(__AVX512BF16__)
  if (dtype != DType::bf16) __builtin_trap();  // kernel_isa sends no other type here
  f(static_cast<bf16*>(nullptr));
#else
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::bf16: return f(static_cast<bf16*>(nullptr));
    case DType::f16: return f(static_cast<f16*>(nullptr));
  }
#endif
}

// The element type that a kernel's Params, or those of the kernel that it is the gradient of, are of.
template <class Params>
DType dtype_of(const Params& p) {
  if constexpr (requires { p.dtype; })
    return p.dtype;
  else if constexpr (requires { p.scan; })
    return p.scan.dtype;
  else
    return p.forward.dtype;
}

// Instruction sets a CPU kernel is compiled for; the best that the processor has is chosen at run time.
#if defined(__x86_64__) || defined(_M_X64)
#define LINMU_FOR_EACH_ISA(X) X(avx2) X(avx512) X(avx512bf16)
enum class Isa : int { none = 0, avx2, avx512, avx512bf16 };
#else
#define LINMU_FOR_EACH_ISA(X) X(generic)
enum class Isa : int { none = 0, generic };
#endif

// Isa::none where the processor is older than all of them. LINMU_CPU_ISA lowers the choice (tests, measurements).
Isa cpu_isa();
const char* isa_name(Isa isa);
// The set whose kernel of an element type serves: avx512bf16 has others than avx512 of bfloat16 alone.
Isa kernel_isa(DType dtype);

#define LINMU_DECLARE_IN(isa, name, Params) \
  namespace isa {                           \
  void name(const Params&);                 \
  }
#if defined(__x86_64__) || defined(_M_X64)
#define LINMU_CPU_KERNEL(name, Params)                  \
  LINMU_DECLARE_IN(avx2, name, Params)                  \
  LINMU_DECLARE_IN(avx512, name, Params)                \
  LINMU_DECLARE_IN(avx512bf16, name, Params)            \
  inline void name(const Params& p) {                   \
    switch (kernel_isa(dtype_of(p))) {                  \
      case Isa::avx512bf16: return avx512bf16::name(p); \
      case Isa::avx512: return avx512::name(p);         \
      default: return avx2::name(p);                    \
    }                                                   \
  }
#else
#define LINMU_CPU_KERNEL(name, Params)    \
  LINMU_DECLARE_IN(generic, name, Params) \
  inline void name(const Params& p) { generic::name(p); }
#endif

#define LINMU_CUDA_KERNEL(name, Params) void name(const Params&, const CudaContext&);

}  // namespace linmu
