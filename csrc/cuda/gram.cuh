// Gram matrices M = G Gᵀ in two stages: every block sums the products of a run of columns into a partial of its own,
// then `gram_reduce` (gram_reduce.cu) adds the partials in order. No atomics: the bits do not change from run to
// run.
//
// gram_stream, T <= 8: a thread reads 16 bytes of each row and keeps all T (T + 1) / 2 sums in registers, in float64.
//   Reads T P sizeof(scalar) bytes once, writes blocks (T (T + 1) / 2 + 1) 8 bytes; T (T + 1) / 2 P float64 FMA.
//
// gram_groups, T <= 64 and the 64 x 64 blocks on the diagonal of more, in float64 through the tensor cores (mma.cuh):
//   what a lane has read is its part of the factors as it is, so nothing goes through shared memory but the sums of the
//   warps at the end. Reads G once; 256, 512, 768, 1152, 1536 or 2560 P multiply-adds for 16, 24, 32, 40, 48 or 64
//   rows, zeros where T is less.
//
// gram_tiles, in float32 for any T, and in float64 the blocks off the diagonal: columns are staged in shared memory as
//   `accumulator`, the next ones being fetched into registers meanwhile; a thread owns a 4 x 4 tile of M. With float32
//   the sums of 64 columns (128 of a pair of 64 rows) go to a pair of float32 (TwoSum), which holds 48 bits without
//   float64 arithmetic. What that costs is measured: probe.cuh.
//   Reads G once for T <= 64, beyond that once for every 64 other rows; (T + 3)² / 2 P FMA.
#pragma once

#include "mma.cuh"
#include "platform.h"
#include "probe.cuh"
#include "reduce.cuh"
#include "source.cuh"
#include "vector.cuh"

namespace fastmtl::cuda {

// What the first look at M decided for the second pass over G, on the device.
struct Verdict {
  double again;      // 1 where there is to be a second pass, else 0: three numbers, as the op `second_pass` makes them
  double half, rest; // its G is scaled by half * rest, a power of two that alone might not be representable
};

// A pass over G: the first one always takes place, the second one where the verdict says so.
struct Pass {
  const Verdict* verdict; // [B], or null in the first pass
  __device__ bool skip(int64_t b) const {
    return verdict && !verdict[b].again;
  }
  __device__ bool rescales(int64_t b) const {
    return verdict && verdict[b].half != 1.0;
  }
};

// --- T <= 8

template <int kRows>
constexpr int kStreamValues = kRows * (kRows + 1) / 2;

template <class scalar>
__device__ double scaled(scalar x, double half, double rest) {
  if constexpr (sizeof(scalar) == 8) {
    return x * half * rest;
  }
  // Beside float64 entries that need a scale nothing of another type counts, unless it is not finite.
  return half == 1.0 ? widen<double>(x) : widen<double>(x) * 0.0;
}

// The sums of all threads, in a fixed order; `shared` [kThreads / 32, kValues].
template <int kValues, int kThreads>
__device__ __forceinline__ void add_threads(double (&sum)[kValues], double* shared, double* values) {
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  int low, high;
  warp_sums<kValues>(sum, lane, low, high);
#pragma unroll
  for (int i = 0; i < (kValues + 31) / 32; ++i) {
    if (low + i < high) {
      shared[warp * kValues + low + i] = sum[i];
    }
  }
  __syncthreads();
  for (int k = int(threadIdx.x); k < kValues; k += kThreads) {
    double total = shared[k];
    for (int w = 1; w < kThreads / 32; ++w) {
      total += shared[w * kValues + k];
    }
    values[k] = total;
  }
}

// The sums of pieces [first, last) into values[0 .. kStreamValues), row-major upper triangle, and the largest float64
// entry into the one behind. `shared` holds kThreads / 32 * (kStreamValues + 1) doubles.
template <class scalar, int kRows, int kThreads>
__device__ void
stream_block(const Source& source, int64_t b, Run run, double half, double rest, double* shared, double* values) {
  constexpr int kValues = kStreamValues<kRows>, kV = kVec<scalar>;
  constexpr int kDepth = kRows >= 8 ? 1 : 8 / kRows; // vectors of a row in flight
  double sum[kValues] = {};
  double largest = 0.0;
  Pieces pieces(source, run.first, run.last);
  Piece piece;
  while (pieces.next(piece)) {
    const Whole<scalar> whole(piece);
    const scalar* rows[kRows];
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      rows[t] = whole.row(row_of<scalar>(source, b, piece.segment, t));
    }
    const auto accumulate = [&]<int kCount>(const Vector<scalar>* v) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        double x[kRows];
#pragma unroll
        for (int t = 0; t < kRows; ++t) {
          x[t] = scaled(v[t][i], half, rest);
          if constexpr (sizeof(scalar) == 8) {
            largest = fmax(largest, fabs(x[t]));
          }
        }
        int k = 0;
#pragma unroll
        for (int t = 0; t < kRows; ++t) {
#pragma unroll
          for (int u = t; u < kRows; ++u) {
            sum[k] = fma(x[t], x[u], sum[k]);
            ++k;
          }
        }
      }
    };
    constexpr int kStep = kThreads * kV;
    for (int at = int(threadIdx.x) * kV; at < whole.to; at += kDepth * kStep) {
      Vector<scalar> v[kDepth][kRows];
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
#pragma unroll
        for (int t = 0; t < kRows; ++t) {
          const int c = at + d * kStep;
          v[d][t] = vector_at(c < whole.to ? rows[t] : nullptr, c);
        }
      }
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        accumulate.template operator()<kV>(v[d]);
      }
    }
    // What is before them and behind.
    int at = whole.begin + int(threadIdx.x), end = 0;
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      for (; at < end; at += kThreads * kFew<scalar>) {
        Vector<scalar> v[kRows];
#pragma unroll
        for (int t = 0; t < kRows; ++t) {
          v[t] = read<kThreads, kFew<scalar>>(rows[t], at, end);
        }
        accumulate.template operator()<kFew<scalar>>(v);
      }
      at = whole.to + int(threadIdx.x);
      end = whole.end;
    }
  }
  largest = block_max<kThreads>(largest, shared);
  __syncthreads();
  add_threads<kValues, kThreads>(sum, shared, values);
  if (threadIdx.x == 0) {
    values[kValues] = largest;
  }
  __syncthreads();
}

