// Queries, keys and values as kernels of attention read them.
#pragma once
#include "../linmu/window_attention.h"
#include "checks.h"

namespace linmu {

// Rows of P adjacent elements can be read where they lie; anything else is copied first.
inline TokenRows<const void*> rows(Tensor& t) {
  if (t.size(3) > 1 && t.stride(3) != 1) t = torch::stable::contiguous(t);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace linmu
