// The ops that turn Gram matrices into task weights, on CUDA tensors.
//
// Up to T = 64 nothing waits for the device. Beyond, the CPU's op gets copies: that waits, and cannot be captured in a
// CUDA graph.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "../cuda/solve.h"
#include "cuda_call.h"
#include "solver_op.h"

namespace fastmtl::cuda {

namespace {

template <class Argument>
Argument on_host(const Argument& x) {
  return x;
}

template <>
Tensor on_host(const Tensor& x) {
  return torch::stable::to(x, kHost); // waits: T > 64
}

template <>
std::optional<Tensor> on_host(const std::optional<Tensor>& x) {
  return x ? std::optional(on_host(*x)) : x;
}

template <class Option, class Argument>
void take_back([[maybe_unused]] const Argument& x, [[maybe_unused]] const Argument& there) {
  if constexpr (std::is_same_v<Option, State>) {
    Tensor updated = x;
    torch::stable::copy_(updated, there);
  }
}

// T > 64: the op on the CPU, M and the other arguments there.
template <class... Option, class... Arguments>
void solve_on_host(
    const char* name,
    const Weighing& weighing,
    Tensor* residual,
    const std::tuple<Option...>&,
    const Arguments&... arguments) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Tensor M = torch::stable::to(weighing.gram, kHost); // waits: T > 64
  const std::tuple<Arguments...> there(on_host(arguments)...);
  std::apply(
      [&](const Arguments&... values) {
        StableIValue stack[std::max<size_t>(2, 1 + sizeof...(values))] = {from(M), from(values)...};
        const std::string op = std::string("fastmtl::") + name;
        STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION));
        Tensor alpha = weighing.alpha;
        torch::stable::copy_(alpha, to<Tensor>(stack[0]));
        if (residual) {
          torch::stable::copy_(*residual, to<Tensor>(stack[1]));
        }
        (take_back<Option>(arguments, values), ...);
      },
      there);
}

struct Cuda {
  using Scope = Call;

  template <class Method, class... Arguments>
  static void
  solve(const Call& call, const Weighing& to, const Method& method, Tensor* residual, const Arguments&... arguments) {
    if (to.T <= kMaxJacobiTasks) {
      launch_solver(
          method, to.data, to.B, to.T, doubles(to.alpha), residual ? doubles(*residual) : nullptr, call.context());
    } else {
      solve_on_host(Method::kName, to, residual, Method::kOptions, arguments...);
    }
  }
};

} // namespace

} // namespace fastmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) {
  fastmtl::for_each_solver([&]<class Method>(std::type_identity<Method>) {
    using Op = fastmtl::SolverOp<Method, fastmtl::cuda::Cuda>;
    m.impl(Method::kName, TORCH_BOX(&Op::run));
  });
}