constexpr int kStreamThreads = 128;

// Blocks of a multiprocessor; more would not be worth spills, which eight rows have with any such number.
template <int kRows>
constexpr int kStreamResident = kRows == 8   ? 1
                                : kRows == 4 ? 5
                                             : 6;

template <int kRows>
constexpr size_t kStreamShared = kStreamThreads / 32 * (kStreamValues<kRows> + 1) * sizeof(double);

template <class scalar, int kRows>
__global__ __launch_bounds__(kStreamThreads, kStreamResident<kRows>) void gram_stream(
    const __grid_constant__ Source source,
    Pass pass,
    int64_t blocks,
    int64_t next_partial, // doubles from one matrix to the next
    double* partial) {    // [B, >= blocks, kStreamValues + 1]
  const int64_t b = blockIdx.x / blocks, c = blockIdx.x % blocks;
  if (pass.skip(b)) {
    return;
  }
  FASTMTL_DYNAMIC_SHARED(shared);
  const bool rescales = pass.rescales(b);
  stream_block<scalar, kRows, kStreamThreads>(
      source,
      b,
      Run(source.tiles, c, blocks),
      rescales ? pass.verdict[b].half : 1.0,
      rescales ? pass.verdict[b].rest : 1.0,
      reinterpret_cast<double*>(shared),
      partial + b * next_partial + c * (kStreamValues<kRows> + 1));
}

constexpr int kGroupRows = 64; // beyond, M is made of blocks of 64 x 64

// --- T > 8, in float64

// Rows are taken eight at a time: a lane holds 16 bytes of row lane / 4 of each group, as it has read them. Tiles of
// 16 x 8 entries of M: two groups with each group that does not come before them. 64 rows have too many tiles for the
// registers of one warp: two share them, and read the same columns. Of an odd number of groups the last has its tile
// with zeros.
template <int kRows, int kBlock = 128>
struct Groups {
  static constexpr int kGroups = kRows / 8;
  static constexpr int kShare = kRows == 64 ? 2 : 1;                            // warps to a strip of columns
  static constexpr int kTiles = (kGroups + 1) / 2 * (kGroups / 2 + 1) / kShare; // of a warp
  static constexpr int kThreads = kBlock, kWarps = kThreads / 32;
  static constexpr int kResident = kRows <= 24 ? 4 : kRows <= 32 ? 3 : 2; // blocks of a multiprocessor
  static constexpr int kDepth = 1024 / kThreads / kGroups;                // vectors of a row in flight
  static constexpr int kValues = kRows * (kRows + 1) / 2;
  static constexpr size_t kShared = size_t(kWarps) / 2 * kTiles * 4 * 32 * sizeof(double);
  static_assert(kShared <= 49152);

