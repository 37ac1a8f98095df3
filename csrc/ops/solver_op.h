// The op of a solver of csrc/math, for every device: M and the solver's options as torch passes them.
#pragma once

#include <tuple>
#include <type_traits>

#include "../math/solvers.h"
#include "weighing.h"

namespace fastmtl {

namespace { // as in tensors.h

// The type of an option as an argument of the op; `value_of` checks it and makes it a member of the solver.
template <class Option>
struct Argument {
  using type = Tensor;
};
template <>
struct Argument<Number> {
  using type = double;
};
template <>
struct Argument<Flag> {
  using type = bool;
};
template <>
struct Argument<PerTask> {
  using type = std::optional<Tensor>;
};

inline double value_of(const Number& option, double x, const Weighing&) {
  FASTMTL_CHECK(option.holds(x), option.name, ": expected ", option.expected, ", got ", x);
  return x;
}

inline bool value_of(const Flag&, bool x, const Weighing&) {
  return x;
}

inline const double* value_of(const PerTask& option, const std::optional<Tensor>& x, const Weighing& to) {
  check_vector(option.name, x, to.T, to.given);
  return const_doubles(x);
}

inline const int64_t* value_of(const Seed&, const Tensor& x, const Weighing& to) {
  check_seed(x, to.given);
  return static_cast<const int64_t*>(x.const_data_ptr());
}

inline double* value_of(const State& option, const Tensor& x, const Weighing& to) {
  check_state(option.name, x, to.given);
  mark_written(option.name, x);
  return doubles(x);
}

// Device::solve(scope, weighing, method, residual, arguments...) computes the weights; `residual` is null if the op
// returns none.
template <class Method, class Device, class Options = std::remove_const_t<decltype(Method::kOptions)>>
struct SolverOp;

template <class Method, class Device, class... Option>
struct SolverOp<Method, Device, std::tuple<Option...>> {
  static auto run(const Tensor& M, typename Argument<Option>::type... arguments) {
    const typename Device::Scope scope(M);
    const Weighing to(M);
    const Method method = std::apply(
        [&](const Option&... option) { return Method{{}, value_of(option, arguments, to)...}; }, Method::kOptions);
    if constexpr (Method::kResidual) {
      Tensor residual = to.residual();
      Device::solve(scope, to, method, &residual, arguments...);
      return std::tuple<Tensor, Tensor>(to.alpha, residual);
    } else {
      Device::solve(scope, to, method, nullptr, arguments...);
      return to.alpha;
    }
  }
};

} // namespace

} // namespace fastmtl
