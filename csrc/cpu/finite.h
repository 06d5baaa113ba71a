// How large values are, and whether what is summed of them stays finite.
#pragma once
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

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

// Sizes that are tried as the limit of what products read, from the largest: the fewest visits are hidden.
constexpr double kLimits[] = {0x1p64, 0x1p32, 0x1p24, 0x1p16, 0x1p12, 0x1p8, 0x1p6, 0x1p4, 0x1p2};

// Which rows of the batch had a chunk that products could not compute. Tasks of one row may write at once.
class Notes {
 public:
  explicit Notes(int64_t rows) : rows_(rows) {}

  void note(int64_t row) { rows_[row].store(true, std::memory_order_relaxed); }
  bool has(int64_t row) const { return rows_[row].load(std::memory_order_relaxed); }
  bool any() const {
    for (const auto& row : rows_)
      if (row.load(std::memory_order_relaxed)) return true;
    return false;
  }
  void clear() {
    for (auto& row : rows_) row.store(false, std::memory_order_relaxed);
  }

 private:
  std::vector<std::atomic<bool>> rows_;
};

}  // namespace LINMU_ISA
}  // namespace linmu
