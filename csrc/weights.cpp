// The CPU ops that turn Gram matrices into task weights; schemas and reference are in fastmtl/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/weights.h"
#include "tensors.h"

namespace fastmtl::cpu {

namespace {

// Gram matrices as the solvers read them, and where the weights go.
struct Weighing {
  explicit Weighing(const Tensor& M) : gram(M) {
    check_square(M);
    if (M.scalar_type() != ScalarType::Double || !M.is_contiguous()) {
      gram = as_float64(M);
    }
    T = M.size(-1);
    B = M.numel() / (T * T);
    data = static_cast<const double*>(gram.const_data_ptr());
    alpha = empty_float64(leading(M, 1), gram);
  }

  Tensor residual() const {
    return empty_float64(leading(gram, 2), gram);
  }

  Tensor gram, alpha;
  int64_t B, T;
  const double* data; // [B, T, T]
};

std::tuple<Tensor, Tensor> mgda_op(const Tensor& M) {
  const Weighing to(M);
  const Tensor residual = to.residual();
  mgda(to.data, to.B, to.T, doubles(to.alpha), doubles(residual));
  return {to.alpha, residual};
}

std::tuple<Tensor, Tensor> dual_cone_op(const Tensor& M, std::optional<Tensor> weights, bool each) {
  const Weighing to(M);
  if (weights) {
    STD_TORCH_CHECK(
        weights->dim() == 1 && weights->size(0) == to.T && weights->scalar_type() == ScalarType::Double &&
            weights->is_contiguous() && weights->is_cpu(),
        "weights: expected a contiguous float64 tensor of shape [",
        to.T,
        "] on the device of M, got shape ",
        shape_of(*weights));
  }
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
  STD_TORCH_CHECK(
      View(targets).dims == M.dim() && std::equal(targets.sizes().begin(), targets.sizes().end(), M.sizes().begin()) &&
          targets.scalar_type() == ScalarType::Double && targets.is_contiguous() && same_device(targets, M),
      "targets: expected a contiguous float64 tensor of shape ",
      shape_of(M),
      " on the device of M, got shape ",
      shape_of(targets));
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
  m.impl("pcgrad", TORCH_BOX(&fastmtl::cpu::pcgrad_op));
  m.impl("gradvac", TORCH_BOX(&fastmtl::cpu::gradvac_op));
}
