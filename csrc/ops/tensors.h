// What the ops of every device share: tensors as row addresses, and checks of Python's arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../gradients.h"
#include "../math/balance.h"

// torch 2.10 and 2.11 have only the macro that does not repeat torch's message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fastmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace { // torch's own types have hidden visibility, so what holds them needs it too

// An error with exactly this message: torch's own macro prepends the place in these files.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define FASTMTL_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) {               \
      ::fastmtl::fail(__VA_ARGS__);   \
    }                                 \
  } while (false)

template <class Numbers>
std::string list_of(const Numbers& numbers) {
  std::string s;
  for (const int64_t n : numbers) {
    s += (s.empty() ? "" : ", ") + std::to_string(n);
  }
  return "[" + s + "]";
}

inline std::string shape_of(const Tensor& x) {
  return list_of(x.sizes());
}

inline std::string name_of(ScalarType type) { // as in Python
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default: {
      std::string name = torch::headeronly::toString(type);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return char(std::tolower(c)); });
      return name;
    }
  }
}

inline std::string device_of(const Tensor& x) {
  return x.is_cpu() ? "cpu" : x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "another device";
}

// A tensor as error messages show it.
inline std::string describe(const Tensor& x) {
  return name_of(x.scalar_type()) + " tensor of shape " + shape_of(x) + " on " + device_of(x);
}

// The same if a contiguous tensor was expected.
inline std::string describe_vector(const Tensor& x) {
  return describe(x) + (x.is_contiguous() ? "" : ", not contiguous");
}

// A list with gaps as an op receives it: owned references. As `Tensor`s, each would be allocated and counted once more,
// which would take most of the time of a call on a long list.
using Handles = std::vector<std::optional<AtenTensorHandle>>;

// Owns the references while the op runs.
class TensorList {
 public:
  explicit TensorList(const Handles& handles) : handles_(handles) {}
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (const auto& handle : handles_) {
      if (handle) {
        aoti_torch_delete_tensor_object(*handle);
      }
    }
  }

  int64_t size() const {
    return int64_t(handles_.size());
  }
  AtenTensorHandle operator[](int64_t i) const { // null for a gap
    return handles_[size_t(i)].value_or(nullptr);
  }

 private:
  const Handles& handles_;
};

// A new reference.
inline Tensor tensor_of(AtenTensorHandle handle) {
  AtenTensorHandle mine;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &mine));
  return Tensor(mine);
}

inline std::string describe(AtenTensorHandle x) {
  return describe(tensor_of(x));
}

// What the ops need to know about a tensor, asked once, since every question crosses the ABI. Only outputs are asked
// for writable memory: that materialises a copy-on-write tensor.
struct View {
  explicit View(const Tensor& x) : View(x.get()) {}
  explicit View(AtenTensorHandle x) : View(x, nullptr) {
    const void* memory;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(x, &memory));
    data = static_cast<char*>(const_cast<void*>(memory));
  }
  static View to_write(const Tensor& x) {
    return View(x.get(), x.mutable_data_ptr());
  }

  ScalarType type() const {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code));
  }
  Dtype dtype() const {
    switch (type()) {
      case ScalarType::Float:
        return Dtype::f32;
      case ScalarType::Double:
        return Dtype::f64;
      case ScalarType::BFloat16:
        return Dtype::bf16;
      case ScalarType::Half:
        return Dtype::f16;
      default:
        fail("gradients: expected float32, float64, bfloat16 or float16, got ", name_of(type()));
    }
  }
  bool is_gradient() const {
    const ScalarType x = type();
    return x == ScalarType::Float || x == ScalarType::Double || x == ScalarType::BFloat16 || x == ScalarType::Half;
  }
  int64_t element() const { // bytes
    return element_size(dtype());
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
  // Whether two elements may share memory; also true for some views whose elements interleave without meeting.
  bool repeats() const {
    if (dense()) {
      return false;
    }
    int64_t extent = 1; // elements that the dimensions so far span
    for (const auto& [stride, size] : by_stride()) {
      if (stride < extent) {
        return true;
      }
      extent += (size - 1) * stride;
    }
    return false;
  }
  bool same_shape(const View& other) const {
    return code == other.code && dims == other.dims && std::equal(sizes, sizes + dims, other.sizes);
  }
  bool same_layout(const View& other) const {
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[i] > 1 && strides[i] != other.strides[i]) {
        return false;
      }
    }
    return true;
  }
  // Whether the elements fill one stretch of memory, in any order of the dimensions.
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
    expected = 1;
    for (const auto& [stride, size] : by_stride()) {
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
  int32_t code; // of the dtype, torch's
  char* data;

 private:
  View(AtenTensorHandle x, void* memory) : data(static_cast<char*>(memory)) {
    int64_t *size, *stride;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(x, &dims));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x, &size));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x, &stride));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, &code));
    sizes = size;
    strides = stride;
  }

  // (stride, size) of the dimensions of more than one element, the smallest stride first.
  std::vector<std::pair<int64_t, int64_t>> by_stride() const {
    std::vector<std::pair<int64_t, int64_t>> order;
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[i] > 1) {
        order.emplace_back(strides[i], sizes[i]);
      }
    }
    std::sort(order.begin(), order.end());
    return order;
  }
};

