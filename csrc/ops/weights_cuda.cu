// The ops that turn Gram matrices into task weights, on CUDA tensors.
//
// Up to T = 64, and where tasks are visited one after the other (`kManyTasks`), nothing waits for the device. Beyond,
// the CPU's op gets copies: that waits, and cannot be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/solve.h"
#include "cuda_call.h"
#include "large_cuda.h"
#include "solver_op.h"

namespace fastmtl::cuda {

namespace {

template <class Option, class Argument>
void take_back([[maybe_unused]] const Argument& x, [[maybe_unused]] const Argument& there) {
  if constexpr (std::is_same_v<Option, State>) {
    Tensor updated = x;
    torch::stable::copy_(updated, there);
  }
}

// Of more than kMaxSolverTasks: the op on the CPU, M and the other arguments there.
template <class... Option, class... Arguments>
void solve_on_host(
    const char* name,
    const Weighing& weighing,
    Tensor* residual,
    const std::tuple<Option...>&,
    const Arguments&... arguments) {
  const std::tuple<Arguments...> there(on_host(arguments)...);
  std::apply(
      [&](const Arguments&... values) {
        if (residual) {
          take(call_op<2>(name, on_host(weighing.gram), values...), weighing.alpha, *residual);
        } else {
          take(call_op<1>(name, on_host(weighing.gram), values...), weighing.alpha);
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
    if (Method::kManyTasks || to.T <= kMaxSolverTasks) {
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
