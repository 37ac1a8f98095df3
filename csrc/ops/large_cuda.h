// More tasks than the kernels for Gram matrices take on a GPU: the CPU's ops weigh them. That waits for the device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../cuda/pipeline.h"
#include "cuda_call.h"
#include "gradients.h"

namespace fastmtl::cuda {

namespace { // as in tensors.h

template <class Argument>
Argument on_host(const Argument& x) {
  return x;
}

template <>
inline Tensor on_host(const Tensor& x) {
  return torch::stable::to(x, kHost); // waits: T > 64
}

template <>
inline std::optional<Tensor> on_host(const std::optional<Tensor>& x) {
  return x ? std::optional(on_host(*x)) : x;
}

// The op, by its name in this library, on arguments that are on the host.
template <size_t results, class... Arguments>
std::array<Tensor, results> call_on_host(const char* op, const Arguments&... arguments) {
  StableIValue stack[std::max(results, sizeof...(arguments))] = {torch::stable::detail::from(arguments)...};
  const std::string name = std::string("fastmtl::") + op;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION));
  std::array<Tensor, results> found;
  for (size_t i = 0; i < results; ++i) {
    found[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return found;
}

// α, eigenvalues and rank of `balance`, or α and rank of `align_gram`; M on the host.
template <size_t results>
std::array<Tensor, results> balance_on_host(const char* op, const Tensor& M, const Options& options) {
  return call_on_host<results>(
      op, M, on_host(options.weights), options.scale, options.rtol, options.zero, options.rank_rule);
}

// Results of the host where the device's are expected.
template <size_t results, class... Targets>
void take(const std::array<Tensor, results>& found, const Targets&... targets) {
  size_t i = 0;
  const auto copy = [&](Tensor target) { torch::stable::copy_(target, found[i++]); };
  (copy(targets), ...);
}

// Whether a Gram matrix from float32 blocks will do: what `balance` decides on the device for smaller T. That the
// spectrum of M alone proves it is enough here; an exact pass is what it costs where it does not.
inline bool blocks_suffice(const double* M, const double* eigenvalues, int64_t T, double least) {
  double largest = 0.0, smallest = INFINITY;
  for (int64_t i = 0; i < T; ++i) {
    largest = std::fmax(largest, M[i * T + i]);
    smallest = std::fmin(smallest, M[i * T + i]);
  }
  return eigenvalues[T - 1] > least * largest && smallest >= kFloat32Square; // false for NaN
}

// `align` for T > 64, which waits for the device.
inline void align_large(
    const Batch& G,
    const Options& options,
    const Tensor& M,     // [B, T, T] or, for one matrix, [T, T]
    const Tensor& alpha, // [B, T] or [T]
    const Tensor& rank,  // [B] or []
    const Call& call) {
  const int64_t B = G.matrices(), T = G.tasks();
  const Context& context = call.context();
  const GramResult first = gram(G, false, {}, doubles(M), context);
  const Tensor host = on_host(M);
  auto found = balance_on_host<3>("balance", host, options);
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
      v.again = !blocks_suffice(entries, const_doubles(found[1]) + b * T, T, bound[size_t(b)]);
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
    found = balance_on_host<3>("balance", on_host(second), options);
    // Of those that were rescaled, the public Gram matrix stays as it was.
    if (std::all_of(verdicts.begin(), verdicts.end(), [](const Verdict& v) { return v.half == 1.0; })) {
      Tensor target = M;
      torch::stable::copy_(target, second);
    }
  }
  take(std::array{found[0], found[2]}, alpha, rank);
  combine(G, const_doubles(alpha), context);
}

} // namespace

} // namespace fastmtl::cuda
