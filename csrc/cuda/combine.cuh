// Recombination αᵀ G, accumulated in float64 and rounded once, into the caller's buffers. One pass: reads T P
// sizeof(scalar) bytes, writes P sizeof(scalar); T P float64 FMA, which hide behind the reads even at a 64th of the
// float32 rate. Blocks walk backwards: what the Gram pass read last is still in the second-level cache.
#pragma once

#include "platform.h"
#include "source.cuh"
#include "vector.cuh"

namespace fastmtl::cuda {

constexpr int kCombineThreads = 256;

template <class scalar>
__device__ void combine_run(const Source& source, int64_t b, Run run, const double* alpha) { // alpha [T]
  constexpr int kV = kVec<scalar>, kDepth = 4;                                               // rows in flight
  const int64_t T = source.tasks;
  Pieces pieces(source, run.first, run.last);
  Piece piece;
  while (pieces.next(piece)) {
    scalar* out = out_of<scalar>(source, b, piece.segment);
    int64_t begin = piece.begin;
    if (piece.wide) {
      const int64_t whole = piece.end - (piece.end - piece.begin) % kV;
      for (int64_t at = begin + int64_t(threadIdx.x) * kV; at < whole; at += int64_t(blockDim.x) * kV) {
        double sum[kV] = {};
        for (int64_t t = 0; t < T; t += kDepth) {
          Vector<scalar> v[kDepth];
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            const scalar* row = row_of<scalar>(source, b, piece.segment, t + d);
            v[d] = zeros<scalar>();
            if (row) {
              v[d].bits = __ldcs(reinterpret_cast<const uint4*>(row + at));
            }
          }
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            const double weight = t + d < T ? alpha[t + d] : 0.0;
#pragma unroll
            for (int i = 0; i < kV; ++i) {
              sum[i] = fma(weight, widen<double>(v[d][i]), sum[i]);
            }
          }
        }
        Vector<scalar> result;
#pragma unroll
        for (int i = 0; i < kV; ++i) {
          result.set(i, narrow<scalar>(sum[i]));
        }
        __stcs(reinterpret_cast<uint4*>(out + at), result.bits);
      }
      begin = whole;
    }
    for (int64_t at = begin + threadIdx.x; at < piece.end; at += blockDim.x) {
      double sum = 0.0;
      for (int64_t t = 0; t < T; ++t) {
        const scalar* row = row_of<scalar>(source, b, piece.segment, t);
        sum = fma(alpha[t], row ? widen<double>(row[at]) : 0.0, sum);
      }
      out[at] = narrow<scalar>(sum);
    }
  }
}

template <class scalar>
__global__ __launch_bounds__(kCombineThreads) void combine(
    const __grid_constant__ Source source,
    int64_t blocks,
    const double* alpha) { // [B, T]
  const int64_t block = int64_t(gridDim.x) - 1 - blockIdx.x, b = block / blocks;
  combine_run<scalar>(source, b, Run(source.tiles, block % blocks, blocks), alpha + b * source.tasks);
}

} // namespace fastmtl::cuda
