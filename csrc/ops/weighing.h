// What the ops that turn Gram matrices into task weights share between devices.
#pragma once

#include <algorithm>
#include <optional>

#include "tensors.h"

namespace fastmtl {

namespace { // as in tensors.h

// Gram matrices as the solvers read them, and where the weights go.
struct Weighing {
  explicit Weighing(const Tensor& M) : gram(M) {
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

  Tensor gram, alpha;
  int64_t B, T;
  const double* data; // [B, T, T]
};

inline void check_power(double power) {
  FASTMTL_CHECK(power > 0.0 && std::isfinite(power), "power: expected a finite number > 0, got ", power);
}

inline void check_beta(double beta) {
  FASTMTL_CHECK(beta >= 0.0 && beta <= 1.0, "beta: expected a number in [0, 1], got ", beta);
}

inline void check_targets(const Tensor& targets, const Tensor& M) {
  FASTMTL_CHECK(
      targets.scalar_type() == ScalarType::Double && leading(targets, 0) == leading(M, 0) && targets.is_contiguous() &&
          same_device(targets, M),
      "targets: expected a contiguous float64 tensor of the shape ",
      shape_of(M),
      " and device of M, got ",
      describe_vector(targets));
  FASTMTL_CHECK(!View(targets).overlaps(View(M)), "targets: expected memory of its own, got some that overlaps M");
}

} // namespace

} // namespace fastmtl
