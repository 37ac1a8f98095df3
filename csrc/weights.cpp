// The CPU ops that turn Gram matrices into task weights; schemas and reference are in fastmtl/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/pipeline.h"
#include "cpu/weights.h"
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
  check_weights(weights, to.T, M);
  const Tensor residual = to.residual();
  dual_cone(to.data, to.B, to.T, weights ? doubles(*weights) : nullptr, each, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> cagrad_op(const Tensor& M, double c) {
  const Weighing to(M);
  const Tensor residual = to.residual();
  cagrad(to.data, to.B, to.T, c, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> nash_op(const Tensor& M, double power) {
  const Weighing to(M);
  const Tensor residual = to.residual();
  nash(to.data, to.B, to.T, power, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> unit_solve_op(const Tensor& M, std::optional<Tensor> weights, double rtol) {
  const Weighing to(M);
  check_weights(weights, to.T, M);
  const Tensor cosines = empty_float64(leading(M, 1), to.gram);
  const double* w = weights ? static_cast<const double*>(weights->const_data_ptr()) : nullptr;
  unit_solve(to.data, to.B, to.T, w, rtol, doubles(to.alpha), doubles(cosines));
  return {to.alpha, cosines};
}

Tensor constant_op(const Tensor& M, std::optional<Tensor> weights) {
  const Weighing to(M);
  const bool same = weights && weights->numel() == to.T; // for all matrices
  STD_TORCH_CHECK(
      !weights || ((same || weights->numel() == to.B * to.T) && weights->scalar_type() == ScalarType::Double &&
                   weights->is_contiguous() && same_device(*weights, M)),
      "weights: expected contiguous float64 weights of ",
      to.T,
      " tasks on the device of M, got shape ",
      weights ? shape_of(*weights) : "");
  const double* w = weights ? static_cast<const double*>(weights->const_data_ptr()) : nullptr;
  constant(to.data, to.B, to.T, w, same ? 0 : to.T, doubles(to.alpha));
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
  check_targets(targets, M);
  gradvac(to.data, to.B, to.T, seed_of(seed, M), beta, doubles(targets), doubles(to.alpha));
  return to.alpha;
}

} // namespace

} // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("mgda", TORCH_BOX(&fastmtl::cpu::mgda_op));
  m.impl("dual_cone", TORCH_BOX(&fastmtl::cpu::dual_cone_op));
  m.impl("cagrad", TORCH_BOX(&fastmtl::cpu::cagrad_op));
  m.impl("nash", TORCH_BOX(&fastmtl::cpu::nash_op));
  m.impl("unit_solve", TORCH_BOX(&fastmtl::cpu::unit_solve_op));
  m.impl("constant", TORCH_BOX(&fastmtl::cpu::constant_op));
  m.impl("pcgrad", TORCH_BOX(&fastmtl::cpu::pcgrad_op));
  m.impl("gradvac", TORCH_BOX(&fastmtl::cpu::gradvac_op));
}
