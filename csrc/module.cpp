// The CPU ops: what torch hands over becomes row pointers, and the pipeline runs on them.
//
// Schemas, fakes and the reference implementation live in fastmtl/ops.py; this file adds implementations for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/pipeline.h"

namespace fastmtl::cpu {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "fastmtl: expected float32, float64, bfloat16 or float16 gradients");
  }
}

std::string shape_of(const Tensor& x) {
  std::string s = "[";
  for (int64_t i = 0; i < x.dim(); ++i) {
    s += (i ? ", " : "") + std::to_string(x.size(i));
  }
  return s + "]";
}

Policy policy_of(
    const std::optional<Tensor>& weights,
    int64_t T,
    const std::string& scale,
    double rtol,
    double zero,
    const std::string& rank_rule) {
  if (weights) {
    STD_TORCH_CHECK(
        weights->scalar_type() == ScalarType::Double && weights->dim() == 1 && weights->size(0) == T &&
            weights->is_contiguous(),
        "weights: expected a contiguous float64 tensor of shape [",
        T,
        "], got shape ",
        shape_of(*weights));
  }
  STD_TORCH_CHECK(
      scale == "min" || scale == "median" || scale == "rmse", "scale: expected min, median or rmse, got ", scale);
  STD_TORCH_CHECK(
      rank_rule == "normalized" || rank_rule == "gram", "rank_rule: expected normalized or gram, got ", rank_rule);
  return {
      weights ? static_cast<const double*>(weights->const_data_ptr()) : nullptr,
      scale == "min"          ? Scale::min
          : scale == "median" ? Scale::median
                              : Scale::rmse,
      rank_rule == "normalized" ? RankRule::normalized : RankRule::gram,
      rtol,
      zero};
}

Tensor empty_float64(const std::vector<int64_t>& size, const Tensor& like) {
  return torch::stable::new_empty(like, size, ScalarType::Double);
}

double* doubles(const Tensor& x) {
  return static_cast<double*>(x.mutable_data_ptr());
}

// A matrix [T, P] or batch [B, T, P] as row pointers. Rows may have any stride; only columns that are not neighbours in
// memory force a copy.
class Matrix {
 public:
  explicit Matrix(const Tensor& G, const Tensor* out = nullptr) : G_(G) {
    STD_TORCH_CHECK(
        G.dim() == 2 || G.dim() == 3, "G: expected shape [T, P] or [B, T, P], got ", shape_of(G));
    batched_ = G.dim() == 3;
    T_ = G.size(-2);
    P_ = G.size(-1);
    B_ = batched_ ? G.size(0) : 1;
    STD_TORCH_CHECK(T_ >= 1, "G: expected at least one task, got shape ", shape_of(G));
    if (P_ > 1 && G.stride(-1) != 1) {
      G_ = torch::stable::contiguous(G);
    }
    if (out) {
      STD_TORCH_CHECK(
          out->dim() == G.dim() - 1 && out->size(-1) == P_ && (!batched_ || out->size(0) == B_) &&
              out->scalar_type() == G.scalar_type(),
          "out: expected the dtype of G and shape [P] or [B, P] for G of shape ",
          shape_of(G),
          ", got ",
          shape_of(*out));
      target_ = *out;
      if (P_ > 1 && out->stride(-1) != 1) {
        target_ = torch::stable::new_empty(*out, std::vector<int64_t>(out->sizes().begin(), out->sizes().end()));
        copy_back_ = *out;
      }
    }
    const Dtype dtype = dtype_of(G);
    const int64_t size = int64_t(G.element_size());
    const char* base = static_cast<const char*>(G_.const_data_ptr());
    char* target = target_ ? static_cast<char*>(target_->mutable_data_ptr()) : nullptr;
    const int64_t next_row = T_ > 1 ? G_.stride(-2) * size : 0, next_matrix = batched_ ? G_.stride(0) * size : 0;
    const int64_t next_out = target_ && batched_ ? target_->stride(0) * size : 0;
    rows_.resize(size_t(B_ * T_));
    segments_.resize(size_t(B_));
    matrices_.resize(size_t(B_));
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t t = 0; t < T_; ++t) {
        rows_[size_t(b * T_ + t)] = base + b * next_matrix + t * next_row;
      }
      segments_[size_t(b)] = {rows_.data() + b * T_, target ? target + b * next_out : nullptr, P_, dtype};
      matrices_[size_t(b)] = {&segments_[size_t(b)], 1, T_};
    }
  }

  // To be called when `out` has been written.
  void finish() {
    if (copy_back_) {
      torch::stable::copy_(*copy_back_, *target_);
    }
  }

  const Gradients* matrices() const {
    return matrices_.data();
  }
  bool batched() const {
    return batched_;
  }
  int64_t B() const {
    return B_;
  }
  int64_t T() const {
    return T_;
  }

 private:
  Tensor G_;
  std::optional<Tensor> target_, copy_back_;
  bool batched_;
  int64_t B_, T_, P_;
  std::vector<const void*> rows_;
  std::vector<Segment> segments_;
  std::vector<Gradients> matrices_;
};

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) {
      return false;
    }
  }
  return true;
}

