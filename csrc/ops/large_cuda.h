// More tasks than one block solves on a GPU. Aligned-MTL's weights then come from ops in Python that use
// torch's matrix products and Cholesky factorisations (fastmtl/ops/reference/products.py), without the host waiting.
// Other solvers run on the CPU, for which the host waits.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "../cuda/pipeline.h"
#include "cuda_call.h"
#include "gradients.h"

namespace fastmtl::cuda {

namespace { // as in tensors.h

template <class Argument>
Argument on_host(const Argument& x) {
  return x;
}

template <>
inline Tensor on_host(const Tensor& x) {
  return torch::stable::to(x, kHost); // waits: many tasks
}

template <>
inline std::optional<Tensor> on_host(const std::optional<Tensor>& x) {
  return x ? std::optional(on_host(*x)) : x;
}

// An op of this library, by its name, on the device of its arguments.
template <size_t results, class... Arguments>
std::array<Tensor, results> call_op(const char* op, const Arguments&... arguments) {
  StableIValue stack[std::max(results, sizeof...(arguments))] = {torch::stable::detail::from(arguments)...};
  const std::string name = std::string("fastmtl::") + op;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION));
  std::array<Tensor, results> found;
  for (size_t i = 0; i < results; ++i) {
    found[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return found;
}

// Copies results into the op's own tensors.
template <size_t results, class... Targets>
void take(const std::array<Tensor, results>& found, const Targets&... targets) {
  size_t i = 0;
  const auto copy = [&](Tensor target) { torch::stable::copy_(target, found[i++]); };
  (copy(targets), ...);
}

// α, eigenvalues and rank of `balance`.
inline std::array<Tensor, 3> balance_many(const Tensor& M, const Options& options) {
  return call_op<3>("balance_many", M, options.weights, options.scale, options.rtol, options.zero, options.rank_rule);
}

// `align` of more tasks than one block solves. Its second pass over G is decided on the device, as for fewer.
inline void align_many(
    const Batch& G,
    const Options& options,
    const Tensor& M,     // [B, T, T] or, for one matrix, [T, T]
    const Tensor& alpha, // [B, T] or [T]
    const Tensor& rank,  // [B] or []
    const Call& call) {
  const Context& context = call.context();
  const GramResult first = gram(G, false, {}, doubles(M), context);
  Tensor judged = M;
  if (first.judge != Judge::none) {
    const bool blocks = first.judge == Judge::blocks;
    const Tensor bound = empty_float64(leading(M, 2), M);
    check(cudaMemcpyAsync(
        doubles(bound), first.bound, size_t(G.matrices()) * sizeof(double), cudaMemcpyDeviceToDevice, context.stream));
    const auto [verdict] = call_op<1>("second_pass", M, bound, blocks);
    judged = blocks ? M : torch::stable::clone(M); // the public Gram matrix is not rescaled
    gram(G, true, Pass{static_cast<const Verdict*>(verdict.const_data_ptr())}, doubles(judged), context);
  }
  const auto found = balance_many(judged, options);
  take(std::array{found[0], found[2]}, alpha, rank);
  combine(G, const_doubles(alpha), context);
}

} // namespace

} // namespace fastmtl::cuda
