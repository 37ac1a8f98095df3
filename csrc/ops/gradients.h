// The ops on gradients, for every device: torch's arguments are checked here and turned into rows, on which the
// device's pipeline runs. Schemas, fakes and the reference implementation are in fastmtl/ops.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace fastmtl {

namespace { // as in tensors.h

// A policy as Python passes it.
struct Options {
  std::optional<Tensor> weights;
  std::string scale;
  double rtol, zero;
  std::string rank_rule;

  Policy policy(int64_t T, const Tensor& like) const {
    return policy_of(weights, T, scale, rtol, zero, rank_rule, like);
  }
};

template <class Device>
struct GradientOps {
  using Scope = typename Device::Scope;

  static Tensor gram(const Tensor& G) {
    const Scope scope(G);
    const Strided matrix(G);
    std::vector<int64_t> size = leading(G, 1);
    size.push_back(matrix.T);
    const Tensor M = empty_float64(size, G);
    Device::gram(Device::batch(matrix, scope), M, scope);
    return M;
  }

  // `out` is checked here, before a method solves anything and changes its state.
  static Tensor gram_rows(const Handles& handles, int64_t tasks, const std::optional<std::vector<Tensor>>& out) {
    const TensorList grads(handles);
    const Tensor like = any_of(grads);
    const Scope scope(like);
    const RaggedRows rows(grads, tasks, out ? &*out : nullptr, like);
    const Tensor M = empty_float64({tasks, tasks}, like);
    Device::gram(Device::batch(rows, scope), M, scope);
    return M;
  }

  static std::tuple<Tensor, Tensor, Tensor> balance(
      const Tensor& M,
      std::optional<Tensor> weights,
      std::string scale,
      double rtol,
      double zero,
      std::string rank_rule) {
    check_square(M);
    const Scope scope(M);
    const Tensor wide = as_float64(M);
    const Tensor alpha = empty_float64(leading(M, 1), wide), eigenvalues = empty_float64(leading(M, 1), wide);
    const Tensor rank = empty_int64(leading(M, 2), wide);
    Device::balance(wide, {weights, scale, rtol, zero, rank_rule}, alpha, &eigenvalues, rank, scope);
    return {alpha, eigenvalues, rank};
  }

  static std::tuple<Tensor, Tensor> align_gram(
      const Tensor& M,
      std::optional<Tensor> weights,
      std::string scale,
      double rtol,
      double zero,
      std::string rank_rule) {
    check_square(M);
    const Scope scope(M);
    const Tensor wide = as_float64(M);
    const Tensor alpha = empty_float64(leading(M, 1), wide), rank = empty_int64(leading(M, 2), wide);
    Device::balance(wide, {weights, scale, rtol, zero, rank_rule}, alpha, nullptr, rank, scope);
    return {alpha, rank};
  }

  static void combine(const Tensor& G, const Tensor& alpha, Tensor out) {
    const Scope scope(G);
    Strided matrix(G, &out);
    check_alpha(alpha, G);
    check_apart(alpha, out);
    matrix.start();
    Device::combine(Device::batch(matrix, scope), alpha, scope);
    matrix.finish();
  }

  static void combine_rows(const Handles& handles, const Tensor& alpha, const std::vector<Tensor>& out) {
    const TensorList grads(handles);
    const Scope scope(alpha);
    RaggedRows rows(grads, check_alpha(alpha, grads, out), &out, alpha);
    rows.start();
    Device::combine(Device::batch(rows, scope), alpha, scope);
    rows.finish();
  }

  static void sign_drop(const Tensor& G, const Tensor& seed, std::optional<Tensor> leak, Tensor out) {
    const Scope scope(G);
    Strided matrix(G, &out);
    check_seed(seed, G);
    check_vector("leak", leak, matrix.T, G);
    matrix.start();
    Device::sign_drop(Device::batch(matrix, scope), seed, leak, scope);
    matrix.finish();
  }

  static void sign_drop_rows(
      const Handles& handles,
      int64_t tasks,
      const Tensor& seed,
      std::optional<Tensor> leak,
      const std::vector<Tensor>& out) {
    const TensorList grads(handles);
    const Tensor like = any_of(grads);
    const Scope scope(like);
    RaggedRows rows(grads, tasks, &out, like);
    check_seed(seed, like);
    check_vector("leak", leak, tasks, like);
    rows.start();
    Device::sign_drop(Device::batch(rows, scope), seed, leak, scope);
    rows.finish();
  }

  static void align(
      const Tensor& G,
      std::optional<Tensor> weights,
      std::string scale,
      double rtol,
      double zero,
      std::string rank_rule,
      Tensor out) {
    const Scope scope(G);
    Strided matrix(G, &out);
    const Options options{weights, scale, rtol, zero, rank_rule};
    const Policy policy = options.policy(matrix.T, G);
    matrix.start();
    Device::align(Device::batch(matrix, scope), options, policy, G, scope);
    matrix.finish();
  }

  static std::tuple<Tensor, Tensor, Tensor> align_rows(
      const Handles& handles,
      int64_t tasks,
      std::optional<Tensor> weights,
      std::string scale,
      double rtol,
      double zero,
      std::string rank_rule,
      const std::vector<Tensor>& out) {
    const TensorList grads(handles);
    const Tensor like = any_of(grads);
    const Scope scope(like);
    RaggedRows rows(grads, tasks, &out, like);
    const Options options{weights, scale, rtol, zero, rank_rule};
    const Policy policy = options.policy(tasks, like);
    rows.start();
    const Tensor M = empty_float64({tasks, tasks}, like), alpha = empty_float64({tasks}, like),
                 rank = empty_int64({}, like);
    Device::align(Device::batch(rows, scope), options, policy, M, alpha, rank, scope);
    rows.finish();
    return {M, alpha, rank};
  }
};

} // namespace

} // namespace fastmtl

// All of them, for a STABLE_TORCH_LIBRARY_IMPL block; `wrap` boxes a function.
#define FASTMTL_GRADIENT_OPS(m, Ops, wrap)             \
  m.impl("gram", wrap(Ops::gram));                     \
  m.impl("gram_rows", wrap(Ops::gram_rows));           \
  m.impl("balance", wrap(Ops::balance));               \
  m.impl("align_gram", wrap(Ops::align_gram));         \
  m.impl("combine", wrap(Ops::combine));               \
  m.impl("combine_rows", wrap(Ops::combine_rows));     \
  m.impl("sign_drop", wrap(Ops::sign_drop));           \
  m.impl("sign_drop_rows", wrap(Ops::sign_drop_rows)); \
  m.impl("align", wrap(Ops::align));                   \
  m.impl("align_rows", wrap(Ops::align_rows))
