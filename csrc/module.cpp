// The CPU ops: what torch hands over becomes row pointers, and the pipeline runs on them.
//
// Schemas, fakes and the reference implementation live in fastmtl/ops.py; this file adds implementations for the CPU.
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

#include "common.h"
#include "cpu/pipeline.h"

namespace fastmtl::cpu {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// What the ops need to know of a tensor, asked once: every question crosses the ABI.
struct View {
  explicit View(const Tensor& x)
      : sizes(x.sizes().data()),
        strides(x.strides().data()),
        dims(x.dim()),
        type(x.scalar_type()),
        data(static_cast<char*>(x.data_ptr())) {}

  Dtype dtype() const {
    switch (type) {
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
  int64_t element() const { // bytes
    const Dtype d = dtype();
    return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dims; ++i) {
      n *= sizes[i];
    }
    return n;
  }
  // Bytes from the first to the last element.
  int64_t span() const {
    int64_t last = 0;
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[i] == 0) {
        return 0;
      }
      last += (sizes[i] - 1) * strides[i];
    }
    return (last + 1) * element();
  }
  bool overlaps(const View& other) const {
    return data < other.data + other.span() && other.data < data + span();
  }
  bool repeats() const {
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[i] > 1 && strides[i] == 0) {
        return true;
      }
    }
    return false;
  }
  bool same_shape(const View& other) const {
    return type == other.type && dims == other.dims && std::equal(sizes, sizes + dims, other.sizes);
  }
  bool same_layout(const View& other) const {
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[i] > 1 && strides[i] != other.strides[i]) {
        return false;
      }
    }
    return true;
  }
  // Whether the elements fill one stretch of memory, in whatever order of dimensions.
  bool dense() const {
    int64_t expected = 1;
    bool contiguous = true;
    for (int64_t i = dims - 1; i >= 0; --i) {
      contiguous = contiguous && (sizes[i] == 1 || strides[i] == expected);
      expected *= sizes[i];
    }
    if (contiguous || expected == 0) {
      return true;
    }
    std::vector<std::pair<int64_t, int64_t>> order; // stride, size
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[i] > 1) {
        order.emplace_back(strides[i], sizes[i]);
      }
    }
    std::sort(order.begin(), order.end());
    expected = 1;
    for (const auto& [stride, size] : order) {
      if (stride != expected) {
        return false;
      }
      expected *= size;
    }
    return true;
  }

  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  ScalarType type;
  char* data;
};

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
      scale == "min"      ? Scale::min
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
  explicit Matrix(const Tensor& G, const Tensor* out = nullptr) : Matrix(G, View(G), out) {}

  // To be called when `out` has been written.
  void finish() {
    if (strided_out_) {
      torch::stable::copy_(*strided_out_, *dense_out_);
    }
  }

  const Gradients* matrices() {
    return matrices_.get();
  }
  int64_t B() const {
    return B_;
  }
  int64_t T() const {
    return T_;
  }

 private:
  Matrix(const Tensor& G, View source, const Tensor* out)
      : B_(check(G, source)), T_(source.sizes[source.dims - 2]), rows_(B_ * T_), segments_(B_), matrices_(B_) {
    const int64_t dims = source.dims, P = source.sizes[dims - 1], size = source.element();
    char* base_out = nullptr;
    int64_t next_out = 0;
    if (out) {
      View target(*out);
      STD_TORCH_CHECK(
          target.dims == dims - 1 && target.sizes[dims - 2] == P && (dims == 2 || target.sizes[0] == B_) &&
              target.type == source.type && out->is_cpu() && !target.repeats() && !target.overlaps(source),
          "out: expected the dtype and device of G, shape [P] or [B, P] and memory of its own, for G of shape ",
          shape_of(G),
          "; got shape ",
          shape_of(*out));
      if (P > 1 && target.strides[dims - 2] != 1) {
        strided_out_ = *out;
        dense_out_ = torch::stable::new_empty(*out, std::vector<int64_t>(target.sizes, target.sizes + dims - 1));
        target = View(*dense_out_);
      }
      base_out = target.data;
      next_out = dims == 3 ? target.strides[0] * size : 0;
    }
    if (P > 1 && source.strides[dims - 1] != 1) {
      copy_ = torch::stable::contiguous(G);
      source = View(*copy_);
    }
    const int64_t next_row = source.strides[dims - 2] * size, next_matrix = dims == 3 ? source.strides[0] * size : 0;
    for (int64_t b = 0; b < B_; ++b) {
      for (int64_t t = 0; t < T_; ++t) {
        rows_[b * T_ + t] = source.data + b * next_matrix + t * next_row;
      }
      segments_[b] = {rows_.get() + b * T_, base_out ? base_out + b * next_out : nullptr, P, source.dtype()};
      matrices_[b] = {segments_.get() + b, 1, T_};
    }
  }

  static int64_t check(const Tensor& G, const View& v) { // returns B
    STD_TORCH_CHECK(
        (v.dims == 2 || v.dims == 3) && v.sizes[v.dims - 2] >= 1,
        "G: expected shape [T, P] or [B, T, P] with T >= 1, got ",
        shape_of(G));
    return v.dims == 3 ? v.sizes[0] : 1;
  }

  int64_t B_, T_;
  std::optional<Tensor> copy_, dense_out_, strided_out_;
  Buffer<const void*, 64> rows_;
  Buffer<Segment, 4> segments_;
  Buffer<Gradients, 4> matrices_;
};

