// GradDrop (Chen et al., NeurIPS 2020, Algorithm 1): in every column only the entries of one sign are summed, the
// others at most in part.
//
//     p = Σ_t max(g_t, 0)        q = Σ_t min(g_t, 0)        u: 32 random bits, the column's own
//     positive where u (-q) < (2^32 - u) p, that is with probability p / (p - q)
//     out = p + Σ_t leak_t min(g_t, 0)    or    q + Σ_t leak_t max(g_t, 0)
//
// Column n draws word n % 4 of Philox4x32-10 with the seed as key and n / 4 as counter: see csrc/cpu/sign_drop.h, whose
// choices are the same.
//
// One pass: reads T P sizeof(scalar) bytes, writes P sizeof(scalar). In float64 an entry takes a conversion, a
// comparison and two additions, twice as much as in `combine`: about the time of the reads at a 64th of the float32
// rate. The ten rounds of Philox are 20 integer multiplications for four columns.
#pragma once

#include "../math/philox.h"
#include "platform.h"
#include "source.cuh"
#include "vector.cuh"

namespace fastmtl::cuda {

constexpr int kSignDropThreads = 256;

// Random numbers n, n + 1, ... n + kN - 1.
template <int kN>
__device__ void random_words(uint64_t seed, uint64_t n, uint32_t (&word)[kN]) {
  constexpr int kBlocks = (kN + 6) / 4; // of four words, wherever n is in the first one
  const int skipped = int(n % 4);
  uint32_t all[4 * kBlocks];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if (4 * block < skipped + kN) {
      const uint64_t counter = n / 4 + uint64_t(block);
      const Random4 four = philox(seed, uint32_t(counter), uint32_t(counter >> 32), 0, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        all[4 * block + i] = four.words[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) { // constant places, so that all stay in registers
    word[i] = skipped == 0 ? all[i] : skipped == 1 ? all[i + 1] : skipped == 2 ? all[i + 2] : all[i + 3];
  }
}

// What a thread knows of kN columns.
template <class scalar, int kN, bool kLeak>
struct SignSums {
  double positive[kN] = {}, negative[kN] = {};
  double leaked_positive[kLeak ? kN : 1] = {}, leaked_negative[kLeak ? kN : 1] = {}; // entries times their leak

  __device__ void add(int i, scalar x, double leak) {
    const double g = widen<double>(x);
    const double above = g > 0.0 ? g : 0.0, below = g > 0.0 ? 0.0 : g; // NaN is below
    positive[i] += above;
    negative[i] += below;
    if constexpr (kLeak) {
      leaked_positive[i] = fma(leak, above, leaked_positive[i]);
      leaked_negative[i] = fma(leak, below, leaked_negative[i]);
    }
  }

  // What is not finite stays so, whichever sign is drawn.
  __device__ scalar chosen(int i, uint32_t word) const {
    const double u = double(word), p = positive[i], q = negative[i];
    const bool up = u * -q < (0x1p32 - u) * p;
    double result = up ? p + 0.0 * q : q + 0.0 * p;
    if constexpr (kLeak) {
      result += up ? leaked_negative[i] : leaked_positive[i];
    }
    return narrow<scalar>(result);
  }
};

template <class scalar, bool kLeak>
__device__ void sign_drop_run(const Source& source, int64_t b, Run run, uint64_t seed, const double* leak) { // leak [T]
  constexpr int kV = kVec<scalar>, kDepth = 4, kThreads = kSignDropThreads; // rows in flight
  const int64_t T = source.tasks;
  Pieces pieces(source, run.first, run.last);
  Piece piece;
  while (pieces.next(piece)) {
    const Whole<scalar> whole(piece);
    scalar* out = whole.row(out_of<scalar>(source, b, piece.segment));
    const uint64_t first = uint64_t(first_column(source, b, piece.segment) + whole.from);
    const auto add_rows = [&]<int kColumns>(SignSums<scalar, kColumns, kLeak>& sums, auto&& load) {
      for (int64_t t = 0; t < T; t += kDepth) {
        Vector<scalar> v[kDepth];
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          v[d] = load(row_of<scalar>(source, b, piece.segment, t + d));
        }
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const double part = kLeak && t + d < T ? leak[t + d] : 0.0;
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            sums.add(i, v[d][i], part);
          }
        }
      }
    };
    for (int at = int(threadIdx.x) * kV; at < whole.to; at += kThreads * kV) {
      SignSums<scalar, kV, kLeak> sums;
      add_rows(sums, [&](const scalar* row) {
        return row ? Vector<scalar>{__ldcs(reinterpret_cast<const uint4*>(row + (whole.from + at)))} : zeros<scalar>();
      });
      uint32_t word[kV];
      random_words(seed, first + uint64_t(at), word);
      Vector<scalar> result;
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        result.set(i, sums.chosen(i, word[i]));
      }
      __stcs(reinterpret_cast<uint4*>(out + at), result.bits);
    }
    // What is before them and behind.
    int at = whole.begin + int(threadIdx.x), end = 0;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      for (; at < end; at += kThreads) {
        SignSums<scalar, 1, kLeak> sums;
        add_rows(sums, [&](const scalar* row) { return read<kThreads, 1>(whole.row(row), at, end); });
        uint32_t word[1];
        random_words(seed, first + uint64_t(at), word);
        out[at] = sums.chosen(0, word[0]);
      }
      at = whole.to + int(threadIdx.x);
      end = whole.end;
    }
  }
}

template <class scalar, bool kLeak>
__global__ __launch_bounds__(kSignDropThreads) void sign_drop(
    const __grid_constant__ Source source,
    int64_t blocks,
    const int64_t* seed,  // [1]
    const double* leak) { // [T], or null unless kLeak
  const int64_t b = blockIdx.x / blocks;
  sign_drop_run<scalar, kLeak>(source, b, Run(source.tiles, blockIdx.x % blocks, blocks), uint64_t(*seed), leak);
}

} // namespace fastmtl::cuda
