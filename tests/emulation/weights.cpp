// The solvers as CUDA kernels compiled for the host, on numpy arrays: addresses come as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/kernels_solvers.cu"
#include "session.h"

namespace py = pybind11;

namespace fastmtl::cuda {

namespace {

PYBIND11_MODULE(weights, m) {
  m.def("set_order", [](const std::string& order, unsigned seed) { host_cuda::set_order(order, seed); });
  m.def("set_shared_limit", [](size_t bytes) { host_cuda::set_shared_limit(bytes); });
  m.def("launches", [] {
    std::vector<std::pair<std::string, size_t>> names; // with their shared memory
    for (const auto& launch : host_cuda::launches()) {
      names.emplace_back(launch.kernel, launch.shared_bytes);
    }
    return names;
  });
  m.def("reset_launches", [] { host_cuda::reset_launches(); });
  py::class_<Session>(m, "Session").def(py::init<bool, int64_t>());

  m.def("mgda", [](Session& session, uintptr_t M, int64_t B, int64_t T, uintptr_t alpha, uintptr_t residual) {
    mgda(at<double>(M), B, T, at<double>(alpha), at<double>(residual), session.context);
  });
  m.def(
      "dual_cone",
      [](Session& session,
         uintptr_t M,
         int64_t B,
         int64_t T,
         uintptr_t alpha,
         uintptr_t residual,
         uintptr_t weights,
         bool each) {
        dual_cone(
            at<double>(M),
            B,
            T,
            at<const double>(weights),
            each,
            at<double>(alpha),
            at<double>(residual),
            session.context);
      });
  m.def(
      "cagrad", [](Session& session, uintptr_t M, int64_t B, int64_t T, uintptr_t alpha, uintptr_t residual, double c) {
        cagrad(at<double>(M), B, T, c, at<double>(alpha), at<double>(residual), session.context);
      });
  m.def(
      "nash",
      [](Session& session, uintptr_t M, int64_t B, int64_t T, uintptr_t alpha, uintptr_t residual, double power) {
        nash(at<double>(M), B, T, power, at<double>(alpha), at<double>(residual), session.context);
      });
  m.def(
      "pcgrad",
      [](Session& session,
         uintptr_t M,
         int64_t B,
         int64_t T,
         uintptr_t alpha,
         uintptr_t,
         uintptr_t seed,
         bool per_task) {
        pcgrad(at<double>(M), B, T, at<const int64_t>(seed), per_task, at<double>(alpha), session.context);
      });
  m.def(
      "gradvac",
      [](Session& session,
         uintptr_t M,
         int64_t B,
         int64_t T,
         uintptr_t alpha,
         uintptr_t,
         uintptr_t seed,
         double beta,
         uintptr_t targets) {
        gradvac(
            at<double>(M),
            B,
            T,
            at<const int64_t>(seed),
            beta,
            at<double>(targets),
            at<double>(alpha),
            session.context);
      });
}

} // namespace

} // namespace fastmtl::cuda
