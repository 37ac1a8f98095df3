// Launches of the solvers: their grids and memory.
#include <algorithm>

#include "weights.cuh"
#include "weights.h"

namespace fastmtl::cuda {

namespace {

// Scratch in global memory for so many problems at once: more than a GPU has in work, and at most 150 MB.
constexpr int64_t kMaxWorkspaces = 1024;

double* doubles_of(const Context& context, int64_t count) {
  return static_cast<double*>(context.allocate(count * int64_t(sizeof(double))));
}

template <class Method>
void launch_solve(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    Method method,
    double* alpha,    // [B, T]
    double* residual, // [B], or null
    const Context& context) {
  if (B == 0) {
    return;
  }
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

void mgda(const double* M, int64_t B, int64_t T, double* alpha, double* residual, const Context& context) {
  launch_solve(M, B, T, Mgda{}, alpha, residual, context);
}

void dual_cone(
    const double* M,
    int64_t B,
    int64_t T,
    const double* weights,
    bool each,
    double* alpha,
    double* residual,
    const Context& context) {
  launch_solve(M, B, T, DualCone{weights, each}, alpha, residual, context);
}

void cagrad(const double* M, int64_t B, int64_t T, double c, double* alpha, double* residual, const Context& context) {
  launch_solve(M, B, T, Cagrad{c}, alpha, residual, context);
}

void nash(
    const double* M,
    int64_t B,
    int64_t T,
    double power,
    double* alpha,
    double* residual,
    const Context& context) {
  launch_solve(M, B, T, Nash{power}, alpha, residual, context);
}

void pcgrad(
    const double* M,
    int64_t B,
    int64_t T,
    const int64_t* seed,
    bool per_task,
    double* alpha,
    const Context& context) {
  launch_solve(M, B, T, Pcgrad{seed, per_task}, alpha, nullptr, context);
}

void gradvac(
    const double* M,
    int64_t B,
    int64_t T,
    const int64_t* seed,
    double beta,
    double* targets,
    double* alpha,
    const Context& context) {
  launch_solve(M, B, T, Gradvac{seed, beta, targets}, alpha, nullptr, context);
}

} // namespace fastmtl::cuda
