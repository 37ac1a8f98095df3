// float64 matrix products by a warp, through the tensor cores where there are any.
#pragma once

#include "platform.h"

namespace fastmtl::cuda {

// c [16, 8] += a [16, 8] b [8, 8]. With g = lane / 4 and q = lane % 4 a lane holds
//   rows g and g + 8 of a: low[i], high[i] in column q + 4 i; column g of b: right[i] in row q + 4 i;
//   rows g and g + 8 of c: c[0], c[1] and c[2], c[3] in columns 2 q and 2 q + 1.
// Where b is the transpose of eight of a's rows, `right` is those rows' `low` or `high`: a Gram matrix needs no
// shuffles.

// For devices without such an instruction: there float64 is so slow that the shuffles are not what takes the time.
__device__ inline void
mma_by_shuffles(double (&c)[4], const double (&low)[2], const double (&high)[2], const double (&right)[2]) {
  const int lane = int(threadIdx.x) % 32, row = lane & ~3, column = lane % 4 * 8;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 4; ++k) {
      const double a = __shfl_sync(0xffffffffu, low[i], row + k);
      const double b = __shfl_sync(0xffffffffu, high[i], row + k);
      const double x = __shfl_sync(0xffffffffu, right[i], column + k);
      const double y = __shfl_sync(0xffffffffu, right[i], column + 4 + k);
      c[0] = fma(a, x, c[0]);
      c[1] = fma(a, y, c[1]);
      c[2] = fma(b, x, c[2]);
      c[3] = fma(b, y, c[3]);
    }
  }
}

__device__ inline void mma(double (&c)[4], const double (&low)[2], const double (&high)[2], const double (&right)[2]) {
#ifdef FASTMTL_EMULATE
  host_cuda::mma(c, low, high, right); // the same sums, sixteen times faster to emulate than 32 shuffles
#elif __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(low[0]), "d"(high[0]), "d"(low[1]), "d"(high[1]), "d"(right[0]), "d"(right[1]));
#elif __CUDA_ARCH__ >= 800
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c[0]), "+d"(c[1])
        : "d"(low[i]), "d"(right[i]));
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c[2]), "+d"(c[3])
        : "d"(high[i]), "d"(right[i]));
  }
#else
  mma_by_shuffles(c, low, high, right);
#endif
}

} // namespace fastmtl::cuda