  // Whether the tiles of groups r and r + 1 are those of warp `part` of kShare: as many for each.
  __host__ __device__ static constexpr bool owns(int part, int r) {
    return kShare == 1 || ((r / 2 ^ r / 4) & 1) == part;
  }
};

// The sums of a warp over the pieces of a run: its tiles in turn. The largest float64 entry goes to `largest`.
template <class scalar, int kRows, int kThreads, int kPart>
__device__ void groups_warp(
    const Source& source,
    int64_t b,
    Run run,
    int64_t first_row,
    double half,
    double rest,
    double (&sum)[Groups<kRows>::kTiles][4],
    double& largest) {
  using Shape = Groups<kRows, kThreads>;
  constexpr int kV = kVec<scalar>, kGroups = Shape::kGroups, kDepth = Shape::kDepth, kFirst = kPart * 2;
  const int lane = int(threadIdx.x % 32), g = lane / 4, q = lane % 4;
  Pieces pieces(source, run.first, run.last);
  Piece piece;
  while (pieces.next(piece)) {
    const Whole<scalar> whole(piece);
    const scalar* rows[kGroups];
#pragma unroll
    for (int r = kFirst; r < kGroups; ++r) {
      rows[r] = whole.row(row_of<scalar>(source, b, piece.segment, first_row + r * 8 + g));
    }
    const auto accumulate = [&]<int kCount>(const Vector<scalar>* v) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) { // whichever eight columns: all rows have the same
        double x[kGroups + kGroups % 2][2] = {};
#pragma unroll
        for (int r = kFirst; r < kGroups; ++r) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            x[r][e] = scaled(v[r][i + e], half, rest);
            if constexpr (sizeof(scalar) == 8) {
              largest = fmax(largest, fabs(x[r][e]));
            }
          }
        }
        int k = 0;
#pragma unroll
        for (int r = kFirst; r < kGroups; r += 2) {
#pragma unroll
          for (int u = r; u < kGroups && Shape::owns(kPart, r); ++u) {
            mma(sum[k], x[r], x[r + 1], x[u]);
            ++k;
          }
        }
      }
    };
    constexpr int kStrip = 4 * kV, kStep = kDepth * kStrip; // columns of a warp's vectors
    constexpr int kStride = Shape::kWarps / Shape::kShare * kStep;
    const int strip = int(threadIdx.x / 32) / Shape::kShare;
    // The first warps begin with what is before the vectors.
    for (int at = strip == 0 && whole.begin < 0 ? -kStride : strip * kStep; at < whole.end; at += kStride) {
      if (at >= 0 && at + kStep <= whole.to) {
        Vector<scalar> v[kDepth][kGroups];
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
#pragma unroll
          for (int r = kFirst; r < kGroups; ++r) {
            v[d][r] = vector_at(rows[r], at + d * kStrip + q * kV);
          }
        }
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          accumulate.template operator()<kV>(v[d]);
        }
        continue;
      }
      const int last = whole.stage_end(at, kStep);
#pragma unroll 1
      for (int c = at < 0 ? whole.begin : at; c < last; c += 4 * kFew<scalar>) {
        Vector<scalar> v[kGroups];
#pragma unroll
        for (int r = kFirst; r < kGroups; ++r) {
          v[r] = read<4, kFew<scalar>>(rows[r], c + q, last);
        }
        accumulate.template operator()<kFew<scalar>>(v);
      }
    }
  }
}

// Half of the warps hand their sums to the other half, until each part is with one.
template <class Shape>
__device__ __forceinline__ void add_warps(double (&sum)[Shape::kTiles][4], double* shared) {
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
#pragma unroll
  for (int n = Shape::kWarps / 2; n >= Shape::kShare; n /= 2) {
    double* of_warp = shared + (warp % n) * Shape::kTiles * 4 * 32 + lane;
    __syncthreads();
    if (warp >= n && warp < 2 * n) {
#pragma unroll
      for (int k = 0; k < Shape::kTiles * 4; ++k) {
        of_warp[k * 32] = sum[k / 4][k % 4];
      }
    }
    __syncthreads();
    if (warp < n) {
#pragma unroll
      for (int k = 0; k < Shape::kTiles * 4; ++k) {
        sum[k / 4][k % 4] += of_warp[k * 32];
      }
    }
  }
}

