// gradients -> Gram -> weights -> combine on a GPU: which kernels run, in which order, on how much memory. Torch-free.
// Nothing here waits for the device or asks it anything, so that all of it can be captured in a CUDA graph.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "../gradients.h"
#include "kernels.h"

namespace fastmtl::cuda {

// Where and with what the kernels run.
struct Context {
  cudaStream_t stream;
  std::function<void*(int64_t)> allocate; // so many bytes of device memory, until the launches are queued
  bool slow_float64;                      // consumer cards have a 64th of the float32 rate, others half of it
  int64_t shared_limit;                   // bytes of shared memory that a block can have
};

template <class X>
X* allocate(const Context& context, int64_t count) { // [count]
  return static_cast<X*>(context.allocate(std::max<int64_t>(count, 1) * int64_t(sizeof(X))));
}

// B gradient matrices of T tasks on the device: for each type of gradient a source.
class Batch {
 public:
  // [B, T, P] by strides in bytes; `out` [B, P] or null.
  Batch(
      const char* base,
      int64_t B,
      int64_t T,
      int64_t P,
      int64_t next_matrix,
      int64_t next_row,
      char* out,
      int64_t next_out,
      Dtype dtype);

  // One matrix, T rows of K tensors.
  Batch(const Gradients& G, const Context& context);

  struct Part {
    Dtype dtype;
    Source source;
  };
  int64_t matrices() const {
    return B_;
  }
  int64_t tasks() const {
    return T_;
  }
  int64_t columns() const {
    return P_;
  }
  const std::vector<Part>& parts() const {
    return parts_;
  }
  bool has(Dtype dtype) const;
  // The list, where a row of a tensor is missing in it; else no part.
  const Sources& with_missing() const {
    return with_missing_;
  }

 private:
  int64_t B_, T_, P_;
  std::vector<Part> parts_;
  Sources with_missing_{};
};

// M = G Gᵀ, exact (products and sums in float64) or in float32 blocks where those pay; and how to judge it.
struct GramResult {
  Judge judge;
  double* bound; // [B]: the largest float64 entry, or the λ_min(C) that blocks need; null where nothing is judged
};
GramResult gram(const Batch& G, bool exact, Pass pass, double* M, const Context& context);

// Whether one block solves the eigenproblem of so many tasks: M has to fit shared memory.
bool in_one_block(int64_t T, const Context& context);

void balance(
    const double* M, // [B, T, T], in one block each
    int64_t B,
    int64_t T,
    const Policy& policy,
    const Weights& weights,
    const Context& context);

void combine(const Batch& G, const double* alpha, const Context& context); // alpha [B, T]

// GradDrop; the seed is read on the device.
void sign_drop(
    const Batch& G,
    const int64_t* seed, // [1]
    const double* leak,  // [T], or null where nothing leaks
    const Context& context);

// All three; the weights in one block.
void align(
    const Batch& G,
    const Policy& policy,
    double* M, // [B, T, T], or null together with what `weights` holds: not wanted. Eigenvalues are not computed
    const Weights& weights,
    const Context& context);

void eigh(
    const double* M, // [B, T, T], in one block each
    int64_t B,
    int64_t T,
    double* eigenvalues,  // [B, T], ascending
    double* eigenvectors, // [B, T, T], columns
    const Context& context);

} // namespace fastmtl::cuda
