// Every solver that is an op of its own, once.
#pragma once

#include <type_traits>

#include "cagrad.h"
#include "conflicts.h"
#include "dual_cone.h"
#include "mgda.h"
#include "nash.h"

namespace fastmtl {
namespace {

using Solvers = std::tuple<
    Mgda, //
    DualCone,
    Cagrad,
    Nash,
    Pcgrad,
    Gradvac>;

// Its place in tables, one entry a solver.
template <class Method>
constexpr size_t kSolver = []<class... Each>(std::type_identity<std::tuple<Each...>>) {
  size_t place = 0;
  (void)((std::is_same_v<Method, Each> || (++place, false)) || ...);
  return place;
}(std::type_identity<Solvers>{});

// f of the type of each, in this order.
template <class F>
void for_each_solver(F f) {
  [&]<class... Each>(std::type_identity<std::tuple<Each...>>) {
    (f(std::type_identity<Each>{}), ...);
  }(std::type_identity<Solvers>{});
}

} // namespace
} // namespace fastmtl