// The sums of the warp that has part kPart, into the upper triangle.
template <class Shape, int kRows, int kPart>
__device__ __forceinline__ void leave_groups(const double (&sum)[Shape::kTiles][4], double* values) {
  const int lane = int(threadIdx.x % 32);
  int k = 0;
#pragma unroll
  for (int r = 0; r < Shape::kGroups; r += 2) {
#pragma unroll
    for (int u = r; u < Shape::kGroups && Shape::owns(kPart, r); ++u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = r * 8 + lane / 4 + e / 2 * 8, j = u * 8 + 2 * (lane % 4) + e % 2;
        if (i <= j) {
          values[i * kRows - i * (i - 1) / 2 + j - i] = sum[k][e];
        }
      }
      ++k;
    }
  }
}

// The sums of pieces [first, last) into values[0 .. Groups::kValues), row-major upper triangle, and the largest float64
// entry into the one behind. Row r is row first_row + r of G.
template <class scalar, int kRows, int kThreads>
__device__ void groups_block(
    const Source& source,
    int64_t b,
    Run run,
    int64_t first_row,
    double half,
    double rest,
    double* shared,
    double* values) {
  using Shape = Groups<kRows, kThreads>;
  const int warp = int(threadIdx.x / 32), part = warp % Shape::kShare;
  double sum[Shape::kTiles][4] = {};
  double largest = 0.0;
  if (part == 0) {
    groups_warp<scalar, kRows, kThreads, 0>(source, b, run, first_row, half, rest, sum, largest);
  } else {
    groups_warp<scalar, kRows, kThreads, Shape::kShare - 1>(source, b, run, first_row, half, rest, sum, largest);
  }
  if constexpr (sizeof(scalar) == 8) {
    largest = block_max<Shape::kThreads>(largest, shared);
  }
  add_warps<Shape>(sum, shared);
  if (warp == 0) {
    leave_groups<Shape, kRows, 0>(sum, values);
  } else if (warp < Shape::kShare) {
    leave_groups<Shape, kRows, Shape::kShare - 1>(sum, values);
  }
  if (threadIdx.x == 0) {
    values[Shape::kValues] = largest;
  }
  __syncthreads();
}

template <class scalar, int kRows>
__global__ __launch_bounds__((Groups<kRows>::kThreads), (Groups<kRows>::kResident)) void gram_groups(
    const __grid_constant__ Source source,
    Pass pass,
    int64_t blocks,
    int64_t next_partial, // doubles from one matrix to the next
    int64_t next_group,   // and from one 64 x 64 block of M to the next
    double* partial) {    // [B, groups, >= blocks, Groups::kValues + 1]
  const int64_t b = blockIdx.x / blocks, c = blockIdx.x % blocks;
  if (pass.skip(b)) {
    return;
  }
  FASTMTL_DYNAMIC_SHARED(shared);
  const bool rescales = pass.rescales(b);
  groups_block<scalar, kRows, Groups<kRows>::kThreads>(
      source,
      b,
      Run(source.tiles, c, blocks),
      int64_t(blockIdx.y) * kGroupRows,
      rescales ? pass.verdict[b].half : 1.0,
      rescales ? pass.verdict[b].rest : 1.0,
      reinterpret_cast<double*>(shared),
      partial + b * next_partial + blockIdx.y * next_group + c * (Groups<kRows>::kValues + 1));
}

// --- any T, in float32, and 64 rows with 64 others

