// The CPU ops on gradients and matrices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"
#include "../cpu/gram.h"
#include "../cpu/pipeline.h"
#include "../cpu/weights.h"
#include "../cpu/threads.h"
#include "gradients.h"

namespace fastmtl::cpu {

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Cpu {
  struct Scope {
    explicit Scope(const Tensor&) {}
  };

  // B gradient matrices with the same T.
  class Batch {
   public:
    explicit Batch(const Gradients& one) : B_(1), rows_(0), segments_(0), matrices_(1) {
      matrices_[0] = one;
    }
    explicit Batch(const Strided& G) : B_(G.B), rows_(G.B * G.T), segments_(G.B), matrices_(G.B) {
      for (int64_t b = 0; b < B_; ++b) {
        const char* base = G.base + b * G.next_matrix;
        for (int64_t t = 0; t < G.T; ++t) {
          rows_[b * G.T + t] = base + t * G.next_row;
        }
        char* result = G.out ? G.out + b * G.next_out : nullptr;
        segments_[b] = {rows_.get() + b * G.T, result, G.P, G.dtype};
        matrices_[b] = {segments_.get() + b, 1, G.T};
      }
    }

    int64_t size() const {
      return B_;
    }
    const Gradients* matrices() {
      return matrices_.get();
    }

   private:
    int64_t B_;
    Buffer<const void*, 64> rows_;
    Buffer<Segment, 4> segments_;
    Buffer<Gradients, 4> matrices_;
  };

  static Batch batch(const Strided& G, const Scope&) {
    return Batch(G);
  }
  static Batch batch(const RaggedRows& G, const Scope&) {
    return Batch(G.gradients());
  }

  static void gram(Batch G, const Tensor& M, const Scope&) {
    gram_batch(G.matrices(), G.size(), doubles(M));
  }

  static void balance(
      const Tensor& M, // [..., T, T] float64
      const Options& options,
      const Tensor& alpha,
      const Tensor* eigenvalues, // null if not wanted
      const Tensor& rank,
      const Scope&) {
    const int64_t T = M.size(-1), B = M.numel() / (T * T);
    const Policy policy = options.policy(T, M);
    auto* ranks = static_cast<int64_t*>(rank.mutable_data_ptr());
    if (eigenvalues) {
      cpu::balance(const_doubles(M), B, T, policy, doubles(alpha), doubles(*eigenvalues), ranks);
    } else {
      cpu::align_gram(const_doubles(M), B, T, policy, doubles(alpha), ranks);
    }
  }

  static void combine(Batch G, const Tensor& alpha, const Scope&) {
    combine_batch(G.matrices(), G.size(), const_doubles(alpha));
  }

  static void sign_drop(Batch G, const Tensor& seed, const std::optional<Tensor>& leak, const Scope&) {
    const auto number = uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
    cpu::sign_drop(G.matrices(), G.size(), number, const_doubles(leak));
  }

  static void align(Batch G, const Options&, const Policy& policy, const Tensor&, const Scope&) {
    align_batch(G.matrices(), G.size(), policy);
  }

  static void align(
      Batch G,
      const Options&,
      const Policy& policy,
      const Tensor& M,
      const Tensor& alpha,
      const Tensor& rank,
      const Scope&) {
    auto* ranks = static_cast<int64_t*>(rank.mutable_data_ptr());
    cpu::align(G.matrices()[0], policy, doubles(M), doubles(alpha), ranks);
  }
};

std::tuple<Tensor, Tensor> call_linalg_eigh(const Tensor& M) {
  StableIValue stack[2] = {torch::stable::detail::from(M), torch::stable::detail::from(std::string("L"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linalg_eigh", "", stack, TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// M [..., T, T]: the matrices of a batch are distributed over threads, each solved by one.
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

// LAPACK fails on a matrix that is not finite: it gets zeros instead, and the result becomes NaN.
std::tuple<Tensor, Tensor> large_eigh(const Tensor& M, const Tensor& wide) {
  const int64_t T = M.size(-1), B = M.numel() / (T * T);
  const double* entries = const_doubles(wide);
  std::vector<int64_t> bad;
  for (int64_t b = 0; b < B; ++b) {
    bool finite = true;
    for (int64_t i = 0; i < T; ++i) { // only the lower triangle is read
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

using Ops = GradientOps<Cpu>;

} // namespace

} // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastmtl, m) {
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastmtl::cpu::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  FASTMTL_GRADIENT_OPS(m, fastmtl::cpu::Ops, FASTMTL_CPU_OP);
  m.impl("eigh", FASTMTL_CPU_OP(fastmtl::cpu::eigh_op));
}
