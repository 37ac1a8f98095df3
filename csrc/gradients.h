// Gradient matrices as the kernels see them: addresses of rows, wherever autograd left them. Torch-free.
#pragma once

#include <cstdint>

namespace fastmtl {

enum class Dtype { f32, f64, bf16, f16 };

// One tensor of every task: T rows of `length` elements each, in one dense layout.
struct Segment {
  const void* const* rows; // [T] -> [length], null where the task has no gradient
  void* out;               // [length], written by combine
  int64_t length;
  Dtype dtype;
};

// A gradient matrix: T rows, its columns being those of K segments in turn. Nothing is concatenated.
struct Gradients {
  const Segment* segments; // [K]
  int64_t count;           // K
  int64_t tasks;           // T
};

constexpr int64_t element_size(Dtype dtype) { // bytes
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

} // namespace fastmtl