// A tensor's device.
struct Place {
  explicit Place(AtenTensorHandle x) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x, &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x, &index));
  }
  bool operator==(const Place& other) const {
    return type == other.type && index == other.index;
  }

  int32_t type, index;
};

inline bool same_device(const Tensor& x, const Tensor& y) {
  return x.is_cpu() ? y.is_cpu() : x.is_cuda() && y.is_cuda() && x.get_device_index() == y.get_device_index();
}

// Whether `x` is a contiguous float64 vector of this length, on the device of `like`.
inline bool is_vector(const Tensor& x, int64_t length, const Tensor& like) {
  return x.scalar_type() == ScalarType::Double && x.dim() == 1 && x.size(0) == length && x.is_contiguous() &&
         same_device(x, like);
}

inline void check_vector(const char* name, const std::optional<Tensor>& x, int64_t length, const Tensor& like) {
  FASTMTL_CHECK(
      !x || is_vector(*x, length, like),
      name,
      ": expected a contiguous float64 tensor of shape [",
      length,
      "] on ",
      device_of(like),
      ", got ",
      describe_vector(*x));
}

inline void check_not_negative(const char* name, double x) {
  FASTMTL_CHECK(x >= 0.0 && std::isfinite(x), name, ": expected a finite number >= 0, got ", x);
}

inline Policy policy_of(
    const std::optional<Tensor>& weights,
    int64_t T,
    const std::string& scale,
    double rtol,
    double zero,
    const std::string& rank_rule,
    const Tensor& like) {
  check_vector("weights", weights, T, like);
  FASTMTL_CHECK(
      scale == "min" || scale == "median" || scale == "rmse", "scale: expected min, median or rmse, got ", scale);
  check_not_negative("rtol", rtol);
  check_not_negative("zero", zero);
  FASTMTL_CHECK(
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

// A contiguous tensor on the device of `like`. Not new_empty, which looks its op up by name and boxes every argument:
// that would slow down calls on small gradients.
inline Tensor empty(const std::vector<int64_t>& size, int32_t dtype, const Tensor& like) {
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t i = size.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * size[i];
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(size.size()), size.data(), strides.data(), dtype, type, index, &handle));
  return Tensor(handle);
}

inline Tensor empty_float64(const std::vector<int64_t>& size, const Tensor& like) {
  return empty(size, aoti_torch_dtype_float64(), like);
}

inline Tensor empty_int64(const std::vector<int64_t>& size, const Tensor& like) {
  return empty(size, aoti_torch_dtype_int64(), like);
}

inline double* doubles(const Tensor& x) {
  return static_cast<double*>(x.mutable_data_ptr());
}

inline const double* const_doubles(const Tensor& x) {
  return static_cast<const double*>(x.const_data_ptr());
}

inline const double* const_doubles(const std::optional<Tensor>& x) {
  return x ? const_doubles(*x) : nullptr;
}

// Tells autograd that a tensor is overwritten. The stable ABI has no function for that; copying a tensor onto itself
// does it, and nothing else.
inline void mark_written(const char* name, const Tensor& x) {
  FASTMTL_CHECK(
      aoti_torch_copy_(x.get(), x.get(), 0) == AOTI_TORCH_SUCCESS,
      name,
      ": expected a tensor that may be overwritten, no leaf that requires grad and no inference tensor outside of "
      "inference mode; got ",
      describe(x));
}

// G [T, P] or [B, T, P]; returns B.
inline int64_t check_matrix(const Tensor& G, const View& v) {
  FASTMTL_CHECK(
      v.is_gradient() && (v.dims == 2 || v.dims == 3) && v.sizes[v.dims - 2] >= 1,
      "G: expected float32, float64, bfloat16 or float16 of shape [T, P] or [B, T, P] with T >= 1, got ",
      describe(G));
  return v.dims == 3 ? v.sizes[0] : 1;
}