// kRows: 16, 32 or 64 rows with each other, or 128: the first 64 with the other 64.
template <class accumulator, int kTilingRows>
struct Tiling {
  static constexpr int kRows = kTilingRows;
  static constexpr bool kPair = kRows == 2 * kGroupRows;
  static constexpr int kSide = kPair ? kGroupRows / 4 : kRows / 4; // tiles on a side
  static constexpr int kTiles = kPair ? kSide * kSide : kSide * (kSide + 1) / 2;
  static constexpr int kThreads = kRows == 64 ? 288 : 256;
  static constexpr int kSlices = kThreads / kTiles; // threads that share a tile's columns: 25, 7, 2 or 1
  static constexpr int kColumns = kPair ? 32 : 16384 / kRows / int(sizeof(accumulator));
  static constexpr int kWidth = 16 / int(sizeof(accumulator)); // columns read from shared memory at once
  static constexpr int kStride = kColumns + kWidth; // odd in units of 16 bytes: neighbour rows in different banks
  static constexpr int kValues = kTiles * 16;
  static constexpr size_t kStage = size_t(kRows) * kStride * sizeof(accumulator);
  static constexpr size_t kSums = size_t(kThreads) * 4 * sizeof(double);
  static constexpr size_t kLong = sizeof(accumulator) == 4 ? size_t(kThreads) * 32 * sizeof(float) : 0;
  static constexpr size_t kShared = (kStage > kSums ? kStage : kSums) + kLong;
  static_assert(kShared <= 65536); // all that a block has on compute capability 7.5
};

// Tile k of the upper triangle (or of the square) of tiles.
template <int kSide, bool kPair>
__device__ void tile_place(int k, int& i, int& j) {
  if constexpr (kPair) {
    i = k / kSide;
    j = k % kSide;
  } else {
    i = 0;
    while (k >= kSide - i) {
      k -= kSide - i;
      ++i;
    }
    j = i + k;
  }
}

// The stage of a segment's columns that begins at `at`, as vectors of this thread.
template <class Shape, class scalar, int kLoads>
__device__ __forceinline__ void fetch_tiles(
    const Source& source,
    int64_t b,
    int64_t segment,
    const Whole<scalar>& whole,
    int at,
    int64_t first_row,
    int64_t second_row,
    Vector<scalar> (&next)[kLoads]) {
  constexpr int kRows = Shape::kRows, kV = kVec<scalar>, kRowVectors = Shape::kColumns / kV;
  if (at >= 0 && at + Shape::kColumns <= whole.to) {
    const int64_t column = whole.from + at;
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      const int k = int(threadIdx.x) + l * Shape::kThreads, r = k / kRowVectors;
      next[l] = zeros<scalar>();
      if (r < kRows) {
        const int64_t t = Shape::kPair && r >= kGroupRows ? second_row + r - kGroupRows : first_row + r;
        next[l] = vector_at(row_of<scalar>(source, b, segment, t), column + (k % kRowVectors) * kV);
      }
    }
    return;
  }
  const int end = whole.stage_end(at, Shape::kColumns);
#pragma unroll 1
  for (int l = 0; l < kLoads; ++l) {
    const int k = int(threadIdx.x) + l * Shape::kThreads, r = k / kRowVectors;
    Vector<scalar> v = zeros<scalar>();
    if (r < kRows) {
      const int64_t t = Shape::kPair && r >= kGroupRows ? second_row + r - kGroupRows : first_row + r;
      v = read<kRowVectors, kV>(whole.row(row_of<scalar>(source, b, segment, t)), at + k % kRowVectors, end);
    }
#pragma unroll
    for (int m = 0; m < kLoads; ++m) { // a register has no address
      if (m == l) {
        next[m] = v;
      }
    }
  }
}

// These vectors into shared memory, and the largest float64 entry.
template <class Shape, class scalar, class accumulator, int kLoads>
__device__ __forceinline__ void stage_tiles(
    const Vector<scalar> (&next)[kLoads],
    double half,
    double rest,
    accumulator* stage, // [kRows, kStride]
    double& largest) {
  constexpr int kRows = Shape::kRows, kV = kVec<scalar>, kRowVectors = Shape::kColumns / kV;
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const int k = int(threadIdx.x) + l * Shape::kThreads, r = k / kRowVectors;
    if (r < kRows) {
      accumulator* to = stage + r * Shape::kStride + (k % kRowVectors) * kV;
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        if constexpr (sizeof(accumulator) == 4) {
          to[i] = widen<float>(next[l][i]);
        } else {
          to[i] = scaled(next[l][i], half, rest);
          if constexpr (sizeof(scalar) == 8) {
            largest = fmax(largest, fabs(to[i]));
          }
        }
      }
    }
  }
}

