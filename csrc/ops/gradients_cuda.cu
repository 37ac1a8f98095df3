// The ops on gradients, and on matrices, of CUDA tensors, on the current stream.
//
// Nothing waits for the device, but `eigh` of many tasks, as torch.linalg.eigh does.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cuda_call.h"
#include "gradients.h"
#include "large_cuda.h"

namespace fastmtl::cuda {

namespace {

struct Cuda {
  using Scope = Call;

  static Batch batch(const Strided& G, const Call&) {
    return Batch(G.base, G.B, G.T, G.P, G.next_matrix, G.next_row, G.out, G.next_out, G.dtype);
  }
  static Batch batch(const RaggedRows& G, const Call& call) {
    return Batch(G.gradients(), call.context());
  }

  static void gram(const Batch& G, const Tensor& M, const Call& call) {
    cuda::gram(G, true, {}, doubles(M), call.context());
  }

  static void balance(
      const Tensor& M, // [..., T, T] float64
      const Options& options,
      const Tensor& alpha,
      const Tensor* eigenvalues, // null where nobody wants them
      const Tensor& rank,
      const Call& call) {
    const int64_t T = M.size(-1), B = M.numel() / (T * T);
    const Policy policy = options.policy(T, M);
    if (in_one_block(T, call.context())) {
      const Weights weights{
          doubles(alpha),
          eigenvalues ? doubles(*eigenvalues) : nullptr,
          static_cast<int64_t*>(rank.mutable_data_ptr())};
      cuda::balance(const_doubles(M), B, T, policy, weights, call.context());
    } else {
      const auto found = balance_many(M, options);
      take(std::array{found[0], found[2]}, alpha, rank);
      if (eigenvalues) {
        take(std::array{found[1]}, *eigenvalues);
      }
    }
  }

  static void combine(const Batch& G, const Tensor& alpha, const Call& call) {
    cuda::combine(G, const_doubles(alpha), call.context());
  }

  static void sign_drop(const Batch& G, const Tensor& seed, const std::optional<Tensor>& leak, const Call& call) {
    cuda::sign_drop(G, static_cast<const int64_t*>(seed.const_data_ptr()), const_doubles(leak), call.context());
  }

  static void
  align(const Batch& G, const Options& options, const Policy& policy, const Tensor& like, const Call& call) {
    if (!in_one_block(G.tasks(), call.context())) {
      const int64_t B = G.matrices(), T = G.tasks();
      align_many(G, options, empty_float64({B, T, T}, like), empty_float64({B, T}, like), empty_int64({B}, like), call);
    } else {
      cuda::align(G, policy, nullptr, {}, call.context());
    }
  }

  static void align(
      const Batch& G,
      const Options& options,
      const Policy& policy,
      const Tensor& M,
      const Tensor& alpha,
      const Tensor& rank,
      const Call& call) {
    if (!in_one_block(G.tasks(), call.context())) {
      align_many(G, options, M, alpha, rank, call);
      return;
    }
    const Weights weights{doubles(alpha), nullptr, static_cast<int64_t*>(rank.mutable_data_ptr())};
    cuda::align(G, policy, doubles(M), weights, call.context());
  }
};

std::tuple<Tensor, Tensor> eigh_op(const Tensor& M) {
  check_square(M, 0);
  const Call call(M);
  const int64_t T = M.size(-1);
  const Tensor wide = as_float64(M);
  if (!in_one_block(T, call.context())) {
    const auto [eigenvalues, eigenvectors] = call_op<2>("eigh", on_host(wide));
    return {
        torch::stable::to(eigenvalues, M.scalar_type(), std::nullopt, M.device()),
        torch::stable::to(eigenvectors, M.scalar_type(), std::nullopt, M.device())};
  }
  const Tensor eigenvalues = empty_float64(leading(M, 1), wide), eigenvectors = empty_float64(leading(M, 0), wide);
  if (T > 0) {
    eigh(const_doubles(wide), M.numel() / (T * T), T, doubles(eigenvalues), doubles(eigenvectors), call.context());
  }
  return {torch::stable::to(eigenvalues, M.scalar_type()), torch::stable::to(eigenvectors, M.scalar_type())};
}

using Ops = GradientOps<Cuda>;

} // namespace

} // namespace fastmtl::cuda

#define FASTMTL_CUDA_OP(op) TORCH_BOX(&op)

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) {
  FASTMTL_GRADIENT_OPS(m, fastmtl::cuda::Ops, FASTMTL_CUDA_OP);
  m.impl("eigh", FASTMTL_CUDA_OP(fastmtl::cuda::eigh_op));
}
