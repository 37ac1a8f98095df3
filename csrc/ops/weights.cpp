// The CPU ops that turn Gram matrices into task weights; schemas and reference are in fastmtl/ops.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../cpu/weights.h"
#include "../cpu/threads.h"
#include "../cpu/solve.h"
#include "solver_op.h"

namespace fastmtl::cpu {

namespace {

struct Cpu {
  struct Scope {
    explicit Scope(const Tensor&) {}
  };

  template <class Method, class... Arguments>
  static void solve(const Scope&, const Weighing& to, const Method& method, Tensor* residual, const Arguments&...) {
    cpu::solve(method, to.data, to.B, to.T, doubles(to.alpha), residual ? doubles(*residual) : nullptr);
  }
};

std::tuple<Tensor, Tensor> unit_solve_op(const Tensor& M, std::optional<Tensor> weights, double rtol) {
  check_not_negative("rtol", rtol);
  const Weighing to(M);
  check_vector("weights", weights, to.T, M);
  const Tensor cosines = empty_float64(leading(M, 1), to.gram);
  unit_solve(to.data, to.B, to.T, const_doubles(weights), rtol, doubles(to.alpha), doubles(cosines));
  return {to.alpha, cosines};
}

Tensor constant_op(const Tensor& M, std::optional<Tensor> weights) {
  const Weighing to(M);
  const bool same = weights && is_vector(*weights, to.T, M); // for all matrices
  FASTMTL_CHECK(
      !weights || same ||
          (weights->scalar_type() == ScalarType::Double && leading(*weights, 0) == leading(M, 1) &&
           weights->is_contiguous() && same_device(*weights, M)),
      "weights: expected a contiguous float64 tensor of shape [T] or [..., T] on the device of M, a ",
      describe(M),
      "; got ",
      describe_vector(*weights));
  constant(to.data, to.B, to.T, const_doubles(weights), same ? 0 : to.T, doubles(to.alpha));
  return to.alpha;
}

} // namespace

} // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("unit_solve", FASTMTL_CPU_OP(fastmtl::cpu::unit_solve_op));
  m.impl("constant", FASTMTL_CPU_OP(fastmtl::cpu::constant_op));
  fastmtl::for_each_solver([&]<class Method>(std::type_identity<Method>) {
    using Op = fastmtl::SolverOp<Method, fastmtl::cpu::Cpu>;
    m.impl(Method::kName, FASTMTL_CPU_OP(Op::run));
  });
}
