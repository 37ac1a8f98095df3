// What float32 sums cost a Gram matrix, measured on the very gradients (as csrc/cpu/probe.h does): y = G (Gᵀ z) for
// kProbes vectors z, random numbers over the row norms, to be compared with M z.
//
// Sums are pairs of float32 (TwoSum, and products split by FMA), which hold 48 bits on cards that are slow in float64.
// A thread has a column of a tile for u = Gᵀ z; then a warp has a row of it for y += G u, which reads the tile again
// from the cache. Reads G once from memory: T P sizeof(scalar) bytes; 40 operations an entry and probe, which hide
// behind that.
#pragma once

#include "../math/probe.h"
#include "platform.h"
#include "source.cuh"
#include "vector.cuh"

namespace fastmtl::cuda {

constexpr int kProbes = 4, kProbeThreads = 256;
constexpr size_t kProbeShared = size_t(kProbes) * 2 * kProbeThreads * sizeof(float);

// hi + lo += x, exactly but for the rounding of lo.
__device__ inline void add_exactly(float& hi, float& lo, float x) {
  const float sum = hi + x, other = sum - hi;
  lo += (hi - (sum - other)) + (x - other);
  hi = sum;
}

// hi + lo += x y, with the rounding of the product.
__device__ inline void add_product(float& hi, float& lo, float x, float y) {
  const float product = x * y;
  add_exactly(hi, lo, product);
  lo += fmaf(x, y, -product);
}

// The power of two next to the inverse of a norm: what z is multiplied with, without rounding.
__device__ inline float probe_scale(double square) {
  return square > 0.0 && square * 0.0 == 0.0 ? float(ldexp(1.0, -ilogb(square) / 2)) : 0.0f;
}

// Block c of a matrix leaves y of its run of tiles.
template <class scalar>
__global__ __launch_bounds__(kProbeThreads) void gram_probe(
    const __grid_constant__ Source source,
    int64_t blocks,
    int64_t next_partial, // doubles from one matrix to the next
    const float* z,       // [B, T, kProbes]
    double* partial) {    // [B, >= blocks, T, kProbes]
  FASTMTL_DYNAMIC_SHARED(shared);
  float* u = reinterpret_cast<float*>(shared); // [kProbes, 2, kProbeThreads]
  const int64_t T = source.tasks, b = blockIdx.x / blocks, c = blockIdx.x % blocks;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  z += b * T * kProbes;
  partial += b * next_partial + c * T * kProbes;
  for (int64_t k = threadIdx.x; k < T * kProbes; k += kProbeThreads) {
    partial[k] = 0.0;
  }
  const Run run(source.tiles, c, blocks);
  Pieces pieces(source, run.first, run.last);
  Piece piece;
  while (pieces.next(piece)) {
    for (int64_t at = piece.begin; at < piece.end; at += kProbeThreads) {
      const int64_t column = at + threadIdx.x;
      float high[kProbes] = {}, low[kProbes] = {};
      if (column < piece.end) {
        for (int64_t t = 0; t < T; ++t) {
          const scalar* row = row_of<scalar>(source, b, piece.segment, t);
          const float g = row ? widen<float>(row[column]) : 0.0f;
#pragma unroll
          for (int p = 0; p < kProbes; ++p) {
            add_product(high[p], low[p], g, z[t * kProbes + p]);
          }
        }
      }
      __syncthreads(); // the tile before has been read
#pragma unroll
      for (int p = 0; p < kProbes; ++p) {
        u[2 * p * kProbeThreads + threadIdx.x] = high[p];
        u[(2 * p + 1) * kProbeThreads + threadIdx.x] = low[p];
      }
      __syncthreads();
      for (int64_t t = warp; t < T; t += kProbeThreads / 32) {
        const scalar* row = row_of<scalar>(source, b, piece.segment, t);
        if (!row) {
          continue;
        }
        float sum[kProbes] = {}, rest[kProbes] = {};
        for (int k = lane; k < kProbeThreads && at + k < piece.end; k += 32) {
          const float g = widen<float>(row[at + k]);
#pragma unroll
          for (int p = 0; p < kProbes; ++p) {
            add_product(sum[p], rest[p], g, u[2 * p * kProbeThreads + k]);
            rest[p] += g * u[(2 * p + 1) * kProbeThreads + k];
          }
        }
#pragma unroll
        for (int p = 0; p < kProbes; ++p) {
          double total = double(sum[p]) + double(rest[p]);
          for (int offset = 16; offset > 0; offset /= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, offset);
          }
          if (lane == 0) {
            partial[t * kProbes + p] += total;
          }
        }
      }
    }
  }
}

} // namespace fastmtl::cuda
