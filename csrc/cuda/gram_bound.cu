// What a Gram matrix from float32 sums is worth: the vectors that are sent through G, and what came back.
#include "kernels.h"
#include "probe.cuh"

namespace fastmtl::cuda {

namespace {

constexpr int kBoundThreads = 1024;

// A thread an entry.
__global__ __launch_bounds__(kBoundThreads) void probe_vectors(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    float* z) { // [B, T, kProbes]
  const int64_t k = int64_t(blockIdx.x) * kBoundThreads + threadIdx.x;
  if (k < B * T * kProbes) {
    const int64_t row = k / kProbes, t = row % T;
    z[k] = probe_entry_over_root3(t, k % kProbes) * probe_scale(M[row * T + t]);
  }
}

// A block a matrix, a thread an entry of M z - y: ‖D^-1/2 (M z - y)‖ of each probe, the largest of which, times √3,
// what the scale of z misses of 1 / norm and the safety of so many probes, over what is promised, is the bound. NaN
// where M or y is not finite. Reads M once for every probe, and the partials once.
__global__ __launch_bounds__(kBoundThreads) void probe_bound(
    const double* M, // [B, T, T]
    int64_t T,
    const float* z, // [B, T, kProbes]
    int64_t blocks,
    double* partial, // [B, blocks, T, kProbes]: the squares go to the first block's
    double* least) { // [B]
  const int64_t b = blockIdx.x, slot = T * kProbes;
  M += b * T * T;
  z += b * slot;
  partial += b * blocks * slot;
  for (int64_t k = threadIdx.x; k < slot; k += kBoundThreads) {
    const int64_t i = k / kProbes, p = k % kProbes;
    double y = partial[k], along = 0.0;
    for (int64_t c = 1; c < blocks; ++c) {
      y += partial[c * slot + k];
    }
    for (int64_t j = 0; j < T; ++j) {
      along += M[j * T + i] * double(z[j * kProbes + p]);
    }
    partial[k] = (along - y) * (along - y) / M[i * T + i];
  }
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  double largest = 0.0, correction = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    correction = fmax(correction, 1.0 / (sqrt(M[t * T + t]) * double(probe_scale(M[t * T + t]))));
  }
  for (int p = 0; p < kProbes; ++p) {
    double squares = 0.0;
    for (int64_t i = 0; i < T; ++i) {
      squares += partial[i * kProbes + p];
    }
    largest = squares <= largest ? largest : squares; // NaN stays
  }
  least[b] = probe_safety(kProbes) * sqrt(3.0 * largest) * correction / promised_error(T);
}

} // namespace

void launch_probe_vectors(const double* M, int64_t B, int64_t T, float* z, cudaStream_t stream) {
  const int64_t blocks = (B * T * kProbes + kBoundThreads - 1) / kBoundThreads;
  FASTMTL_LAUNCH(probe_vectors, dim3(unsigned(blocks)), dim3(kBoundThreads), 0, stream, M, B, T, z);
}

void launch_probe_bound(
    const double* M,
    int64_t B,
    int64_t T,
    const float* z,
    int64_t blocks,
    double* partial,
    double* least,
    cudaStream_t stream) {
  FASTMTL_LAUNCH(probe_bound, dim3(unsigned(B)), dim3(kBoundThreads), 0, stream, M, T, z, blocks, partial, least);
}

} // namespace fastmtl::cuda
