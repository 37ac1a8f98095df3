// Gram matrices -> task weights: the solvers of csrc/math with a warp as their team, one warp a block and a
// block a problem. A problem is a matrix, or one task of a matrix where the method's weights are a sum over tasks
// (Σ_i v_i); these sums are a kernel of their own, in the order of the tasks.
//
// A problem reads T² 8 bytes and writes T 8. What it costs is the length of its chain of small steps, each a barrier
// of the warp and a trip to shared memory: O(T²) of them for a factorisation of T³/3 multiply-adds.
#pragma once

#include "../math/solvers.h"
#include "platform.h"

namespace fastmtl::cuda {

constexpr int kWarp = 32, kSumThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// The team of math/team.h. All lanes get the same bits from a sum: partners add the same two numbers at every step.
//
// Loops are not unrolled: few have more than two rounds. Host functions in name only, since the solvers are templates
// for both sides.
struct Warp {
  template <class F>
  FASTMTL_HOST_DEVICE void each(int64_t n, F f) const {
    sync();
#pragma unroll 1
    for (int i = lane(); i < n; i += kWarp) {
      f(i);
    }
    sync();
  }

  template <class F>
  FASTMTL_HOST_DEVICE double sum(int64_t n, F f) const {
    double total = 0.0;
#pragma unroll 1
    for (int i = lane(); i < n; i += kWarp) {
      total += f(i);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      total += partner(total, offset);
    }
    return total;
  }

  template <class F>
  FASTMTL_HOST_DEVICE double largest(int64_t n, F f) const {
    double best = -kInfinity;
#pragma unroll 1
    for (int i = lane(); i < n; i += kWarp) {
      best = larger(best, f(i));
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      best = larger(best, partner(best, offset));
    }
    return best;
  }

  template <class F>
  FASTMTL_HOST_DEVICE int64_t argmax(int64_t n, F f) const {
    double best = -kInfinity;
    int at = -1;
#pragma unroll 1
    for (int i = lane(); i < n; i += kWarp) {
      const double x = f(i);
      if (x > best) {
        best = x;
        at = i;
      }
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const double x = partner(best, offset);
      const int other = partner(at, offset);
      if (x > best || (x == best && other < at)) { // only -infinity has no index, and that is less than any
        best = x;
        at = other;
      }
    }
    return at;
  }

  template <class F>
  FASTMTL_HOST_DEVICE void once(F f) const {
    sync();
    if (lane() == 0) {
      f();
    }
    sync();
  }

 private:
#if defined(__CUDA_ARCH__) || defined(FASTMTL_EMULATE)
  FASTMTL_HOST_DEVICE static int lane() {
    return int(threadIdx.x);
  }
  FASTMTL_HOST_DEVICE static void sync() {
    __syncwarp();
  }
  template <class X>
  FASTMTL_HOST_DEVICE static X partner(X x, int offset) {
    return __shfl_xor_sync(kAllLanes, x, offset);
  }
#else
  FASTMTL_HOST_DEVICE static int lane() {
    return 0;
  }
  FASTMTL_HOST_DEVICE static void sync() {}
  template <class X>
  FASTMTL_HOST_DEVICE static X partner(X x, int) {
    return x;
  }
#endif
};

template <class Method>
constexpr size_t solve_shared(int64_t T) {
  return size_t(Method::scratch(T)) * sizeof(double);
}

// Block n has problems n, n + gridDim.x, ... NaN, and nothing else done, where M is not finite.
template <class Method>
__global__ __launch_bounds__(kWarp, 1) void solve(
    const double* M, // [B, T, T]
    int64_t T,
    Method method,
    int64_t count,      // B * problems
    double* workspace,  // [gridDim.x, scratch] where that does not fit shared memory, else null
    double* v,          // [B, problems, T]
    double* residual) { // [B, problems], or null
  FASTMTL_DYNAMIC_SHARED(shared);
  double* scratch = workspace ? workspace + blockIdx.x * Method::scratch(T) : reinterpret_cast<double*>(shared);
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    const int64_t problems = method.problems(T), b = n / problems, i = n % problems;
    const double* const gram = M + b * T * T;
    double* const result = v + n * T;
    double worst = 0.0 / 0.0;
    if (all_finite(Warp(), gram, T * T)) {
      worst = method(Warp(), gram, T, Problem{b, i}, result, scratch);
    } else {
      Warp().each(T, [=](int64_t t) { result[t] = worst; });
    }
    if (residual && threadIdx.x == 0) {
      residual[n] = worst;
    }
  }
}

// alpha = Σ_i v_i in the order of the tasks, and the worst of their residuals: a thread each number.
__global__ __launch_bounds__(kSumThreads) void sum_tasks(
    const double* v,         // [B, T, T]
    const double* residuals, // [B, T], or null
    int64_t B,
    int64_t T,
    double* alpha,      // [B, T]
    double* residual) { // [B], or null
  const int64_t k = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, b = k / T;
  if (b >= B) {
    return;
  }
  double sum = 0.0, worst = 0.0;
#pragma unroll 4
  for (int64_t i = 0; i < T; ++i) {
    sum += v[(b * T + i) * T + k % T];
  }
  alpha[k] = sum;
  if (residuals && k % T == 0) {
#pragma unroll 4
    for (int64_t i = 0; i < T; ++i) {
      worst = larger(worst, residuals[b * T + i]);
    }
    residual[b] = worst;
  }
}

} // namespace fastmtl::cuda
