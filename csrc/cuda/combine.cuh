// Recombination αᵀ G, accumulated in float64 and rounded once, into the caller's buffers. One pass: reads T P
// sizeof(scalar) bytes, writes P sizeof(scalar); T P float64 FMA, which hide behind the reads even at a 64th of the
// float32 rate. Blocks walk backwards: what the Gram pass read last is still in the second-level cache.
#pragma once

#include "platform.h"
#include "source.cuh"
#include "vector.cuh"

namespace fastmtl::cuda {

constexpr int kCombineThreads = 256;
constexpr int kCombineResident = 3; // blocks of a multiprocessor; more would not be worth spills

template <class scalar, int kThreads>
__device__ void combine_run(const Source& source, int64_t b, Run run, const double* alpha) { // alpha [T]
  constexpr int kV = kVec<scalar>, kDepth = 4;                                               // rows in flight
  const int64_t T = source.tasks;
  Pieces pieces(source, run.first, run.last);
  Piece piece;
  while (pieces.next(piece)) {
    const Whole<scalar> whole(piece);
    scalar* out = whole.row(out_of<scalar>(source, b, piece.segment));
    const auto add_rows = [&]<int kColumns>(double (&sum)[kColumns], auto&& load) {
      for (int64_t t = 0; t < T; t += kDepth) {
        Vector<scalar> v[kDepth];
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          v[d] = load(row_of<scalar>(source, b, piece.segment, t + d));
        }
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const double weight = t + d < T ? alpha[t + d] : 0.0;
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            sum[i] = fma(weight, widen<double>(v[d][i]), sum[i]);
          }
        }
      }
    };
    for (int at = int(threadIdx.x) * kV; at < whole.to; at += kThreads * kV) {
      double sum[kV] = {};
      add_rows(sum, [&](const scalar* row) {
        return row ? Vector<scalar>{__ldcs(reinterpret_cast<const uint4*>(row + (whole.from + at)))} : zeros<scalar>();
      });
      Vector<scalar> result;
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        result.set(i, narrow<scalar>(sum[i]));
      }
      __stcs(reinterpret_cast<uint4*>(out + at), result.bits);
    }
    // What is before them and behind.
    int at = whole.begin + int(threadIdx.x), end = 0;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      for (; at < end; at += kThreads * kFew<scalar>) {
        double sum[kFew<scalar>] = {};
        add_rows(sum, [&](const scalar* row) { return read<kThreads, kFew<scalar>>(whole.row(row), at, end); });
#pragma unroll
        for (int i = 0; i < kFew<scalar>; ++i) {
          if (at + i * kThreads < end) {
            out[at + i * kThreads] = narrow<scalar>(sum[i]);
          }
        }
      }
      at = whole.to + int(threadIdx.x);
      end = whole.end;
    }
  }
}

template <class scalar>
__global__ __launch_bounds__(kCombineThreads, kCombineResident) void combine(
    const __grid_constant__ Source source,
    int64_t blocks,
    const double* alpha) { // [B, T]
  const int64_t block = int64_t(gridDim.x) - 1 - blockIdx.x, b = block / blocks;
  combine_run<scalar, kCombineThreads>(source, b, Run(source.tiles, block % blocks, blocks), alpha + b * source.tasks);
}

} // namespace fastmtl::cuda
