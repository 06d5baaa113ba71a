// The layout planner's C interface, in liblinmu_cpu.so: linmu_ops/_planner.py calls it through ctypes, so a wheel holds
// no symbol of CPython. csrc/python/token_layout.cpp is the same class for pybind11.
#include "../linmu/token_layout.h"

#include <cstdio>
#include <exception>

#include "../linmu/common.h"

using linmu::Plan;
using linmu::Triple;

namespace {

// 0; 1 where the arguments are refused; 2 where memory or something else is. `message` then says why.
template <class F>
int guarded(char* message, int size, F&& f) noexcept {
  try {
    f();
    return 0;
  } catch (const std::invalid_argument& e) {
    std::snprintf(message, size, "%s", e.what());
    return 1;
  } catch (const std::exception& e) {
    std::snprintf(message, size, "TokenLayout: %s", e.what());
    return 2;
  }
}

}  // namespace

LINMU_EXPORT int linmu_plan_version() { return linmu::kPlanVersion; }

// blocks (num_blocks, 4), positions (num_visual,): copied. *plan is to be freed.
LINMU_EXPORT int linmu_plan_new(const int64_t* blocks, int64_t num_blocks, const int64_t* positions, int64_t num_visual,
                                int64_t batch_size, int64_t length, Plan** plan, char* message, int size) {
  return guarded(message, size,
                 [&] { *plan = new Plan(blocks, num_blocks, positions, num_visual, batch_size, length); });
}

LINMU_EXPORT void linmu_plan_free(const Plan* plan) { delete plan; }

// mask, index: (batch_size, length).
LINMU_EXPORT int linmu_plan_segments(const Plan* plan, bool* mask, int32_t* index, char* message, int size) {
  return guarded(message, size, [&] { plan->segments(mask, index); });
}

// order: (batch_size, length).
LINMU_EXPORT int linmu_plan_scan_order(const Plan* plan, int64_t mode, int32_t* order, char* message, int size) {
  return guarded(message, size, [&] { plan->scan_order(mode < 0 || mode > 3 ? -1 : static_cast<int>(mode), order); });
}

// triples: window, shift, image_window, image_shift. tokens, coords: (num_visual,). offsets: (num_visual + 1,), of
// which found[0] are written. found[1]: tokens of the largest window.
LINMU_EXPORT int linmu_plan_window_table(const Plan* plan, const int64_t* triples, int wrap_mask, int32_t* tokens,
                                         int32_t* offsets, int32_t* coords, int64_t* found, char* message, int size) {
  return guarded(message, size, [&] {
    const auto triple = [&](int i) { return Triple{triples[3 * i], triples[3 * i + 1], triples[3 * i + 2]}; };
    const linmu::WindowTable table = plan->window_table(triple(0), triple(1), triple(2), triple(3), wrap_mask != 0);
    std::copy(table.tokens.begin(), table.tokens.end(), tokens);
    std::copy(table.offsets.begin(), table.offsets.end(), offsets);
    std::copy(table.coords.begin(), table.coords.end(), coords);
    found[0] = static_cast<int64_t>(table.offsets.size());
    found[1] = table.max_tokens;
  });
}