// T rows of K tensors as row pointers. A product in memory order is right only where all rows of a parameter (and its
// result) share one dense layout; the others of that parameter are copied.
class RaggedRows {
 public:
  RaggedRows(const std::vector<std::optional<Tensor>>& grads, int64_t tasks, const std::vector<Tensor>* out)
      : T_(tasks) {
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
    // The layout that all are read in: that of the first gradient, made dense where it is not.
    const Tensor* first = out ? &(*out)[size_t(k)] : nullptr;
    for (int64_t t = T_ - 1; t >= 0; --t) {
      const auto& g = grads[size_t(t * K_ + k)];
      first = g ? &*g : first;
    }
    if (!first) {
      segments_[size_t(k)] = {rows_.data() + k * T_, nullptr, 0, Dtype::f32};
      return;
    }
    View layout(*first);
    if (!layout.dense()) {
      copies_.push_back(
          torch::stable::new_empty(*first, std::vector<int64_t>(layout.sizes, layout.sizes + layout.dims)));
      first = &copies_.back();
      layout = View(*first);
    }
    char* result = nullptr;
    if (out) {
      const Tensor& target = (*out)[size_t(k)];
      const View view(target);
      STD_TORCH_CHECK(
          view.same_shape(layout) && target.is_cpu() && !view.repeats(),
          "out: tensor ",
          k,
          ": expected the dtype, device and shape ",
          shape_of(*first),
          " of its gradients, got ",
          shape_of(target));
      result = view.data;
      if (!view.same_layout(layout)) {
        copies_.push_back(torch::stable::empty_like(*first));
        copy_back_.emplace_back(target, copies_.back());
        result = View(copies_.back()).data;
      }
    }
    for (int64_t t = 0; t < T_; ++t) {
      const auto& g = grads[size_t(t * K_ + k)];
      if (!g) {
        continue;
      }
      const View row(*g);
      STD_TORCH_CHECK(
          row.same_shape(layout),
          "grads: row ",
          t,
          ", tensor ",
          k,
          ": expected the dtype and shape ",
          shape_of(*first),
          " of the others, got ",
          shape_of(*g));
      if (row.same_layout(layout)) {
        rows_[size_t(k * T_ + t)] = row.data;
      } else {
        copies_.push_back(torch::stable::empty_like(*first));
        torch::stable::copy_(copies_.back(), *g);
        rows_[size_t(k * T_ + t)] = copies_.back().data_ptr();
      }
    }
    segments_[size_t(k)] = {rows_.data() + k * T_, result, layout.numel(), layout.dtype()};
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
  Matrix matrix(G);
  std::vector<int64_t> size = leading(G, 1);
  size.push_back(matrix.T());
  const Tensor M = empty_float64(size, G);
  gram_batch(matrix.matrices(), matrix.B(), doubles(M));
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

// LAPACK raises where a matrix is not finite: it sees zeros instead, and the result is NaN.
std::tuple<Tensor, Tensor> large_eigh(const Tensor& M, const Tensor& wide) {
  const int64_t T = M.size(-1), B = M.numel() / (T * T);
  const double* entries = doubles(wide);
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
    return call_linalg_eigh(M);
  }
  const Tensor clean = torch::stable::clone(wide);
  for (const int64_t b : bad) {
    std::fill_n(doubles(clean) + b * T * T, T * T, 0.0);
  }
  const auto [lam, V] = call_linalg_eigh(clean);
  const Tensor vectors = torch::stable::contiguous(V);
  for (const int64_t b : bad) {
    std::fill_n(doubles(lam) + b * T, T, kNan);
    std::fill_n(doubles(vectors) + b * T * T, T * T, kNan);
  }
  return {torch::stable::to(lam, M.scalar_type()), torch::stable::to(vectors, M.scalar_type())};
}

std::tuple<Tensor, Tensor> eigh_op(const Tensor& M) {
  STD_TORCH_CHECK(M.dim() >= 2 && M.size(-1) == M.size(-2), "M: expected shape [..., T, T], got ", shape_of(M));
  const int64_t T = M.size(-1);
  const Tensor wide = as_float64(M);
  if (T > kMaxLanesTasks) {
    return large_eigh(M, wide);
  }
  const Tensor eigenvalues = empty_float64(leading(M, 1), wide), eigenvectors = empty_float64(leading(M, 0), wide);
  if (T > 0) {
    eigh(
        static_cast<const double*>(wide.const_data_ptr()),
        M.numel() / (T * T),
        T,
        doubles(eigenvalues),
        doubles(eigenvectors));
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
  const Tensor rows = torch::stable::contiguous(torch::stable::transpose(V, 0, 1)); // no copy: LAPACK's are columns
  std::copy_n(static_cast<const double*>(lam.const_data_ptr()), T, eigenvalues);
  std::copy_n(static_cast<const double*>(rows.const_data_ptr()), T * T, eigenvectors);
}

void lapack_eigenvalues(const double* M, int64_t T, double* eigenvalues) {
  StableIValue stack[2] = {
      torch::stable::detail::from(matrix_tensor(M, T)), torch::stable::detail::from(std::string("L"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigvalsh", "", stack, TORCH_ABI_VERSION));
  const Tensor lam = torch::stable::detail::to<Tensor>(stack[0]);
  std::copy_n(static_cast<const double*>(lam.const_data_ptr()), T, eigenvalues);
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
