// The ops on CUDA tensors: what torch hands over becomes sources, and the pipeline runs on the current stream.
//
// Up to T = 64 nothing waits for the device. Beyond, the eigenproblem goes to the CPU's `balance` (LAPACK, or Jacobi
// where LAPACK is not accurate enough): that waits, and cannot be captured in a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"
#include "cuda_call.h"
#include "../cuda/pipeline.h"

namespace fastmtl::cuda {

namespace {

Batch batch_of(const Strided& G) {
  return Batch(G.base, G.B, G.T, G.P, G.next_matrix, G.next_row, G.out, G.next_out, G.dtype);
}

void check_devices(
    const std::vector<std::optional<Tensor>>& grads,
    int64_t tasks,
    const std::vector<Tensor>* out,
    const Tensor& like) {
  const size_t K = std::max<size_t>(grads.size() / size_t(std::max<int64_t>(tasks, 1)), 1);
  for (size_t i = 0; i < grads.size(); ++i) {
    FASTMTL_CHECK(
        !grads[i] || same_device(*grads[i], like),
        "rows[" + std::to_string(i / K) + "][" + std::to_string(i % K) + "]: expected all gradients on ",
        device_of(like),
        ", got ",
        describe(*grads[i]));
  }
  for (size_t k = 0; out && k < out->size(); ++k) {
    FASTMTL_CHECK(
        same_device((*out)[k], like),
        "out[" + std::to_string(k) + "]: expected all results on ",
        device_of(like),
        ", got ",
        describe((*out)[k]));
  }
}

// A policy as Python hands it over.
struct Options {
  std::optional<Tensor> weights;
  std::string scale;
  double rtol, zero;
  std::string rank_rule;

  Policy policy(int64_t T, const Tensor& like) const {
    return policy_of(weights, T, scale, rtol, zero, rank_rule, like);
  }
};

struct Balanced {
  Tensor alpha, eigenvalues, rank;

