// The ops that turn Gram matrices into task weights, on CUDA tensors.
//
// Up to T = 64 nothing waits for the device. Beyond, the CPU's op gets copies: that waits, and cannot be captured in a
// CUDA graph.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "weighing.h"
#include "cuda_call.h"
#include "../cuda/weights.h"

namespace fastmtl::cuda {

namespace {

// T > 64: the op of this name on the CPU, M and the other arguments there.
template <class... Arguments>
void on_host(const char* op, const Weighing& weighing, Tensor* residual, const Arguments&... arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Tensor M = torch::stable::to(weighing.gram, kHost); // waits: T > 64
  StableIValue stack[std::max<size_t>(2, 1 + sizeof...(arguments))] = {from(M), from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION));
  Tensor alpha = weighing.alpha;
  torch::stable::copy_(alpha, to<Tensor>(stack[0]));
  if (residual) {
    torch::stable::copy_(*residual, to<Tensor>(stack[1]));
  }
}

std::tuple<Tensor, Tensor> mgda_op(const Tensor& M) {
  const Call call(M);
  const Weighing to(M);
  Tensor residual = to.residual();
  if (to.T > kMaxJacobiTasks) {
    on_host("fastmtl::mgda", to, &residual);
  } else {
    mgda(to.data, to.B, to.T, doubles(to.alpha), doubles(residual), call.context());
  }
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> dual_cone_op(const Tensor& M, std::optional<Tensor> weights, bool each) {
  const Call call(M);
  const Weighing to(M);
  check_vector("weights", weights, to.T, M);
  Tensor residual = to.residual();
  if (to.T > kMaxJacobiTasks) {
    std::optional<Tensor> there;
    if (weights) {
      there = torch::stable::to(*weights, kHost); // waits: T > 64
    }
    on_host("fastmtl::dual_cone", to, &residual, there, each);
  } else {
    dual_cone(to.data, to.B, to.T, const_doubles(weights), each, doubles(to.alpha), doubles(residual), call.context());
  }
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> cagrad_op(const Tensor& M, double c) {
  check_not_negative("c", c);
  const Call call(M);
  const Weighing to(M);
  Tensor residual = to.residual();
  if (to.T > kMaxJacobiTasks) {
    on_host("fastmtl::cagrad", to, &residual, c);
  } else {
    cagrad(to.data, to.B, to.T, c, doubles(to.alpha), doubles(residual), call.context());
  }
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> nash_op(const Tensor& M, double power) {
  check_power(power);
  const Call call(M);
  const Weighing to(M);
  Tensor residual = to.residual();
  if (to.T > kMaxJacobiTasks) {
    on_host("fastmtl::nash", to, &residual, power);
  } else {
    nash(to.data, to.B, to.T, power, doubles(to.alpha), doubles(residual), call.context());
  }
  return {to.alpha, residual};
}

Tensor pcgrad_op(const Tensor& M, const Tensor& seed, bool per_task) {
  const Call call(M);
  const Weighing to(M);
  check_seed(seed, M);
  if (to.T > kMaxJacobiTasks) {
    const Tensor there = torch::stable::to(seed, kHost); // waits: T > 64
    on_host("fastmtl::pcgrad", to, nullptr, there, per_task);
  } else {
    const auto* key = static_cast<const int64_t*>(seed.const_data_ptr());
    pcgrad(to.data, to.B, to.T, key, per_task, doubles(to.alpha), call.context());
  }
  return to.alpha;
}

Tensor gradvac_op(const Tensor& M, const Tensor& seed, double beta, Tensor targets) {
  const Call call(M);
  const Weighing to(M);
  check_seed(seed, M);
  check_beta(beta);
  check_targets(targets, M);
  mark_written("targets", targets);
  if (to.T > kMaxJacobiTasks) {
    const Tensor there = torch::stable::to(seed, kHost);      // waits: T > 64
    const Tensor updated = torch::stable::to(targets, kHost); // waits: T > 64
    on_host("fastmtl::gradvac", to, nullptr, there, beta, updated);
    torch::stable::copy_(targets, updated);
  } else {
    const auto* key = static_cast<const int64_t*>(seed.const_data_ptr());
    gradvac(to.data, to.B, to.T, key, beta, doubles(targets), doubles(to.alpha), call.context());
  }
  return to.alpha;
}

} // namespace

} // namespace fastmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) {
  m.impl("mgda", TORCH_BOX(&fastmtl::cuda::mgda_op));
  m.impl("dual_cone", TORCH_BOX(&fastmtl::cuda::dual_cone_op));
  m.impl("cagrad", TORCH_BOX(&fastmtl::cuda::cagrad_op));
  m.impl("nash", TORCH_BOX(&fastmtl::cuda::nash_op));
  m.impl("pcgrad", TORCH_BOX(&fastmtl::cuda::pcgrad_op));
  m.impl("gradvac", TORCH_BOX(&fastmtl::cuda::gradvac_op));
}