// What the columns of a stage add to tile (ti, tj), as far as they are those of a slice.
template <class Shape, class accumulator>
__device__ __forceinline__ void multiply_tile(
    const accumulator* stage, // [kRows, kStride]
    int ti,
    int tj,
    int slice,
    accumulator (&sum)[4][4]) {
  struct alignas(16) Group {
    accumulator x[Shape::kWidth];
  };
  const accumulator* from_i = stage + ti * Shape::kStride;
  const accumulator* from_j = stage + ((Shape::kPair ? kGroupRows : 0) + tj) * Shape::kStride;
  for (int g = slice * Shape::kWidth; g < Shape::kColumns; g += Shape::kSlices * Shape::kWidth) {
    Group x[4], y[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) { // rows of a tile are kSide apart: those of neighbour threads are neighbours
      x[r] = *reinterpret_cast<const Group*>(from_i + r * Shape::kSide * Shape::kStride + g);
      y[r] = *reinterpret_cast<const Group*>(from_j + r * Shape::kSide * Shape::kStride + g);
    }
#pragma unroll
    for (int k = 0; k < Shape::kWidth; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sum[r][c] = fma(x[r].x[k], y[c].x[k], sum[r][c]);
        }
      }
    }
  }
}

// Short float32 sums into the pairs of longer ones.
template <class Shape, class accumulator>
__device__ __forceinline__ void flush_tile(accumulator (&sum)[4][4], float* longer) {
  if constexpr (sizeof(accumulator) == 4) {
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      add_exactly(longer[k * Shape::kThreads], longer[(16 + k) * Shape::kThreads], sum[k / 4][k % 4]);
      sum[k / 4][k % 4] = 0;
    }
  }
}

// The sums of all slices of each tile, row by row of the tiles.
template <class Shape, class accumulator>
__device__ __forceinline__ void add_slices(
    const accumulator (&sum)[4][4],
    const float* longer,
    double* sums, // [kThreads, 4]
    double* values) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if constexpr (sizeof(accumulator) == 4) {
        const float* pair = longer + (r * 4 + c) * Shape::kThreads;
        sums[threadIdx.x * 4 + c] = double(pair[0]) + double(pair[16 * Shape::kThreads]);
      } else {
        sums[threadIdx.x * 4 + c] = sum[r][c];
      }
    }
    __syncthreads();
    for (int k = int(threadIdx.x); k < Shape::kTiles * 4; k += Shape::kThreads) {
      double total = sums[k];
      for (int s = 1; s < Shape::kSlices; ++s) {
        total += sums[s * Shape::kTiles * 4 + k];
      }
      values[k / 4 * 16 + r * 4 + k % 4] = total;
    }
  }
}

// The sums of pieces [first, last) into values[0 .. Tiling::kValues), tile by tile, and the largest float64 entry
// behind them. Row r of the tiling is row first_row + r of G; of a pair, row second_row + r - 64 from 64 on.
template <class scalar, class accumulator, int kRows>
__device__ void tiles_block(
    const Source& source,
    int64_t b,
    Run run,
    int64_t first_row,
    int64_t second_row,
    double half,
    double rest,
    unsigned char* shared,
    double* values) {
  using Shape = Tiling<accumulator, kRows>;
  constexpr int kV = kVec<scalar>, kRowVectors = Shape::kColumns / kV;
  constexpr int kLoads = (kRows * kRowVectors + Shape::kThreads - 1) / Shape::kThreads;
  // Where few tasks are promised more digits, reading G takes longer than adding up more often.
  constexpr int kColumnsUnflushed = Shape::kPair ? 128 : 64;
  constexpr bool kBlocks = sizeof(accumulator) == 4;
  accumulator* stage = reinterpret_cast<accumulator*>(shared); // [kRows, kStride]
  const int tile = int(threadIdx.x) % Shape::kTiles, slice = int(threadIdx.x) / Shape::kTiles;
  int ti, tj;
  tile_place<Shape::kSide, Shape::kPair>(tile, ti, tj);
  accumulator sum[4][4] = {};
  // [2, 16, Shape::kThreads]: the pairs that short sums are added to, in shared memory, for registers are scarce.
  float* longer = reinterpret_cast<float*>(shared + Shape::kShared - Shape::kLong) + threadIdx.x;
  double largest = 0.0;
  int unflushed = 0;

  if constexpr (kBlocks) {
    for (int k = 0; k < 32; ++k) {
      longer[k * Shape::kThreads] = 0.0f;
    }
  }
  const auto flush = [&] { flush_tile<Shape>(sum, longer); };

  Pieces pieces(source, run.first, run.last);
  Piece piece{};
  bool more = pieces.next(piece);
  Whole<scalar> whole(piece);
  int at = whole.begin;
  Vector<scalar> next[kLoads];
  const auto fetch = [&] { fetch_tiles<Shape>(source, b, piece.segment, whole, at, first_row, second_row, next); };

  if (more) {
    fetch();
  }
  while (more) {
    __syncthreads(); // the stage has been read
    stage_tiles<Shape>(next, half, rest, stage, largest);
    at = whole.stage_end(at, Shape::kColumns);
    if (at >= whole.end) {
      more = pieces.next(piece);
      whole = Whole<scalar>(piece);
      at = whole.begin;
    }
    if (more) {
      fetch(); // on its way while this stage is worked on
    }
    __syncthreads();
    if (slice < Shape::kSlices) {
      multiply_tile<Shape>(stage, ti, tj, slice, sum);
    }
    unflushed += (Shape::kColumns + Shape::kSlices - 1) / Shape::kSlices;
    if (unflushed >= kColumnsUnflushed) {
      flush();
      unflushed = 0;
    }
  }
  flush();
  if constexpr (sizeof(scalar) == 8) {
    largest = block_max<Shape::kThreads>(largest, reinterpret_cast<double*>(shared));
  }
  add_slices<Shape>(sum, longer, reinterpret_cast<double*>(shared), values);
  if (threadIdx.x == 0) {
    values[Shape::kValues] = largest;
  }
  __syncthreads();
}

