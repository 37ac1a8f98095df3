// Sums over the threads of a block, in an order that does not depend on anything but the block's size.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fastmtl::cuda {

// Sums each of kN values over the 32 lanes of a warp by recursive halving: at every step a lane hands half of its
// values to its partner and keeps the other half, so that about kN shuffles do what 5 kN would. Lane l ends with the
// sums of values first, first + 1, ... < last in v[0], v[1], ...
template <int kN, int kOffset = 16>
__device__ void warp_sums(double* v, int lane, int& first, int& last) {
  if constexpr (kOffset == 16) {
    first = 0;
    last = kN;
  }
  constexpr int kHalf = (kN + 1) / 2;
  const bool upper = lane & kOffset;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const double low = v[i], high = i + kHalf < kN ? v[i + kHalf] : 0.0;
    v[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kOffset);
  }
  const int middle = first + kHalf;
  if (upper) {
    first = middle < last ? middle : last;
  } else {
    last = middle < last ? middle : last;
  }
  if constexpr (kOffset > 1) {
    warp_sums<kHalf, kOffset / 2>(v, lane, first, last);
  }
}

// The largest |x| over a block of kThreads, NaN left out; every thread gets it. `scratch` [kThreads / 32] shared.
template <int kThreads>
__device__ double block_max(double x, double* scratch) {
  static_assert(kThreads % 32 == 0);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmax(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = x;
  }
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < kThreads / 32; ++w) {
    x = fmax(x, scratch[w]);
  }
  return x;
}

} // namespace fastmtl::cuda