// Whether the elements fill one stretch of memory, in whatever order of dimensions.
bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) {
    return true;
  }
  std::vector<std::pair<int64_t, int64_t>> dims; // stride, size
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) > 1) {
      dims.emplace_back(x.stride(i), x.size(i));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// T rows of K tensors as row pointers. A product in memory order is right only where all rows of a parameter (and its
// result) share one dense layout; the others of that parameter are copied.
class RaggedRows {
 public:
  RaggedRows(const std::vector<std::optional<Tensor>>& grads, int64_t tasks, const std::vector<Tensor>* out) : T_(tasks) {
    STD_TORCH_CHECK(
        tasks >= 1 && int64_t(grads.size()) % tasks == 0,
        "grads: expected a multiple of ",
        tasks,
        " tensors, got ",
        grads.size());
    K_ = int64_t(grads.size()) / tasks;
    STD_TORCH_CHECK(!out || int64_t(out->size()) == K_, "out: expected ", K_, " tensors, got ", out ? out->size() : 0);
    rows_.assign(grads.size(), nullptr);
    segments_.resize(size_t(K_));
    for (int64_t k = 0; k < K_; ++k) {
      add(grads, k, out);
    }
    gradients_ = {segments_.data(), K_, T_};
  }

  void finish() {
    for (auto& [target, result] : copy_back_) {
      torch::stable::copy_(target, result);
    }
  }

  const Gradients& gradients() const {
    return gradients_;
  }

 private:
  void add(const std::vector<std::optional<Tensor>>& grads, int64_t k, const std::vector<Tensor>* out) {
    const Tensor* first = nullptr;
    for (int64_t t = 0; t < T_ && !first; ++t) {
      const auto& g = grads[size_t(t * K_ + k)];
      first = g ? &*g : nullptr;
    }
    if (out) {
      first = &(*out)[size_t(k)];
    }
    if (!first) {
      segments_[size_t(k)] = {rows_.data() + k * T_, nullptr, 0, Dtype::f32};
      return;
    }
    // The layout that all are read in: that of the result, or of the first gradient, made dense where it is not.
    if (!is_dense(*first)) {
      const std::vector<int64_t> size(first->sizes().begin(), first->sizes().end());
      copies_.push_back(torch::stable::new_empty(*first, size));
      if (out) {
        copy_back_.emplace_back(*first, copies_.back());
      }
      first = &copies_.back();
    }
    const Tensor& layout = *first;
    const Dtype dtype = dtype_of(layout);
    for (int64_t t = 0; t < T_; ++t) {
      const auto& g = grads[size_t(t * K_ + k)];
      if (!g) {
        continue;
      }
      STD_TORCH_CHECK(
          g->scalar_type() == layout.scalar_type() && shape_of(*g) == shape_of(layout),
          "grads: row ",
          t,
          ", tensor ",
          k,
          ": expected the dtype and shape ",
          shape_of(layout),
          " of the others, got ",
          shape_of(*g));
      if (same_strides(*g, layout)) {
        rows_[size_t(k * T_ + t)] = g->const_data_ptr();
      } else {
        copies_.push_back(torch::stable::empty_like(layout));
        torch::stable::copy_(copies_.back(), *g);
        rows_[size_t(k * T_ + t)] = copies_.back().const_data_ptr();
      }
    }
    segments_[size_t(k)] = {
        rows_.data() + k * T_, out ? layout.mutable_data_ptr() : nullptr, int64_t(layout.numel()), dtype};
  }

  int64_t T_, K_;
  std::vector<const void*> rows_; // [K, T]
  std::vector<Segment> segments_;
  std::deque<Tensor> copies_; // addresses stay
  std::vector<std::pair<Tensor, Tensor>> copy_back_;
  Gradients gradients_;
};

std::vector<int64_t> leading(const Tensor& M, int64_t drop) {
  return {M.sizes().begin(), M.sizes().end() - drop};
}

void check_square(const Tensor& M) {
  STD_TORCH_CHECK(
      M.dim() >= 2 && M.size(-1) == M.size(-2) && M.size(-1) >= 1,
      "M: expected shape [..., T, T] with T >= 1, got ",
      shape_of(M));
}

Tensor as_float64(const Tensor& M) {
  return torch::stable::contiguous(torch::stable::to(M, ScalarType::Double));
}

// --- the ops

Tensor gram_op(const Tensor& G) {
  const Matrix matrix(G);
  std::vector<int64_t> size = leading(G, 1);
  size.push_back(matrix.T());
  const Tensor M = empty_float64(size, G);
  if (matrix.batched()) {
    gram_batch(matrix.matrices(), matrix.B(), doubles(M));
  } else {
    gram(matrix.matrices()[0], doubles(M));
  }
  return M;
}

const Tensor& any_of(const std::vector<std::optional<Tensor>>& grads) {
  for (const auto& g : grads) {
    if (g) {
      return *g;
    }
  }
  STD_TORCH_CHECK(false, "grads: expected at least one tensor");
}

Tensor gram_rows_op(std::vector<std::optional<Tensor>> grads, int64_t tasks) {
  const RaggedRows rows(grads, tasks, nullptr);
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
  const Tensor rank = torch::stable::new_empty(wide, leading(M, 2), ScalarType::Long);
  balance(
      static_cast<const double*>(wide.const_data_ptr()),
      B,
      T,
      policy_of(weights, T, scale, rtol, zero, rank_rule),
      doubles(alpha),
      doubles(eigenvalues),
      static_cast<int64_t*>(rank.mutable_data_ptr()));
  return {alpha, eigenvalues, rank};
}

void check_alpha(const Tensor& alpha, int64_t count) {
  STD_TORCH_CHECK(
      alpha.scalar_type() == ScalarType::Double && alpha.numel() == count && alpha.is_contiguous(),
      "alpha: expected a contiguous float64 tensor of ",
      count,
      " task weights, got shape ",
      shape_of(alpha));
}

void combine_op(const Tensor& G, const Tensor& alpha, Tensor out) {
  Matrix matrix(G, &out);
  check_alpha(alpha, matrix.B() * matrix.T());
  combine_batch(matrix.matrices(), matrix.B(), static_cast<const double*>(alpha.const_data_ptr()));
  matrix.finish();
}

void combine_rows_op(std::vector<std::optional<Tensor>> grads, const Tensor& alpha, std::vector<Tensor> out) {
  RaggedRows rows(grads, alpha.numel(), &out);
  check_alpha(alpha, alpha.numel());
  combine(rows.gradients(), static_cast<const double*>(alpha.const_data_ptr()));
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
  align_batch(matrix.matrices(), matrix.B(), policy_of(weights, matrix.T(), scale, rtol, zero, rank_rule));
  matrix.finish();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> align_rows_op(
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
  const Tensor M = empty_float64({tasks, tasks}, like), alpha = empty_float64({tasks}, like),
               eigenvalues = empty_float64({tasks}, like), rank = torch::stable::new_empty(like, {}, ScalarType::Long);
  align(
      rows.gradients(),
      policy_of(weights, tasks, scale, rtol, zero, rank_rule),
      doubles(M),
      doubles(alpha),
      doubles(eigenvalues),
      static_cast<int64_t*>(rank.mutable_data_ptr()));
  rows.finish();
  return {M, alpha, eigenvalues, rank};
}

std::tuple<Tensor, Tensor> call_linalg_eigh(const Tensor& M) {
  StableIValue stack[2] = {torch::stable::detail::from(M), torch::stable::detail::from(std::string("L"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack, TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> eigh_op(const Tensor& M) {
  STD_TORCH_CHECK(M.dim() >= 2 && M.size(-1) == M.size(-2), "M: expected shape [..., T, T], got ", shape_of(M));
  const int64_t T = M.size(-1);
  if (T > kMaxLanesTasks) {
    return call_linalg_eigh(M);
  }
  const Tensor wide = as_float64(M);
  const Tensor eigenvalues = empty_float64(leading(M, 1), wide), eigenvectors = empty_float64(leading(M, 0), wide);
  if (T > 0) {
    eigh(static_cast<const double*>(wide.const_data_ptr()), M.numel() / (T * T), T, doubles(eigenvalues), doubles(eigenvectors));
  }
  return {torch::stable::to(eigenvalues, M.scalar_type()), torch::stable::to(eigenvectors, M.scalar_type())};
}

std::string cpu_isa() {
  return kernels().name;
}

Tensor matrix_tensor(const double* M, int64_t T) {
  const Tensor x = torch::stable::empty({T, T}, ScalarType::Double);
  std::copy(M, M + T * T, doubles(x));
  return x;
}

} // namespace

void lapack_eigh(const double* M, int64_t T, double* eigenvalues, double* eigenvectors) {
  const auto [lam, V] = call_linalg_eigh(matrix_tensor(M, T));
  const Tensor rows = torch::stable::contiguous(V); // LAPACK's are column-major
  std::copy_n(static_cast<const double*>(lam.const_data_ptr()), T, eigenvalues);
  std::copy_n(static_cast<const double*>(rows.const_data_ptr()), T * T, eigenvectors);
}

bool lapack_is_positive_definite(const double* M, int64_t T) {
  StableIValue stack[3] = {
      torch::stable::detail::from(matrix_tensor(M, T)),
      torch::stable::detail::from(false),
      torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_cholesky_ex", "", stack, TORCH_ABI_VERSION));
  const Tensor L = torch::stable::detail::to<Tensor>(stack[0]), info = torch::stable::detail::to<Tensor>(stack[1]);
  return *static_cast<const int32_t*>(info.const_data_ptr()) == 0;
}

} // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastmtl::cpu::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("gram", TORCH_BOX(&fastmtl::cpu::gram_op));
  m.impl("gram_rows", TORCH_BOX(&fastmtl::cpu::gram_rows_op));
  m.impl("balance", TORCH_BOX(&fastmtl::cpu::balance_op));
  m.impl("combine", TORCH_BOX(&fastmtl::cpu::combine_op));
  m.impl("combine_rows", TORCH_BOX(&fastmtl::cpu::combine_rows_op));
  m.impl("align", TORCH_BOX(&fastmtl::cpu::align_op));
  m.impl("align_rows", TORCH_BOX(&fastmtl::cpu::align_rows_op));
  m.impl("eigh", TORCH_BOX(&fastmtl::cpu::eigh_op));
}
