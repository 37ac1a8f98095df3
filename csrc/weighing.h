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
    data = static_cast<const double*>(gram.const_data_ptr());
    alpha = empty_float64(leading(M, 1), gram);
  }

  Tensor residual() const {
    return empty_float64(leading(gram, 2), gram);
  }

  Tensor gram, alpha;
  int64_t B, T;
  const double* data; // [B, T, T]
};

inline void check_weights(const std::optional<Tensor>& weights, int64_t T, const Tensor& M) {
  STD_TORCH_CHECK(
      !weights || (weights->dim() == 1 && weights->size(0) == T && weights->scalar_type() == ScalarType::Double &&
                   weights->is_contiguous() && same_device(*weights, M)),
      "weights: expected a contiguous float64 tensor of shape [",
      T,
      "] on the device of M, got shape ",
      weights ? shape_of(*weights) : "");
}

inline void check_targets(const Tensor& targets, const Tensor& M) {
  STD_TORCH_CHECK(
      targets.dim() == M.dim() && std::equal(targets.sizes().begin(), targets.sizes().end(), M.sizes().begin()) &&
          targets.scalar_type() == ScalarType::Double && targets.is_contiguous() && same_device(targets, M),
      "targets: expected a contiguous float64 tensor of shape ",
      shape_of(M),
      " on the device of M, got shape ",
      shape_of(targets));
}

} // namespace

} // namespace fastmtl
