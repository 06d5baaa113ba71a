// How large values are, and whether what is summed of them stays finite.
#pragma once
#include <cstring>
#include <limits>

#include "vec.h"

namespace linmu {
namespace LINMU_ISA {

// The largest magnitude among vectors; infinite if one element is not finite.
template <class A>
class Largest {
  using Bits = decltype(vec<A>{} < vec<A>{});

 public:
  void see(vec<A> v) {
    const Bits magnitude = (Bits)v & ~(Bits)(-vec<A>{});  // as integers, magnitudes order as they are, NaN last
    most_ = magnitude > most_ ? magnitude : most_;
  }
  double value() const {
    A most = A(0);
    for (int w = 0; w < Simd<A>::width; ++w) {
      A x;
      const auto bits = most_[w];
      std::memcpy(&x, &bits, sizeof(x));
      if (!(x <= most)) most = x == x ? x : std::numeric_limits<A>::infinity();
    }
    return most;
  }

 private:
  Bits most_{};
};

// Of whole vectors.
template <class T>
inline double largest(const T* values, int64_t size) {
  using A = acc_t<T>;
  Largest<A> most;
  for (int64_t i = 0; i < size; i += Simd<A>::width) most.see(load(values + i));
  return most.value();
}

// Whether no sum bounded by `most` can overflow; never of a NaN.
template <class A>
inline bool stays_finite(double most) {
  return most < static_cast<double>(std::numeric_limits<A>::max()) / 16;
}

}  // namespace LINMU_ISA
}  // namespace linmu
