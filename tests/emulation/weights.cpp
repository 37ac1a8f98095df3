// The solvers as CUDA kernels compiled for the host, on numpy arrays: addresses come as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/solve.cu"
#include "session.h"

namespace py = pybind11;

namespace fastmtl::cuda {

namespace {

// An option from Python: addresses are integers.
template <class Option>
using Given = std::conditional_t<std::is_pointer_v<typename Option::Value>, uintptr_t, typename Option::Value>;

template <class Value, class Given>
Value value(Given x) {
  if constexpr (std::is_pointer_v<Value>) {
    return reinterpret_cast<Value>(x);
  } else {
    return x;
  }
}

template <class Method, class... Option>
void define(py::module_& m, const std::tuple<Option...>&) {
  m.def(
      Method::kName,
      [](Session& session,
         uintptr_t M,
         int64_t B,
         int64_t T,
         uintptr_t alpha,
         uintptr_t residual,
         Given<Option>... options) {
        const Method method{{}, value<typename Option::Value>(options)...};
        double* const where = Method::kResidual ? at<double>(residual) : nullptr;
        launch_solver(method, at<const double>(M), B, T, at<double>(alpha), where, session.context);
      });
}

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

  for_each_solver([&]<class Method>(std::type_identity<Method>) { define<Method>(m, Method::kOptions); });
}

} // namespace

} // namespace fastmtl::cuda
