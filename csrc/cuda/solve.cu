// Launches of the solvers: their grids and memory.
#include <algorithm>
#include <array>

#include "solve.cuh"
#include "solve.h"

namespace fastmtl::cuda {

namespace {

// Scratch in global memory for so many problems at once: more than a GPU has in work, and at most 150 MB.
constexpr int64_t kMaxWorkspaces = 1024;

double* doubles_of(const Context& context, int64_t count) {
  return static_cast<double*>(context.allocate(count * int64_t(sizeof(double))));
}

template <class Method>
void solve_by(
    const void* functor,
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* alpha,    // [B, T]
    double* residual, // [B], or null
    const Context& context) {
  if (B == 0) {
    return;
  }
  const Method method = *static_cast<const Method*>(functor);
  const int64_t problems = method.problems(T), count = B * problems;
  const size_t shared = solve_shared<Method>(T);
  const bool fits = int64_t(shared) <= context.shared_limit;
  const int64_t blocks = fits ? count : std::min(count, kMaxWorkspaces);
  double* workspace = fits ? nullptr : doubles_of(context, blocks * Method::scratch(T));
  const bool sums = problems > 1;
  double* v = sums ? doubles_of(context, count * T) : alpha;
  double* residuals = sums && residual ? doubles_of(context, count) : residual;
  FASTMTL_LAUNCH(
      solve<Method>,
      dim3(unsigned(blocks)),
      dim3(kWarp),
      fits ? shared : 0,
      context.stream,
      M,
      T,
      method,
      count,
      workspace,
      v,
      residuals);
  if (sums) {
    const int64_t sum_blocks = (B * T + kSumThreads - 1) / kSumThreads;
    FASTMTL_LAUNCH(
        sum_tasks,
        dim3(unsigned(sum_blocks)),
        dim3(kSumThreads),
        0,
        context.stream,
        v,
        residuals,
        B,
        T,
        alpha,
        residual);
  }
}

} // namespace

void launch_solver(
    size_t solver,
    const void* method,
    const double* M,
    int64_t B,
    int64_t T,
    double* alpha,
    double* residual,
    const Context& context) {
  static constexpr auto each = []<class... Method>(std::type_identity<std::tuple<Method...>>) {
    return std::array{solve_by<Method>...};
  }(std::type_identity<Solvers>{});
  each[solver](method, M, B, T, alpha, residual, context);
}

} // namespace fastmtl::cuda