// Blocks of a multiprocessor that are worth fewer registers; float64 sums of many rows would spill.
template <class scalar, class accumulator, int kRows>
constexpr int kTilesResident = sizeof(accumulator) == 8 ? 1 : 2;

template <class scalar, class accumulator, int kRows>
__global__
    __launch_bounds__((Tiling<accumulator, kRows>::kThreads), (kTilesResident<scalar, accumulator, kRows>)) void gram_tiles(
        const __grid_constant__ Source source,
        Pass pass,
        int64_t blocks,
        int64_t next_partial, // doubles from one matrix to the next
        int64_t next_group,   // and from one 64 x 64 block of M to the next
        double* partial) {    // [B, groups, >= blocks, Tiling::kValues + 1]
  using Shape = Tiling<accumulator, kRows>;
  const int64_t b = blockIdx.x / blocks, c = blockIdx.x % blocks;
  if (pass.skip(b)) {
    return;
  }
  FASTMTL_DYNAMIC_SHARED(shared);
  const bool rescales = pass.rescales(b);
  // Block (i, j), i < j, of M, or the diagonal one (i, i).
  int64_t i = blockIdx.y, j = blockIdx.y;
  if (Shape::kPair) {
    for (j = 1; i >= j; ++j) {
      i -= j;
    }
  }
  tiles_block<scalar, accumulator, kRows>(
      source,
      b,
      Run(source.tiles, c, blocks),
      i * kGroupRows,
      j * kGroupRows,
      rescales ? pass.verdict[b].half : 1.0,
      rescales ? pass.verdict[b].rest : 1.0,
      shared,
      partial + b * next_partial + blockIdx.y * next_group + c * (Shape::kValues + 1));
}

// --- second stage

// Where the entries of M lie in a partial.
struct Layout {
  int side; // tiles on a side, or 0: row-major upper triangle of `rows`
  int rows;
  bool pair;

  __host__ __device__ constexpr int values() const {
    return side == 0 ? rows * (rows + 1) / 2 : pair ? side * side * 16 : side * (side + 1) / 2 * 16;
  }

  // Tiles on the diagonal hold their entries twice: one of them is read.
  __device__ bool owns(int i, int j) const {
    return pair || side == 0 || i % side != j % side || i <= j;
  }

  // The entry (i, j) that value k belongs to.
  __device__ void place(int k, int& i, int& j) const {
    if (side == 0) {
      i = 0;
      while (k >= rows - i) {
        k -= rows - i;
        ++i;
      }
      j = i + k;
      return;
    }
    const int r = k % 16 / 4, c = k % 4;
    int tile = k / 16;
    if (pair) {
      i = tile / side;
      j = tile % side;
    } else {
      for (i = 0; tile >= side - i; ++i) {
        tile -= side - i;
      }
      j = i + tile;
    }
    i += r * side;
    j += c * side;
  }
};

} // namespace fastmtl::cuda
