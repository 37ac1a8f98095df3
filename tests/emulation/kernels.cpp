// The CUDA kernels and their pipeline compiled for the host, on numpy arrays: addresses come as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

// FASTMTL_EMULATE_ONLY_F32 leaves out the kernels of the other types of gradients, which halves the time to compile.
#ifdef FASTMTL_EMULATE_ONLY_F32
#include <stdexcept>

#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace fastmtl::cuda {

#define FASTMTL_LEFT_OUT(scalar)                                                                                      \
  template <>                                                                                                         \
  void launch_gram<scalar>(                                                                                           \
      const Source&, int64_t, const GramPlan&, Pass, int64_t, int64_t, const Partials&, cudaStream_t) {               \
    throw std::logic_error("only float32 was compiled");                                                              \
  }                                                                                                                   \
  template <>                                                                                                         \
  void launch_probe<scalar>(const Source&, int64_t, const float*, int64_t, int64_t, int64_t, double*, cudaStream_t) { \
    throw std::logic_error("only float32 was compiled");                                                              \
  }                                                                                                                   \
  template <>                                                                                                         \
  void launch_combine<scalar>(const Source&, int64_t, const double*, cudaStream_t) {                                  \
    throw std::logic_error("only float32 was compiled");                                                              \
  }                                                                                                                   \
  template <>                                                                                                         \
  void launch_sign_drop<scalar>(const Source&, int64_t, const int64_t*, const double*, cudaStream_t) {                \
    throw std::logic_error("only float32 was compiled");                                                              \
  }                                                                                                                   \
  template <>                                                                                                         \
  void launch_align_small<scalar>(const Source&, int64_t, const Policy&, double*, const Weights&, cudaStream_t) {     \
    throw std::logic_error("only float32 was compiled");                                                              \
  }
FASTMTL_LEFT_OUT(double)
FASTMTL_LEFT_OUT(bfloat16)
FASTMTL_LEFT_OUT(float16)

} // namespace fastmtl::cuda
#else
#include "cuda/gradients_bf16.cu"
#include "cuda/gradients_f16.cu"
#include "cuda/gradients_f64.cu"
#endif
#include "cuda/gradients_f32.cu"
#include "cuda/balance.cu"
#include "cuda/eigh.cu"
#include "cuda/gram_bound.cu"
#include "cuda/gram_reduce.cu"
#include "cuda/mend.cu"
#include "cuda/upload.cu"
#include "cuda/pipeline.cu"
#include "session.h"

#ifndef FASTMTL_EMULATION_MODULE
#define FASTMTL_EMULATION_MODULE kernels
#endif

namespace py = pybind11;

namespace fastmtl::cuda {

namespace {

// A warp's product as the kernels compute it where they are emulated, and by shuffles as on old devices.
__global__ void both_mma(
    const double* operands, // [32, 3, 2]: low, high and right of each lane
    double* sums) {         // [2, 32, 4]
  const double* mine = operands + threadIdx.x * 6;
  const double low[2] = {mine[0], mine[1]}, high[2] = {mine[2], mine[3]}, right[2] = {mine[4], mine[5]};
  double c[4] = {1.0, 2.0, 3.0, 4.0}, d[4] = {1.0, 2.0, 3.0, 4.0};
  for (int n = 0; n < 3; ++n) {
    mma(c, low, high, right);
    mma_by_shuffles(d, low, high, right);
  }
  for (int e = 0; e < 4; ++e) {
    sums[threadIdx.x * 4 + e] = c[e];
    sums[128 + threadIdx.x * 4 + e] = d[e];
  }
}

Dtype dtype_of(const std::string& name) {
  return name == "float32"    ? Dtype::f32
         : name == "float64"  ? Dtype::f64
         : name == "bfloat16" ? Dtype::bf16
                              : Dtype::f16;
}

Policy policy_of(const py::dict& options) {
  const std::string scale = py::cast<std::string>(options["scale"]);
  return {
      at<const double>(py::cast<uintptr_t>(options["weights"])),
      scale == "min"      ? Scale::min
      : scale == "median" ? Scale::median
                          : Scale::rmse,
      py::cast<std::string>(options["rank_rule"]) == "normalized" ? RankRule::normalized : RankRule::gram,
      py::cast<double>(options["rtol"]),
      py::cast<double>(options["zero"])};
}

// A gradient matrix as tests hand it over: strides of a flat batch, or segments (addresses of T rows, result, length,
// dtype).
struct Input {
  int64_t B = 1, T = 1, P = 0, next_matrix = 0, next_row = 0, next_out = 0;
  uintptr_t base = 0, out = 0;
  std::string dtype;
  std::vector<std::tuple<std::vector<uintptr_t>, uintptr_t, int64_t, std::string>> segments;
  bool ragged = false;

