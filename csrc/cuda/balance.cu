// Aligned-MTL's weights, a block a matrix, and what the pipeline judges them by.
#include "balance.cuh"
#include "kernels.h"

namespace fastmtl::cuda {

namespace {

__global__ __launch_bounds__(kMaxJacobiThreads) void balance(
    const double* M, // [B, T, T]
    int T,
    Policy policy,
    Judge judge,
    Pass pass,
    const double* bound, // [B]: what the judge goes by
    bool scratch_shared,
    double* scratch,     // [B, balance_scratch(T)] where it does not fit shared memory
    double* alpha,       // [B, T]
    double* eigenvalues, // [B, T], or null
    int64_t* rank,       // [B]
    Verdict* verdict,    // [B], or null
    double* gram) {      // [B, T, T]: where the second pass leaves an M that needed no scaling, or null
  const int64_t b = blockIdx.x;
  if (pass.skip(b)) {
    return;
  }
  FASTMTL_DYNAMIC_SHARED(shared);
  M += b * T * T;
  const bool again = balance_block(
      M,
      T,
      policy,
      judge,
      judge == Judge::blocks ? bound[b] : 0.0,
      shared,
      scratch_shared ? nullptr : scratch + b * balance_scratch(T),
      alpha + b * T,
      eigenvalues ? eigenvalues + b * T : nullptr,
      rank + b);
  if (gram && !pass.rescales(b)) {
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      gram[b * T * T + k] = M[k];
    }
  }
  if (verdict && threadIdx.x == 0) {
    Verdict v{double(again), 1.0, 1.0};
    if (judge == Judge::range && again) {
      rescale(bound[b], v.half, v.rest);
      v.again = v.half != 1.0;
    }
    verdict[b] = v;
  }
}

} // namespace

void launch_balance(
    const double* M,
    int64_t B,
    int64_t T,
    const Policy& policy,
    Judge judge,
    Pass pass,
    const double* bound,
    double* scratch,
    const Weights& weights,
    Verdict* verdict,
    double* gram,
    cudaStream_t stream) {
  FASTMTL_LAUNCH(
      balance,
      dim3(unsigned(B)),
      dim3(unsigned(jacobi_threads(T))),
      balance_shared(T, !scratch),
      stream,
      M,
      int(T),
      policy,
      judge,
      pass,
      bound,
      !scratch,
      scratch,
      weights.alpha,
      weights.eigenvalues,
      weights.rank,
      verdict,
      gram);
}

} // namespace fastmtl::cuda
