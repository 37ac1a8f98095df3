// What the ops from Gram matrices to task weights share between devices.
#pragma once

#include <algorithm>
#include <optional>

#include "tensors.h"

namespace fastmtl {

namespace { // as in tensors.h

// Gram matrices as the solvers read them, and the memory for the weights.
struct Weighing {
  explicit Weighing(const Tensor& M) : given(M), gram(M) {
    check_square(M);
    if (M.scalar_type() != ScalarType::Double || !M.is_contiguous()) {
      gram = as_float64(M);
    }
    T = M.size(-1);
    B = M.numel() / (T * T);
    data = const_doubles(gram);
    alpha = empty_float64(leading(M, 1), gram);
  }

  Tensor residual() const {
    return empty_float64(leading(gram, 2), gram);
  }

  Tensor given, gram, alpha;
  int64_t B, T;
  const double* data; // [B, T, T]
};

inline void check_state(const char* name, const Tensor& x, const Tensor& M) {
  FASTMTL_CHECK(
      x.scalar_type() == ScalarType::Double && leading(x, 0) == leading(M, 0) && x.is_contiguous() && same_device(x, M),
      name,
      ": expected a contiguous float64 tensor of the shape ",
      shape_of(M),
      " on ",
      device_of(M),
      ", got ",
      describe_vector(x));
  FASTMTL_CHECK(!View(x).overlaps(View(M)), name, ": expected memory of its own, got some that overlaps M");
}

} // namespace

} // namespace fastmtl
