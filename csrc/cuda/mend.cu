// Gram entries of missing rows. The passes over G read a missing row as zeros, whose product with infinity or NaN is
// NaN; but it is not there to be multiplied. Where rows of a ragged list are missing, entries that are not finite are
// summed again, over the tensors that both rows have.
//
// Reads T² 8 bytes, and nothing else while M is finite; then both rows of an entry, up to the first NaN.
#include "gram.cuh"
#include "kernels.h"

namespace fastmtl::cuda {

namespace {

constexpr int kMendThreads = 256;

// What a thread adds to the product of two rows of `length` columns.
template <class scalar>
__device__ double mend_part(uint64_t row, uint64_t other, int64_t length) {
  const scalar *x = reinterpret_cast<const scalar*>(row), *y = reinterpret_cast<const scalar*>(other);
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < length; c += kMendThreads) {
    sum = fma(widen<double>(x[c]), widen<double>(y[c]), sum);
  }
  return sum;
}

// Block i: row i of M's upper triangle.
__global__ __launch_bounds__(kMendThreads) void mend(
    const __grid_constant__ Sources G,
    Pass pass,
    int64_t T,
    double* M) { // [T, T]
  if (pass.skip(0) || pass.rescales(0)) {
    return;
  }
  FASTMTL_DYNAMIC_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared); // [kMendThreads / 32]
  const int64_t i = blockIdx.x;
  for (int64_t j = i + 1; j < T; ++j) { // row i with itself is a product wherever it is there
    if (M[i * T + j] * 0.0 == 0.0) {
      continue;
    }
    double sum = 0.0;
    for (int p = 0; p < G.count; ++p) {
      const Source& part = G.part[p];
      for (int64_t s = 0; s < part.segments && !__syncthreads_or(sum != sum); ++s) {
        const uint64_t* record = part.record(s);
        const uint64_t x = record[kRows0 + i], y = record[kRows0 + j];
        const int64_t length = int64_t(record[kLength]);
        if (!x || !y) {
          continue;
        }
        switch (G.dtype[p]) {
          case Dtype::f32:
            sum += mend_part<float>(x, y, length);
            break;
          case Dtype::f64:
            sum += mend_part<double>(x, y, length);
            break;
          case Dtype::bf16:
            sum += mend_part<bfloat16>(x, y, length);
            break;
          case Dtype::f16:
            sum += mend_part<float16>(x, y, length);
            break;
        }
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kMendThreads / 32; ++w) {
        sum += sums[w];
      }
      M[i * T + j] = M[j * T + i] = sum;
    }
  }
}

} // namespace

void launch_mend(const Sources& G, Pass pass, int64_t T, double* M, cudaStream_t stream) {
  FASTMTL_LAUNCH(
      mend, dim3(unsigned(T)), dim3(kMendThreads), kMendThreads / 32 * sizeof(double), stream, G, pass, T, M);
}

} // namespace fastmtl::cuda
