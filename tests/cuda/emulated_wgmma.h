// The warpgroup's product of csrc/cuda/wgmma.cuh in plain C++, for emulator.h. An operand is read as the PTX manual
// lays it out without swizzling. Its results are there at once; proxies and their fences are not emulated.
#pragma once
#include <cstdlib>
#include <vector>

namespace linmu {

inline int architecture(const char*) {
  const char* chosen = std::getenv("LINMU_CUDA_ARCH");
  return chosen ? std::atoi(chosen) : 80;
}

struct Operand {
  const unsigned char* first;
  int leading, stride;
};
inline Operand operand(const void* first, int leading, int stride) {
  emulator::check_aligned(first);
  return {static_cast<const unsigned char*>(first), leading, stride};
}

namespace emulator {

struct Meeting {
  int arrived = 0, live = 128;
  uint64_t turn = 0;
};

// The fragments that the 128 threads of a warpgroup give each other.
struct Given {
  unsigned a[4];
};
inline const Given* exchange_in_group(const Given& mine) {
  static std::vector<Meeting> meetings(8);
  static std::vector<Given> given(8 * 2 * 128);
  const int group = self().number / 128;
  Given* gifts = given.data() + (group * 2 + meetings[group].turn % 2) * 128;
  gifts[self().number % 128] = mine;
  meet(meetings[group]);
  return gifts;
}

template <class T>
float value_at(const unsigned char* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return to_float(value);
}

// a(row, k) for the thread's rows of the warpgroup's 64.
template <class T, int kByDepth, class A>
void group_product(GroupSums& d, const Operand& b, A&& a) {
  const int lane = self().number % kLanes;
  for (int j = 0; j < 8; ++j)
    for (int e = 0; e < 4; ++e) {
      const int row = self().number % 128 / kLanes * 16 + lane / 4 + e / 2 * 8, n = j * 8 + lane % 4 * 2 + e % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        const int at = kByDepth ? n / 8 * b.stride + k / 8 * b.leading + k % 8 * 16 + n % 8 * 2
                                : k / 8 * b.leading + n / 8 * b.stride + n % 8 * 16 + k % 8 * 2;
        sum += a(row, k) * value_at<T>(b.first + at);
      }
      d.v[0][j][e] += sum;
    }
}

}  // namespace emulator

template <class T, int kByDepth>
inline void group_mma(GroupSums& d, const Operand& a, const Operand& b) {
  emulator::exchange_in_group({});
  emulator::group_product<T, kByDepth>(d, b, [&](int row, int k) {
    return emulator::value_at<T>(a.first + k / 8 * a.leading + row / 8 * a.stride + row % 8 * 16 + k % 8 * 2);
  });
}
template <class T, int kByDepth>
inline void group_mma(GroupSums& d, const unsigned (&a)[4], const Operand& b) {
  const emulator::Given* all = emulator::exchange_in_group({{a[0], a[1], a[2], a[3]}});
  emulator::group_product<T, kByDepth>(d, b, [&](int row, int k) {
    const int owner = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
    return to_float(T{emulator::bits_of(all[owner].a[row % 16 / 8 + k / 8 * 2], k % 2)});
  });
}

inline void group_sync() { emulator::exchange_in_group({}); }
inline void group_begin() {}
inline void group_end() {}
inline void group_hold(GroupSums&) {}
inline void group_publish() {}

}  // namespace linmu
