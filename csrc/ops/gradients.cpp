// The CPU ops: what torch hands over becomes row pointers, and the pipeline runs on them.
//
// Schemas, fakes and the reference implementation are in fastmtl/ops; this file adds implementations for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"
#include "../cpu/pipeline.h"
#include "../cpu/threads.h"
#include "tensors.h"

namespace fastmtl::cpu {

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A matrix [T, P] or batch [B, T, P] as row pointers.
class Matrix {
 public:
  explicit Matrix(const Tensor& G, const Tensor* out = nullptr)
      : strided_(G, out), rows_(B() * T()), segments_(B()), matrices_(B()) {
    for (int64_t b = 0; b < B(); ++b) {
      const char* base = strided_.base + b * strided_.next_matrix;
      for (int64_t t = 0; t < T(); ++t) {
        rows_[b * T() + t] = base + t * strided_.next_row;
      }
      char* result = strided_.out ? strided_.out + b * strided_.next_out : nullptr;
      segments_[b] = {rows_.get() + b * T(), result, strided_.P, strided_.dtype};
      matrices_[b] = {segments_.get() + b, 1, T()};
    }
  }

  void start() {
    strided_.start();
  }
  void finish() {
    strided_.finish();
  }
  const Gradients* matrices() {
    return matrices_.get();
  }
  int64_t B() const {
    return strided_.B;
  }
  int64_t T() const {
    return strided_.T;
  }