// `out` [P] or [B, P] for G.
inline void check_result(const Tensor& G, const View& source, const Tensor& out, const View& target) {
  const int64_t dims = source.dims;
  FASTMTL_CHECK(
      target.dims == dims - 1 && target.sizes[dims - 2] == source.sizes[dims - 1] &&
          (dims == 2 || target.sizes[0] == source.sizes[0]) && target.code == source.code && same_device(out, G),
      "out: expected the dtype and device of G and shape ",
      dims == 2 ? "[P]" : "[B, P]",
      " for G, a ",
      describe(G),
      "; got ",
      describe(out));
  FASTMTL_CHECK(
      !target.repeats() && !target.overlaps(source),
      "out: expected memory of its own, got some that overlaps G or itself: ",
      describe(out));
}

// A matrix [T, P] or batch [B, T, P], and its result, by strides in bytes. Rows may have any stride; only columns that
// are not neighbours in memory force a copy.
class Strided {
 public:
  explicit Strided(const Tensor& G, const Tensor* result = nullptr) {
    View source(G);
    const int64_t dims = source.dims;
    B = check_matrix(G, source);
    T = source.sizes[dims - 2];
    P = source.sizes[dims - 1];
    dtype = source.dtype();
    const int64_t size = source.element();
    if (result) {
      View target = View::to_write(*result);
      check_result(G, source, *result, target);
      written_ = *result;
      if (P > 1 && target.strides[dims - 2] != 1) {
        strided_ = *result;
        dense_ = torch::stable::new_empty(*result, std::vector<int64_t>(target.sizes, target.sizes + dims - 1));
        target = View::to_write(*dense_);
      }
      out = target.data;
      next_out = dims == 3 ? target.strides[0] * size : 0;
    }
    if (P > 1 && source.strides[dims - 1] != 1) {
      copy_ = torch::stable::contiguous(G);
      source = View(*copy_);
    }
    base = source.data;
    next_row = source.strides[dims - 2] * size;
    next_matrix = dims == 3 ? source.strides[0] * size : 0;
  }

  // To call once all arguments are checked, and once `out` has been written.
  void start() {
    if (written_) {
      mark_written("out", *written_);
    }
  }
  void finish() {
    if (strided_) {
      torch::stable::copy_(*strided_, *dense_);
    }
  }

  int64_t B, T, P;
  Dtype dtype;
  char* base;
  char* out = nullptr;
  int64_t next_row, next_matrix, next_out = 0; // bytes

 private:
  std::optional<Tensor> written_, copy_, dense_, strided_;
};

// T rows of K tensors as row pointers. A product in memory order is right only if all rows of a parameter (and its
// result) share one dense layout; rows with another layout are copied.
class RaggedRows {
 public:
  RaggedRows(
      const TensorList& grads,
      int64_t tasks,
      const std::vector<Tensor>* out,
      const Tensor& like) // on the device of all
      : T_(tasks), like_(like), place_(like.get()), same_(like.is_cpu()), out_(out) {
    FASTMTL_CHECK(tasks >= 1, "tasks: expected at least one, got ", tasks);
    FASTMTL_CHECK(grads.size() % tasks == 0, "grads: expected a multiple of ", tasks, " tensors, got ", grads.size());
    K_ = grads.size() / tasks;
    FASTMTL_CHECK(!out || int64_t(out->size()) == K_, "out: expected ", K_, " tensors, got ", out ? out->size() : 0);
    rows_.assign(size_t(grads.size()), nullptr);
    segments_.resize(size_t(K_));
    if (out) {
      read_.reserve(size_t(grads.size()));
      results_.reserve(size_t(K_));
    }
    for (int64_t k = 0; k < K_; ++k) {
      add(grads, k);
    }
    if (out) {
      check_apart();
    }
    gradients_ = {segments_.data(), K_, T_};
  }

