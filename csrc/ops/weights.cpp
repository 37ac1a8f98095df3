// The CPU ops that turn Gram matrices into task weights; schemas and reference are in fastmtl/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../cpu/pipeline.h"
#include "../cpu/threads.h"
#include "../cpu/weights.h"
#include "weighing.h"

namespace fastmtl::cpu {

namespace {

std::tuple<Tensor, Tensor> mgda_op(const Tensor& M) {
  const Weighing to(M);
  const Tensor residual = to.residual();
  mgda(to.data, to.B, to.T, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> dual_cone_op(const Tensor& M, std::optional<Tensor> weights, bool each) {
  const Weighing to(M);
  check_vector("weights", weights, to.T, M);
  const Tensor residual = to.residual();
  dual_cone(to.data, to.B, to.T, const_doubles(weights), each, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> cagrad_op(const Tensor& M, double c) {
  check_not_negative("c", c);
  const Weighing to(M);
  const Tensor residual = to.residual();
  cagrad(to.data, to.B, to.T, c, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> nash_op(const Tensor& M, double power) {
  check_power(power);
  const Weighing to(M);
  const Tensor residual = to.residual();
  nash(to.data, to.B, to.T, power, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

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

uint64_t seed_of(const Tensor& seed, const Tensor& M) {
  check_seed(seed, M);
  return uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

Tensor pcgrad_op(const Tensor& M, const Tensor& seed, bool per_task) {
  const Weighing to(M);
  pcgrad(to.data, to.B, to.T, seed_of(seed, M), per_task, doubles(to.alpha));
  return to.alpha;
}

Tensor gradvac_op(const Tensor& M, const Tensor& seed, double beta, Tensor targets) {
  const Weighing to(M);
  const uint64_t key = seed_of(seed, M);
  check_beta(beta);
  check_targets(targets, M);
  mark_written("targets", targets);
  gradvac(to.data, to.B, to.T, key, beta, doubles(targets), doubles(to.alpha));
  return to.alpha;
}

} // namespace

} // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("mgda", FASTMTL_CPU_OP(fastmtl::cpu::mgda_op));
  m.impl("dual_cone", FASTMTL_CPU_OP(fastmtl::cpu::dual_cone_op));
  m.impl("cagrad", FASTMTL_CPU_OP(fastmtl::cpu::cagrad_op));
  m.impl("nash", FASTMTL_CPU_OP(fastmtl::cpu::nash_op));
  m.impl("unit_solve", FASTMTL_CPU_OP(fastmtl::cpu::unit_solve_op));
  m.impl("constant", FASTMTL_CPU_OP(fastmtl::cpu::constant_op));
  m.impl("pcgrad", FASTMTL_CPU_OP(fastmtl::cpu::pcgrad_op));
  m.impl("gradvac", FASTMTL_CPU_OP(fastmtl::cpu::gradvac_op));
}