  Weights weights() const {
    return {doubles(alpha), doubles(eigenvalues), static_cast<int64_t*>(rank.mutable_data_ptr())};
  }
};

Balanced new_balanced(const Tensor& like, const std::vector<int64_t>& batch, int64_t T) {
  std::vector<int64_t> size = batch;
  size.push_back(T);
  return {empty_float64(size, like), empty_float64(size, like), empty_int64(batch, like)};
}

// T > 64, M on the CPU: the op's CPU kernel, results on the CPU. `op` returns `results` of `balance`'s or
// `align_gram`'s.
template <size_t results>
std::array<Tensor, results> on_host(const char* op, const Tensor& M, const Options& options) {
  std::optional<Tensor> weights;
  if (options.weights) {
    weights = torch::stable::to(*options.weights, kHost); // waits: T > 64
  }
  StableIValue stack[6] = {
      torch::stable::detail::from(M),
      torch::stable::detail::from(weights),
      torch::stable::detail::from(options.scale),
      torch::stable::detail::from(options.rtol),
      torch::stable::detail::from(options.zero),
      torch::stable::detail::from(options.rank_rule)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION));
  std::array<Tensor, results> found;
  for (size_t i = 0; i < results; ++i) {
    found[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return found;
}

Balanced balance_on_host(const Tensor& M, const Options& options) {
  const auto [alpha, eigenvalues, rank] = on_host<3>("fastmtl::balance", M, options);
  return {alpha, eigenvalues, rank};
}

void to_device(const Balanced& from, const Balanced& to) {
  Tensor alpha = to.alpha, eigenvalues = to.eigenvalues, rank = to.rank;
  torch::stable::copy_(alpha, from.alpha);
  torch::stable::copy_(eigenvalues, from.eigenvalues);
  torch::stable::copy_(rank, from.rank);
}

// Whether a Gram matrix from float32 blocks will do: what `balance` decides on the device for smaller T. That the
// spectrum of M alone proves it is enough here; an exact pass is what it costs where it does not.
bool blocks_suffice(const double* M, const double* eigenvalues, int64_t T, double least) {
  double largest = 0.0, smallest = INFINITY;
  for (int64_t i = 0; i < T; ++i) {
    largest = std::fmax(largest, M[i * T + i]);
    smallest = std::fmin(smallest, M[i * T + i]);
  }
  return eigenvalues[T - 1] > least * largest && smallest >= kFloat32Square; // false for NaN
}

// `align` for T > 64, which waits for the device.
void align_large(const Batch& G, const Options& options, const Tensor& M, const Balanced& result, const Call& call) {
  const int64_t B = G.matrices(), T = G.tasks();
  const Context& context = call.context();
  const GramResult first = gram(G, false, {}, doubles(M), context);
  Tensor host = torch::stable::to(M, kHost); // waits: T > 64
  Balanced balanced = balance_on_host(host, options);
  std::vector<Verdict> verdicts(size_t(B), Verdict{0, 1.0, 1.0});
  bool again = false;
  std::vector<double> bound(size_t(B), 0.0);
  if (first.bound) {
    check(
        cudaMemcpyAsync(bound.data(), first.bound, size_t(B) * sizeof(double), cudaMemcpyDeviceToHost, context.stream));
    check(cudaStreamSynchronize(context.stream)); // waits: T > 64
  }
  for (int64_t b = 0; b < B; ++b) {
    Verdict& v = verdicts[size_t(b)];
    const double* entries = const_doubles(host) + b * T * T;
    if (first.judge == Judge::blocks) {
      v.again = !blocks_suffice(entries, const_doubles(balanced.eigenvalues) + b * T, T, bound[size_t(b)]);
    } else if (first.judge == Judge::range) {
      double diagonal = 0.0;
      for (int64_t i = 0; i < T; ++i) {
        const double d = entries[i * T + i];
        diagonal = d > diagonal || d != d ? d : diagonal;
      }
      if (!(diagonal > kLeastSquare && diagonal < kMostSquare)) {
        rescale(bound[size_t(b)], v.half, v.rest);
        v.again = v.half != 1.0;
      }
    }
    again = again || v.again;
  }
  if (again) {
    static_assert(sizeof(Verdict) == 24);
    std::vector<uint64_t> words(size_t(B) * 3);
    memcpy(words.data(), verdicts.data(), words.size() * 8);
    auto* on_device = static_cast<uint64_t*>(context.allocate(int64_t(words.size()) * 8));
    launch_upload(words.data(), int64_t(words.size()), on_device, context.stream);
    const Tensor second = torch::stable::clone(M);
    gram(G, true, Pass{reinterpret_cast<Verdict*>(on_device)}, doubles(second), context);
    const Tensor second_host = torch::stable::to(second, kHost); // waits: T > 64
    balanced = balance_on_host(second_host, options);
    bool rescaled = false;
    for (int64_t b = 0; b < B; ++b) {
      const Verdict& v = verdicts[size_t(b)];
      double* eigenvalues = doubles(balanced.eigenvalues) + b * T;
      for (int64_t j = 0; j < T && v.half != 1.0; ++j) {
        eigenvalues[j] = eigenvalues[j] / v.half / v.rest / v.half / v.rest;
        rescaled = true;
      }
    }
    if (!rescaled) { // of those that were rescaled, the public Gram matrix stays as it was
      Tensor target = M;
      torch::stable::copy_(target, second);
    }
  }
  to_device(balanced, result);
  combine(G, const_doubles(result.alpha), context);
}

const int64_t* seed_of(const Tensor& seed) {
  return static_cast<const int64_t*>(seed.const_data_ptr());
}

// --- the ops

Tensor gram_op(const Tensor& G) {
  const Call call(G);
  const Strided matrix(G);
  std::vector<int64_t> size = leading(G, 1);
  size.push_back(matrix.T);
  const Tensor M = empty_float64(size, G);
  gram(batch_of(matrix), true, {}, doubles(M), call.context());
  return M;
}

Tensor gram_rows_op(std::vector<std::optional<Tensor>> grads, int64_t tasks, std::optional<std::vector<Tensor>> out) {
  const Tensor& like = any_of(grads);
  const std::vector<Tensor>* const checked = out ? &*out : nullptr;
  check_devices(grads, tasks, checked, like);
  const Call call(like);
  const RaggedRows rows(grads, tasks, checked);
  const Tensor M = empty_float64({tasks, tasks}, like);
  gram(Batch(rows.gradients(), call.context()), true, {}, doubles(M), call.context());
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
  const Call call(M);
  const Options options{weights, scale, rtol, zero, rank_rule};
  const Tensor wide = as_float64(M);
  const int64_t T = M.size(-1), B = M.numel() / (T * T);
  const Balanced result = new_balanced(wide, leading(M, 2), T);
  const Policy policy = options.policy(T, M);
  if (T > kMaxJacobiTasks) {
    to_device(balance_on_host(torch::stable::to(wide, kHost), options), result); // waits: T > 64
  } else {
    balance(const_doubles(wide), B, T, policy, result.weights(), call.context());
  }
  return {result.alpha, result.eigenvalues, result.rank};
}

std::tuple<Tensor, Tensor> align_gram_op(
    const Tensor& M,
    std::optional<Tensor> weights,
    std::string scale,
    double rtol,
    double zero,
    std::string rank_rule) {
  if (M.dim() < 2 || M.size(-1) <= kMaxJacobiTasks) { // what is wrong with M is said there
    const auto [alpha, eigenvalues, rank] = balance_op(M, weights, scale, rtol, zero, rank_rule);
    return {alpha, rank};
  }
  check_square(M);
  const Call call(M);
  const Options options{weights, scale, rtol, zero, rank_rule};
  options.policy(M.size(-1), M);
  const Tensor wide = as_float64(M);
  const Tensor alpha = empty_float64(leading(M, 1), wide), rank = empty_int64(leading(M, 2), wide);
  const auto found = on_host<2>("fastmtl::align_gram", torch::stable::to(wide, kHost), options); // waits: T > 64
  Tensor targets[] = {alpha, rank};
  for (size_t i = 0; i < 2; ++i) {
    torch::stable::copy_(targets[i], found[i]);
  }
  return {alpha, rank};
}

void combine_op(const Tensor& G, const Tensor& alpha, Tensor out) {
  const Call call(G);
  Strided matrix(G, &out);
  check_alpha(alpha, G);
  check_apart(alpha, out);
  matrix.start();
  combine(batch_of(matrix), const_doubles(alpha), call.context());
  matrix.finish();
}

void combine_rows_op(std::vector<std::optional<Tensor>> grads, const Tensor& alpha, std::vector<Tensor> out) {
  check_devices(grads, out.empty() ? 1 : int64_t(grads.size() / out.size()), &out, alpha);
  const Call call(alpha);
  RaggedRows rows(grads, check_alpha(alpha, grads, out), &out);
  rows.start();
  combine(Batch(rows.gradients(), call.context()), const_doubles(alpha), call.context());
  rows.finish();
}

void sign_drop_op(const Tensor& G, const Tensor& seed, std::optional<Tensor> leak, Tensor out) {
  const Call call(G);
  Strided matrix(G, &out);
  check_seed(seed, G);
  check_vector("leak", leak, matrix.T, G);
  matrix.start();
  sign_drop(batch_of(matrix), seed_of(seed), const_doubles(leak), call.context());
  matrix.finish();
}

void sign_drop_rows_op(
    std::vector<std::optional<Tensor>> grads,
    int64_t tasks,
    const Tensor& seed,
    std::optional<Tensor> leak,
    std::vector<Tensor> out) {
  const Tensor& like = any_of(grads);
  check_devices(grads, tasks, &out, like);
  const Call call(like);
  RaggedRows rows(grads, tasks, &out);
  check_seed(seed, like);
  check_vector("leak", leak, tasks, like);
  rows.start();
  const Batch batch(rows.gradients(), call.context());
  sign_drop(batch, seed_of(seed), const_doubles(leak), call.context());
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
  const Call call(G);
  Strided matrix(G, &out);
  const Options options{weights, scale, rtol, zero, rank_rule};
  const int64_t T = matrix.T;
  const Policy policy = options.policy(T, G);
  matrix.start();
  if (T > kMaxJacobiTasks) {
    const std::vector<int64_t> batch = leading(G, 2);
    std::vector<int64_t> size = batch;
    size.insert(size.end(), {T, T});
    align_large(batch_of(matrix), options, empty_float64(size, G), new_balanced(G, batch, T), call);
  } else {
    align(batch_of(matrix), policy, nullptr, {}, call.context());
  }
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
  const Tensor& like = any_of(grads);
  check_devices(grads, tasks, &out, like);
  const Call call(like);
  RaggedRows rows(grads, tasks, &out);
  const Batch batch(rows.gradients(), call.context());
  const Options options{weights, scale, rtol, zero, rank_rule};
  const Policy policy = options.policy(tasks, like);
  rows.start();
  const Tensor M = empty_float64({tasks, tasks}, like);
  const Balanced result = new_balanced(like, {}, tasks);
  if (tasks > kMaxJacobiTasks) {
    align_large(batch, options, M, result, call);
  } else {
    align(batch, policy, doubles(M), result.weights(), call.context());
  }
  rows.finish();
  return {M, result.alpha, result.rank};
}

std::tuple<Tensor, Tensor> eigh_op(const Tensor& M) {
  check_square(M, 0);
  const Call call(M);
  const int64_t T = M.size(-1);
  const Tensor wide = as_float64(M);
  if (T > kMaxJacobiTasks) {
    StableIValue stack[2] = {torch::stable::detail::from(torch::stable::to(wide, kHost))}; // waits: T > 64
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastmtl::eigh", "", stack, TORCH_ABI_VERSION));
    const Tensor eigenvalues = torch::stable::detail::to<Tensor>(stack[0]),
                 eigenvectors = torch::stable::detail::to<Tensor>(stack[1]);
    return {
        torch::stable::to(eigenvalues, M.scalar_type(), std::nullopt, M.device()),
        torch::stable::to(eigenvectors, M.scalar_type(), std::nullopt, M.device())};
  }
  const Tensor eigenvalues = empty_float64(leading(M, 1), wide), eigenvectors = empty_float64(leading(M, 0), wide);
  if (T > 0) {
    eigh(const_doubles(wide), M.numel() / (T * T), T, doubles(eigenvalues), doubles(eigenvectors), call.context());
  }
  return {torch::stable::to(eigenvalues, M.scalar_type()), torch::stable::to(eigenvectors, M.scalar_type())};
}

} // namespace

} // namespace fastmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CUDA, m) {
  m.impl("gram", TORCH_BOX(&fastmtl::cuda::gram_op));
  m.impl("gram_rows", TORCH_BOX(&fastmtl::cuda::gram_rows_op));
  m.impl("balance", TORCH_BOX(&fastmtl::cuda::balance_op));
  m.impl("combine", TORCH_BOX(&fastmtl::cuda::combine_op));
  m.impl("combine_rows", TORCH_BOX(&fastmtl::cuda::combine_rows_op));
  m.impl("sign_drop", TORCH_BOX(&fastmtl::cuda::sign_drop_op));
  m.impl("sign_drop_rows", TORCH_BOX(&fastmtl::cuda::sign_drop_rows_op));
  m.impl("align", TORCH_BOX(&fastmtl::cuda::align_op));
  m.impl("align_rows", TORCH_BOX(&fastmtl::cuda::align_rows_op));
  m.impl("align_gram", TORCH_BOX(&fastmtl::cuda::align_gram_op));
  m.impl("eigh", TORCH_BOX(&fastmtl::cuda::eigh_op));
}