  // As in Strided.
  void start() {
    for (const Tensor& target : *out_) {
      mark_written("out", target);
    }
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
  // The place of tensor k's first gradient in the list, -1 if no task has one.
  int64_t first_of(const TensorList& grads, int64_t k) const {
    for (int64_t i = k; i < T_ * K_; i += K_) {
      if (grads[i]) {
        return i;
      }
    }
    return -1;
  }

  // Rows of tensor k in one layout: that of the first gradient, made dense if it is not.
  void add(const TensorList& grads, int64_t k) {
    const int64_t from = first_of(grads, k);
    AtenTensorHandle first = from >= 0 ? grads[from] : out_ ? (*out_)[size_t(k)].get() : nullptr;
    if (!first) {
      segments_[size_t(k)] = {rows_.data() + k * T_, nullptr, 0, Dtype::f32};
      return;
    }
    View layout(first);
    if (!layout.is_gradient()) {
      const std::string name = from >= 0 ? row_name(from / K_, k) : out_name(k);
      fail(name, ": expected float32, float64, bfloat16 or float16, got ", describe(first));
    }
    check_device(first, [&] { return from >= 0 ? row_name(from / K_, k) : out_name(k); });
    if (!layout.dense()) {
      const std::vector<int64_t> sizes(layout.sizes, layout.sizes + layout.dims);
      copies_.push_back(torch::stable::new_empty(tensor_of(first), sizes));
      first = copies_.back().get();
      layout = View(first);
    }
    char* const result = out_ ? add_result((*out_)[size_t(k)], k, first, layout) : nullptr;
    const int64_t bytes = layout.span();
    for (int64_t t = 0; t < T_; ++t) {
      if (const AtenTensorHandle g = grads[t * K_ + k]) {
        rows_[size_t(k * T_ + t)] = add_row(g, t, k, first, layout, bytes);
      }
    }
    segments_[size_t(k)] = {rows_.data() + k * T_, result, layout.numel(), layout.dtype()};
  }

  // `bytes` is the span of the layout.
  const void*
  add_row(AtenTensorHandle g, int64_t t, int64_t k, AtenTensorHandle first, const View& layout, int64_t bytes) {
    const View row(g);
    check_device(g, [&] { return row_name(t, k); });
    FASTMTL_CHECK(
        row.same_shape(layout), row_name(t, k), ": expected the other tasks' ", describe(first), ", got ", describe(g));
    const bool same = row.same_layout(layout);
    if (out_) {
      read_.push_back({row.data, row.data + (same ? bytes : row.span()), k});
    }
    if (same) {
      return row.data;
    }
    copies_.push_back(torch::stable::empty_like(tensor_of(first)));
    torch::stable::copy_(copies_.back(), tensor_of(g));
    return copies_.back().const_data_ptr();
  }

  // The memory for the result of tensor k.
  char* add_result(const Tensor& target, int64_t k, AtenTensorHandle first, const View& layout) {
    const View view = View::to_write(target);
    FASTMTL_CHECK(
        view.same_shape(layout) && same_device(target, like_),
        out_name(k),
        ": expected a ",
        describe(first),
        ", got ",
        describe(target));
    FASTMTL_CHECK(
        !view.repeats(),
        out_name(k),
        ": expected a tensor without repeated elements, got strides ",
        list_of(target.strides()));
    results_.push_back({view.data, view.data + view.span(), k});
    if (view.same_layout(layout)) {
      return view.data;
    }
    copies_.push_back(torch::stable::empty_like(tensor_of(first)));
    copy_back_.emplace_back(target, copies_.back());
    return View::to_write(copies_.back()).data;
  }

  // Fails if a result overlaps a gradient or another result.
  void check_apart() {
    const auto empty = [](const Span& span) { return span.begin == span.end; };
    results_.erase(std::remove_if(results_.begin(), results_.end(), empty), results_.end());
    std::sort(results_.begin(), results_.end(), [](const Span& a, const Span& b) {
      return a.begin < b.begin || (a.begin == b.begin && a.k < b.k);
    });
    // If results do not overlap, the last one that begins before a gradient ends is the one that reaches furthest.
    for (const Span& read : read_) {
      const auto after = std::partition_point(
          results_.begin(), results_.end(), [&](const Span& result) { return result.begin < read.end; });
      if (!empty(read) && after != results_.begin() && read.begin < std::prev(after)->end) {
        const int64_t k = std::prev(after)->k;
        fail(
            out_name(k),
            ": expected memory that does not overlap the gradients, got ",
            describe((*out_)[size_t(k)]),
            " within");
      }
    }
    for (size_t i = 1; i < results_.size(); ++i) {
      FASTMTL_CHECK(
          results_[i].begin >= results_[i - 1].end,
          out_name(results_[i].k),
          ": expected memory that does not overlap other results, got that of ",
          out_name(results_[i - 1].k));
    }
  }

  // All gradients have to be on one device; on the CPU the dispatcher makes sure of that.
  template <class Name>
  void check_device(AtenTensorHandle x, Name&& name) const {
    if (!same_ && !(Place(x) == place_)) {
      fail(name(), ": expected all gradients on ", device_of(like_), ", got ", describe(x));
    }
  }

  // As users of a method know them.
  std::string row_name(int64_t t, int64_t k) const {
    return "rows[" + std::to_string(t) + "][" + std::to_string(k) + "]";
  }
  std::string out_name(int64_t k) const {
    return K_ == 1 ? "out" : "out[" + std::to_string(k) + "]";
  }

  struct Span { // of tensor k
    const char *begin, *end;
    int64_t k;
  };

  int64_t T_, K_;
  const Tensor& like_;
  const Place place_;
  const bool same_;
  const std::vector<Tensor>* out_;   // null if there are no results
  std::vector<Span> read_, results_; // for checks, if there are results
  std::vector<const void*> rows_;    // [K, T]
  std::vector<Segment> segments_;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> copy_back_;
  Gradients gradients_;
};

inline std::vector<int64_t> leading(const Tensor& M, int64_t drop) {
  return {M.sizes().begin(), M.sizes().end() - drop};
}

inline void check_square(const Tensor& M, int64_t least = 1) {
  const ScalarType type = M.scalar_type();
  FASTMTL_CHECK(
      (type == ScalarType::Float || type == ScalarType::Double) && M.dim() >= 2 && M.size(-1) == M.size(-2) &&
          M.size(-1) >= least,
      "M: expected float32 or float64 of shape [..., T, T]",
      least ? " with T >= 1" : "",
      ", got ",
      describe(M));
}

// M, contiguous. Not by torch's conversion on the CPU, whose threads may flush subnormal numbers.
inline Tensor as_float64(const Tensor& M) {
  const Tensor X = torch::stable::contiguous(M);
  if (X.scalar_type() == ScalarType::Double || !X.is_cpu()) {
    return torch::stable::to(X, ScalarType::Double);
  }
  const Tensor wide = empty_float64(leading(X, 0), X);
  std::copy_n(static_cast<const float*>(X.const_data_ptr()), X.numel(), doubles(wide));
  return wide;
}

// A solver's float64 results in the dtype of M; again not by torch's conversion on the CPU.
inline Tensor as_type_of(const Tensor& M, const Tensor& wide) {
  if (M.scalar_type() == ScalarType::Double || !M.is_cpu()) {
    return torch::stable::to(wide, M.scalar_type());
  }
  const Tensor narrow = empty(leading(wide, 0), aoti_torch_dtype_float32(), wide);
  std::copy_n(const_doubles(wide), wide.numel(), static_cast<float*>(narrow.mutable_data_ptr()));
  return narrow;
}

inline Tensor any_of(const TensorList& grads) {
  for (int64_t i = 0; i < grads.size(); ++i) {
    if (grads[i]) {
      return tensor_of(grads[i]);
    }
  }
  fail("grads: expected at least one tensor, got none in ", grads.size(), " entries");
}

// The seed of a random op, which is read where the op runs.
inline void check_seed(const Tensor& seed, const Tensor& like) {
  FASTMTL_CHECK(
      seed.scalar_type() == ScalarType::Long && seed.numel() == 1 && same_device(seed, like),
      "seed: expected one int64 number on ",
      device_of(like),
      ", got ",
      describe(seed));
}

// α [T] or [B, T] for G [T, P] or [B, T, P].
inline void check_alpha(const Tensor& alpha, const Tensor& G) {
  FASTMTL_CHECK(
      alpha.scalar_type() == ScalarType::Double && alpha.is_contiguous() && alpha.dim() == G.dim() - 1 &&
          std::equal(alpha.sizes().begin(), alpha.sizes().end(), G.sizes().begin()) && same_device(alpha, G),
      "alpha: expected a contiguous float64 tensor of the shape of G without columns, on its device, for G, a ",
      describe(G),
      "; got ",
      describe_vector(alpha));
}

// α is read while results are written.
inline void check_apart(const Tensor& alpha, const Tensor& out) {
  FASTMTL_CHECK(
      out.scalar_type() != ScalarType::Double || !View(alpha).overlaps(View(out)),
      "out: expected memory of its own, got some that overlaps alpha");
}

// α [T] for a ragged list and its results; returns T.
inline int64_t check_alpha(const Tensor& alpha, const TensorList& grads, const std::vector<Tensor>& out) {
  const int64_t T = out.empty() ? alpha.numel() : grads.size() / int64_t(out.size());
  check_vector("alpha", alpha, T, out.empty() ? alpha : out[0]);
  for (const Tensor& target : out) {
    check_apart(alpha, target);
  }
  return T;
}

} // namespace

} // namespace fastmtl