 private:
  Strided strided_;
  Buffer<const void*, 64> rows_;
  Buffer<Segment, 4> segments_;
  Buffer<Gradients, 4> matrices_;
};

uint64_t seed_of(const Tensor& seed) {
  return uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
}

// --- the ops

Tensor gram_op(const Tensor& G) {
  Matrix matrix(G);
  std::vector<int64_t> size = leading(G, 1);
  size.push_back(matrix.T());
  const Tensor M = empty_float64(size, G);
  gram_batch(matrix.matrices(), matrix.B(), doubles(M));
  return M;
}

// Where the result will go is checked here, before a method has solved, and changed, anything.
Tensor gram_rows_op(std::vector<std::optional<Tensor>> grads, int64_t tasks, std::optional<std::vector<Tensor>> out) {
  const RaggedRows rows(grads, tasks, out ? &*out : nullptr);
  const Tensor M = empty_float64({tasks, tasks}, any_of(grads));
  gram(rows.gradients(), doubles(M));
  return M;
}

std::tuple<Tensor, Tensor, Tensor> balance_op(
    const Tensor& M,
    std::optional<Tensor> weights,
    std::string scale,
    double rtol,
    double zero,
    std::string rank_rule) {
  check_square(M);
  const Tensor wide = as_float64(M);
  const int64_t T = M.size(-1), B = M.numel() / (T * T);
  const Tensor alpha = empty_float64(leading(M, 1), wide), eigenvalues = empty_float64(leading(M, 1), wide);
  const Tensor rank = empty_int64(leading(M, 2), wide);
  balance(
      const_doubles(wide),
      B,
      T,
      policy_of(weights, T, scale, rtol, zero, rank_rule, M),
      doubles(alpha),
      doubles(eigenvalues),
      static_cast<int64_t*>(rank.mutable_data_ptr()));
  return {alpha, eigenvalues, rank};
}

std::tuple<Tensor, Tensor> align_gram_op(
    const Tensor& M,
    std::optional<Tensor> weights,
    std::string scale,
    double rtol,
    double zero,
    std::string rank_rule) {
  check_square(M);
  const Tensor wide = as_float64(M);
  const int64_t T = M.size(-1), B = M.numel() / (T * T);
  const Tensor alpha = empty_float64(leading(M, 1), wide), rank = empty_int64(leading(M, 2), wide);
  const Policy policy = policy_of(weights, T, scale, rtol, zero, rank_rule, M);
  align_gram(const_doubles(wide), B, T, policy, doubles(alpha), static_cast<int64_t*>(rank.mutable_data_ptr()));
  return {alpha, rank};
}

void combine_op(const Tensor& G, const Tensor& alpha, Tensor out) {
  Matrix matrix(G, &out);
  check_alpha(alpha, G);
  check_apart(alpha, out);
  matrix.start();
  combine_batch(matrix.matrices(), matrix.B(), const_doubles(alpha));
  matrix.finish();
}

void combine_rows_op(std::vector<std::optional<Tensor>> grads, const Tensor& alpha, std::vector<Tensor> out) {
  RaggedRows rows(grads, check_alpha(alpha, grads, out), &out);
  rows.start();
  combine(rows.gradients(), const_doubles(alpha));
  rows.finish();
}

void sign_drop_op(const Tensor& G, const Tensor& seed, std::optional<Tensor> leak, Tensor out) {
  Matrix matrix(G, &out);
  check_seed(seed, G);
  check_vector("leak", leak, matrix.T(), G);
  matrix.start();
  sign_drop(matrix.matrices(), matrix.B(), seed_of(seed), const_doubles(leak));
  matrix.finish();
}

void sign_drop_rows_op(
    std::vector<std::optional<Tensor>> grads,
    int64_t tasks,
    const Tensor& seed,
    std::optional<Tensor> leak,
    std::vector<Tensor> out) {
  RaggedRows rows(grads, tasks, &out);
  check_seed(seed, any_of(grads));
  check_vector("leak", leak, tasks, seed);
  rows.start();
  sign_drop(&rows.gradients(), 1, seed_of(seed), const_doubles(leak));
  rows.finish();
}

void align_op(
    const Tensor& G,
    std::optional<Tensor> weights,
    std::string scale,
    double rtol,
    double zero,
    std::string rank_rule,
    Tensor out) {
  Matrix matrix(G, &out);
  const Policy policy = policy_of(weights, matrix.T(), scale, rtol, zero, rank_rule, G);
  matrix.start();
  align_batch(matrix.matrices(), matrix.B(), policy);
  matrix.finish();
}

std::tuple<Tensor, Tensor, Tensor> align_rows_op(
    std::vector<std::optional<Tensor>> grads,
    int64_t tasks,
    std::optional<Tensor> weights,
    std::string scale,
    double rtol,
    double zero,
    std::string rank_rule,
    std::vector<Tensor> out) {
  RaggedRows rows(grads, tasks, &out);
  const Tensor& like = any_of(grads);
  const Policy policy = policy_of(weights, tasks, scale, rtol, zero, rank_rule, like);
  rows.start();
  const Tensor M = empty_float64({tasks, tasks}, like), alpha = empty_float64({tasks}, like),
               rank = empty_int64({}, like);
  align(rows.gradients(), policy, doubles(M), doubles(alpha), static_cast<int64_t*>(rank.mutable_data_ptr()));
  rows.finish();
  return {M, alpha, rank};
}

std::tuple<Tensor, Tensor> call_linalg_eigh(const Tensor& M) {
  StableIValue stack[2] = {torch::stable::detail::from(M), torch::stable::detail::from(std::string("L"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack, TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// M [..., T, T]: of a batch, every thread has matrices of its own, each solved by one thread.
std::tuple<Tensor, Tensor> eigh_by_lapack(const Tensor& M) {
  const int64_t T = M.size(-1), B = M.numel() / (T * T);
  if (B == 1) {
    return call_linalg_eigh(M);
  }
  const int32_t dtype = M.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const Tensor all = torch::stable::reshape(M, {B, T, T}), lam = empty({B, T}, dtype, M),
               V = empty({B, T, T}, dtype, M);
  parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    const bool grad = aoti_torch_grad_mode_is_enabled(); // of this thread
    aoti_torch_grad_mode_set_enabled(false);
    for (int64_t b = begin; b < end; ++b) {
      Tensor mine = lam, own = V, one = all;
      const auto [values, vectors] = call_linalg_eigh(torch::stable::narrow(one, 0, b, 1));
      torch::stable::copy_(mine = torch::stable::narrow(mine, 0, b, 1), values);
      torch::stable::copy_(own = torch::stable::narrow(own, 0, b, 1), vectors);
    }
    aoti_torch_grad_mode_set_enabled(grad);
  });
  return {torch::stable::reshape(lam, leading(M, 1)), torch::stable::reshape(V, leading(M, 0))};
}

// LAPACK raises where a matrix is not finite: it sees zeros instead, and the result is NaN.
std::tuple<Tensor, Tensor> large_eigh(const Tensor& M, const Tensor& wide) {
  const int64_t T = M.size(-1), B = M.numel() / (T * T);
  const double* entries = const_doubles(wide);
  std::vector<int64_t> bad;
  for (int64_t b = 0; b < B; ++b) {
    bool finite = true;
    for (int64_t i = 0; i < T; ++i) { // the lower triangle is what is read
      const double* row = entries + (b * T + i) * T;
      finite = finite && std::all_of(row, row + i + 1, [](double x) { return std::isfinite(x); });
    }
    if (!finite) {
      bad.push_back(b);
    }
  }
  if (bad.empty()) {
    return eigh_by_lapack(M);
  }
  const Tensor clean = torch::stable::clone(wide);
  for (const int64_t b : bad) {
    std::fill_n(doubles(clean) + b * T * T, T * T, 0.0);
  }
  const auto [lam, V] = eigh_by_lapack(clean);
  const Tensor vectors = torch::stable::contiguous(V);
  for (const int64_t b : bad) {
    std::fill_n(doubles(lam) + b * T, T, kNan);
    std::fill_n(doubles(vectors) + b * T * T, T * T, kNan);
  }
  return {as_type_of(M, lam), as_type_of(M, vectors)};
}

std::tuple<Tensor, Tensor> eigh_op(const Tensor& M) {
  check_square(M, 0);
  const int64_t T = M.size(-1);
  const Tensor wide = as_float64(M);
  if (T > kMaxLanesTasks) {
    return large_eigh(M, wide);
  }
  const Tensor eigenvalues = empty_float64(leading(M, 1), wide), eigenvectors = empty_float64(leading(M, 0), wide);
  if (T > 0) {
    eigh(const_doubles(wide), M.numel() / (T * T), T, doubles(eigenvalues), doubles(eigenvectors));
  }
  return {as_type_of(M, eigenvalues), as_type_of(M, eigenvectors)};
}

std::string cpu_isa() {
  return kernels().name;
}

} // namespace

} // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastmtl::cpu::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("gram", FASTMTL_CPU_OP(fastmtl::cpu::gram_op));
  m.impl("gram_rows", FASTMTL_CPU_OP(fastmtl::cpu::gram_rows_op));
  m.impl("balance", FASTMTL_CPU_OP(fastmtl::cpu::balance_op));
  m.impl("combine", FASTMTL_CPU_OP(fastmtl::cpu::combine_op));
  m.impl("combine_rows", FASTMTL_CPU_OP(fastmtl::cpu::combine_rows_op));
  m.impl("sign_drop", FASTMTL_CPU_OP(fastmtl::cpu::sign_drop_op));
  m.impl("sign_drop_rows", FASTMTL_CPU_OP(fastmtl::cpu::sign_drop_rows_op));
  m.impl("align", FASTMTL_CPU_OP(fastmtl::cpu::align_op));
  m.impl("align_rows", FASTMTL_CPU_OP(fastmtl::cpu::align_rows_op));
  m.impl("align_gram", FASTMTL_CPU_OP(fastmtl::cpu::align_gram_op));
  m.impl("eigh", FASTMTL_CPU_OP(fastmtl::cpu::eigh_op));
}