  Batch batch(const Context& context) const {
    if (!ragged) {
      return Batch(at<char>(base), B, T, P, next_matrix, next_row, at<char>(out), next_out, dtype_of(dtype));
    }
    std::vector<Segment> list;
    for (const auto& [rows, result, length, name] : segments) {
      list.push_back({reinterpret_cast<const void* const*>(rows.data()), at<void>(result), length, dtype_of(name)});
    }
    return Batch(Gradients{list.data(), int64_t(list.size()), T}, context);
  }
};

PYBIND11_MODULE(FASTMTL_EMULATION_MODULE, m) {
  m.def("set_order", [](const std::string& order, unsigned seed) { host_cuda::set_order(order, seed); });
  m.def("set_shared_limit", [](size_t bytes) { host_cuda::set_shared_limit(bytes); });
#ifdef FASTMTL_EMULATE_ONLY_F32
  m.attr("dtypes") = std::vector<std::string>{"float32"};
#else
  m.attr("dtypes") = std::vector<std::string>{"float32", "float64", "bfloat16", "float16"};
#endif
  m.def("launches", [] {
    std::vector<std::string> names;
    for (const auto& launch : host_cuda::launches()) {
      names.emplace_back(launch.kernel);
    }
    return names;
  });
  m.def("watch_loads", &host_cuda::watch_loads);
  m.def("watched", &host_cuda::watched);
  m.def("reset_launches", [] { host_cuda::reset_launches(); });

  py::class_<Input>(m, "Input")
      .def(py::init<>())
      .def_readwrite("B", &Input::B)
      .def_readwrite("T", &Input::T)
      .def_readwrite("P", &Input::P)
      .def_readwrite("next_matrix", &Input::next_matrix)
      .def_readwrite("next_row", &Input::next_row)
      .def_readwrite("next_out", &Input::next_out)
      .def_readwrite("base", &Input::base)
      .def_readwrite("out", &Input::out)
      .def_readwrite("dtype", &Input::dtype)
      .def_readwrite("segments", &Input::segments)
      .def_readwrite("ragged", &Input::ragged);
  py::class_<Session>(m, "Session").def(py::init<bool, int64_t>());

  m.def("mma", [](uintptr_t operands, uintptr_t sums) {
    FASTMTL_LAUNCH(both_mma, dim3(1), dim3(32), 0, nullptr, at<double>(operands), at<double>(sums));
  });
  m.def("gram", [](Session& session, const Input& G, bool exact, uintptr_t M) {
    const Batch batch = G.batch(session.context);
    const GramResult result = gram(batch, exact, {}, at<double>(M), session.context);
    const int64_t bounds = result.judge == Judge::blocks ? batch.matrices() : 0;
    return std::vector<double>(result.bound, result.bound + bounds);
  });
  m.def("in_one_block", [](Session& session, int64_t T) { return in_one_block(T, session.context); });
  m.def(
      "balance",
      [](Session& session,
         uintptr_t M,
         int64_t B,
         int64_t T,
         const py::dict& options,
         uintptr_t alpha,
         uintptr_t eigenvalues,
         uintptr_t rank) {
        balance(
            at<double>(M),
            B,
            T,
            policy_of(options),
            {at<double>(alpha), at<double>(eigenvalues), at<int64_t>(rank)},
            session.context);
      });
  m.def("combine", [](Session& session, const Input& G, uintptr_t alpha) {
    combine(G.batch(session.context), at<double>(alpha), session.context);
  });
  m.def("sign_drop", [](Session& session, const Input& G, uintptr_t seed, uintptr_t leak) {
    sign_drop(G.batch(session.context), at<const int64_t>(seed), at<const double>(leak), session.context);
  });
  m.def(
      "align",
      [](Session& session, const Input& G, const py::dict& options, uintptr_t M, uintptr_t alpha, uintptr_t rank) {
        align(
            G.batch(session.context),
            policy_of(options),
            at<double>(M),
            {at<double>(alpha), nullptr, at<int64_t>(rank)},
            session.context);
      });
  m.def("eigh", [](Session& session, uintptr_t M, int64_t B, int64_t T, uintptr_t eigenvalues, uintptr_t eigenvectors) {
    eigh(at<double>(M), B, T, at<double>(eigenvalues), at<double>(eigenvectors), session.context);
  });
}

} // namespace

} // namespace fastmtl::cuda
