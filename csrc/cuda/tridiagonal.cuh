// Eigenvalues of one symmetric matrix, T <= 128, and M^-1/2 w, by one block, without the eigenvectors: what Aligned-MTL
// needs of a matrix of full rank. csrc/cpu/tridiagonal.h does the same for many tasks.
//
// M = Q S Qᵀ with S tridiagonal and Q a product of reflections H = I - v vᵀ / h. Eigenvalues of S come by multisection:
// as many shifts at a time as there are threads, each counts the eigenvalues below its shift by a Sturm sequence.
// S^-1/2 is a sum of shifted inverses, kNodes at a time, a lane each.
//
// The time is that of the steps that follow each other. T - 2 of the reduction have two barriers, a division and two
// or three chains of shuffles each, some 600 cycles; a round of multisection T multiply-adds, 10 cycles each, and a
// barrier; the solves T divisions, 75 cycles each; the way back T - 2 chains of shuffles of 200 cycles. 8 lanes share
// a row: then a product takes three shuffles, and T = 64 has a row for each group of 512 threads.
#pragma once

#include <cstdint>

#include "../math/elliptic.h"
#include "../math/scaling.h"
#include "eigh.cuh"

namespace fastmtl::cuda {

constexpr int kNodes = 32;           // of S^-1/2 at a time, a lane each
constexpr double kNodesPerLog = 1.5; // of 16 λ_max / λ_min: an error below 1e-12
constexpr int kRowLanes = 8;         // that share a row
constexpr int kMaxEigenShifts = 256; // at a time: more warps would wait for each other's multiply-adds
constexpr unsigned kWholeWarp = 0xffffffffu;

// Of one matrix, in shared memory: S, and what Q has beside the rows of the reduced matrix.
struct Reduced {
  static constexpr int kArrays = 5;
  double* memory; // [kArrays, T]
  int T;

  __device__ double* diagonal() const {
    return memory;
  }
  __device__ double* off() const { // entry i lies between i and i + 1
    return memory + T;
  }
  __device__ double* square() const { // entry i is that of off()[i - 1], none of them zero
    return memory + 2 * T;
  }
  __device__ double* head() const { // what v has more than the row, at its first entry
    return memory + 3 * T;
  }
  __device__ double* inverse() const { // 1 / h, or zero where there is nothing to reflect
    return memory + 4 * T;
  }
};

// Shared memory in doubles: of two matrices, of w, and [2, T] and one for each warp, or [2, kMaxMeans], in passing.
__host__ __device__ constexpr int64_t reduction_doubles(int64_t T) {
  return (2 * Reduced::kArrays + 3) * T + 32;
}

__device__ inline double warp_sum(double x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, offset);
  }
  return x;
}

// f(i, lane, Σ g(i, c) over columns c of [first, last)) for rows i of [from, T), by kRowLanes lanes each.
template <class G, class F>
__device__ __forceinline__ void each_row(int from, int T, int first, int last, G g, F f) {
  const int thread = int(threadIdx.x), lane = thread % kRowLanes, rows = int(blockDim.x) / kRowLanes;
  for (int base = from + thread / 32 * (32 / kRowLanes); base < T; base += rows) {
    const int i = base + thread % 32 / kRowLanes;
    double sum = 0.0;
    for (int c = first + lane; c < last && i < T; c += kRowLanes) {
      sum += g(i, c);
    }
    sum = warp_sum(sum, kRowLanes);
    if (i < T) {
      f(i, lane, sum);
    }
  }
}

// A vector [T] in the registers of a warp, which reflects it.
struct Held {
  static constexpr int kParts = kMaxJacobiTasks / 32;
  double part[kParts];

  // f(p, i) for the entries i of this lane.
  template <class F>
  __device__ __forceinline__ static void each(int T, F f) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int i = 32 * p + int(threadIdx.x) % 32;
      if (i < T) {
        f(p, i);
      }
    }
  }
  __device__ Held(const double* x, int T) : part{} {
    each(T, [&](int p, int i) { part[p] = x[i]; });
  }
  __device__ void store(double* x, int T) const {
    each(T, [&](int p, int i) { x[i] = part[p]; });
  }
  // Reflection k, whose row of the reduced matrix this is.
  __device__ void reflect(const double* row, Reduced S, int k) {
    double v[kParts] = {}, along = 0.0;
    each(S.T, [&](int p, int i) {
      v[p] = i > k ? row[i] + (i == k + 1 ? S.head()[k] : 0.0) : 0.0;
      along += v[p] * part[p];
    });
    along = warp_sum(along, 32) * S.inverse()[k];
    each(S.T, [&](int p, int) { part[p] -= along * v[p]; });
  }
};

// By one warp: the reflection k that takes x [T] to its entry k + 1.
__device__ inline void find_reflection(const double* x, Reduced S, int k) {
  const int lane = int(threadIdx.x) % 32;
  double squares = 0.0;
  for (int c = k + 1 + lane; c < S.T; c += 32) {
    squares += x[c] * x[c];
  }
  squares = warp_sum(squares, 32);
  if (lane == 0) {
    const double norm = squares * rsqrt(squares), x0 = x[k + 1];
    const bool any = squares > kLeastReflected;
    S.head()[k] = any ? (x0 < 0.0 ? -norm : norm) : 0.0;
    S.inverse()[k] = any ? 1.0 / (squares + fabs(x0) * norm) : 0.0;
  }
}

// Of A [T, ld] that has been reduced.
__device__ inline void take_diagonals(const double* A, int ld, Reduced S) {
  const int T = S.T;
  for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
    const double off = i < T - 2 ? -S.head()[i] : i == T - 2 ? A[i * ld + i + 1] : 0.0;
    S.diagonal()[i] = A[i * ld + i];
    S.off()[i] = off;
    // Relative to what it couples, for small entries count as well.
    const double least =
        i < T - 1 ? kLeastCoupling * fmax(A[i * ld + i] * A[(i + 1) * ld + i + 1], kLeastCoupling) : 0.0;
    S.square()[i < T - 1 ? i + 1 : 0] = fmax(i < T - 1 ? off * off : 0.0, least);
  }
}

// A [T, ld], in full and its largest entry near one, becomes S, and its rows right of the diagonal Q. T > 2. w [T]
// becomes Qᵀ w, or is null. Begins after a barrier, and ends with one.
__device__ inline FASTMTL_ONE_COPY void
reduce(double* A, int ld, Reduced S, double* scratch, double* w) { // scratch [2 T + 32]
  const int T = S.T, thread = int(threadIdx.x), threads = int(blockDim.x), warp = thread / 32;
  const int last = threads / 32 - 1; // the warp that has the fewest rows
  double *product = scratch, *row = product + T, *of_warps = row + T;
  Held held(w, w && warp == last ? T : 0);
  for (int k = 0; k < T - 2; ++k) {
    const double* x = A + k * ld; // v = x + head e_first, so that A v = A x + head A e_first
    const int first = k + 1;
    double along = 0.0;
    const auto times_x = [&](int i, int c) { return A[i * ld + c] * x[c]; };
    each_row(first, T, first, T, times_x, [&](int i, int lane, double sum) {
      if (lane == 0) {
        product[i] = sum;
        along += sum * x[i];
      }
    });
    along = warp_sum(along, 32);
    if (thread % 32 == 0) {
      of_warps[warp] = along;
    }
    for (int c = first + thread; c < T; c += threads) {
      row[c] = A[first * ld + c];
    }
    if (warp == last) {
      find_reflection(x, S, k);
    }
    __syncthreads();
    const double head = S.head()[k], inverse = S.inverse()[k];
    double form = head * (2.0 * product[first] + head * row[first]); // vᵀ A v
    for (int j = 0; j <= last; ++j) {
      form += of_warps[j];
    }
    const double half = 0.5 * form * inverse * inverse;
    const auto v = [&](int i) { return i == first ? x[i] + head : x[i]; };
    const auto u = [&](int i, double own) { return (product[i] + head * row[i]) * inverse - half * own; };
    for (int i = first + thread / kRowLanes; i < T; i += threads / kRowLanes) {
      const double vi = v(i), ui = u(i, vi);
      for (int c = first + thread % kRowLanes; c < T; c += kRowLanes) {
        const double vc = v(c);
        A[i * ld + c] -= vi * u(c, vc) + ui * vc;
      }
    }
    if (w && warp == last) {
      held.reflect(x, S, k);
    }
    __syncthreads();
  }
  take_diagonals(A, ld, S);
  held.store(w, w && warp == last ? T : 0);
  __syncthreads();
}

// A number that no eigenvalue exceeds: Gershgorin's. Every thread gets it.
__device__ inline double above_all(Reduced S) {
  const int T = S.T;
  double most = 0.0;
  for (int i = int(threadIdx.x) % 32; i < T; i += 32) {
    most = fmax(most, S.diagonal()[i] + fabs(S.off()[i]) + (i > 0 ? fabs(S.off()[i - 1]) : 0.0));
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    most = fmax(most, __shfl_xor_sync(kWholeWarp, most, offset));
  }
  return most;
}

// How many eigenvalues are less than x: the changes of sign of the leading minors of S - x I.
__device__ inline int count_below(Reduced S, double x) {
  constexpr int kRescaled = 4; // minors that stay in range: a step multiplies by at most 2^13 and at least some 2^-160
  const double *diagonal = S.diagonal(), *square = S.square();
  const int T = S.T;
  double minor = 1.0, before = 0.0;
  int changes = 0;
  for (int begin = 0; begin < T; begin += kRescaled) {
    const int end = begin + kRescaled < T ? begin + kRescaled : T;
    for (int i = begin; i < end; ++i) {
      const double next = (diagonal[i] - x) * minor - square[i] * before;
      changes += (next < 0.0) != (minor < 0.0);
      before = minor;
      minor = next;
    }
    double down, up;
    power_of_two(fmax(fabs(minor), fabs(before)), down, up);
    minor *= down;
    before *= down;
  }
  return changes;
}

// The eigenvalue of S that `index` others are below, to a relative kSmallestWidth and from below; zero where it is less
// than `low`. It does not exceed `high`. Every thread gets it. By counts of threads: a barrier a round.
__device__ inline FASTMTL_ONE_COPY double eigenvalue(Reduced S, int index, double low, double high) {
  const int thread = int(threadIdx.x), shifts = min(int(blockDim.x), kMaxEigenShifts);
  const double least = low, doublings = log2(high / low);
  // By factors first, since nobody knows its size.
  const auto by_factors = [&](int t) { return least * exp2(doublings * double(t) / double(shifts)); };
  int reached = __syncthreads_count(thread < shifts && count_below(S, by_factors(thread)) <= index);
  if (reached == 0) {
    return 0.0;
  }
  low = by_factors(reached - 1);
  high = reached < shifts ? by_factors(reached) : high;
  for (int round = 0; round < 16 && high - low > kSmallestWidth * high; ++round) {
    const double step = (high - low) / double(shifts + 1);
    const auto evenly = [&](int t) { return low + step * double(t + 1); };
    reached = __syncthreads_count(thread < shifts && count_below(S, evenly(thread)) <= index);
    const double from = low;
    low = reached > 0 ? from + step * double(reached) : low;
    high = reached < shifts ? from + step * double(reached + 1) : high;
  }
  return low;
}

// w becomes M^-1/2 w, from Qᵀ w; all eigenvalues lie between low > 0 and high. Begins and ends with a barrier.
__device__ inline FASTMTL_ONE_COPY void inverse_root(
    const double* A, // [T, ld], reduced
    int ld,
    Reduced S,
    double* scratch,
    double low,
    double high,
    double* w,       // [T]
    double* terms) { // [T, 2, kNodes]
  static_assert(kNodes == 32 && 2 * kMaxMeans <= 32);
  const int T = S.T, thread = int(threadIdx.x);
  const int turns = int(kNodesPerLog * log(16.0 * high / low) / double(kNodes)) + 1;
  double *a = scratch, *b = a + kMaxMeans, *all = scratch + 32; // [T]
  for (int turn = 0; turn < turns; ++turn) {
    __syncthreads();
    if (thread < kNodes) {
      const int means = __shfl_sync(kWholeWarp, thread == 0 ? elliptic_means(low, high, a, b) : 0, 0);
      __syncwarp();
      const PartialFraction f =
          inverse_root_fraction(low, high, a, b, means, turn * kNodes + thread, int64_t(turns) * kNodes);
      double *z = terms + thread, *pivot = z + kNodes;
      double inverse = 1.0 / (S.diagonal()[T - 1] + f.t), right = w[T - 1];
      z[(T - 1) * 2 * kNodes] = right;
      pivot[(T - 1) * 2 * kNodes] = inverse;
      for (int i = T - 2; i >= 0; --i) {
        const double off = S.off()[i], along = off * inverse;
        z[i * 2 * kNodes] = right = w[i] - along * right;
        pivot[i * 2 * kNodes] = inverse = 1.0 / (S.diagonal()[i] + f.t - along * off);
      }
      double x = 0.0;
      for (int i = 0; i < T; ++i) {
        x = (z[i * 2 * kNodes] - (i > 0 ? S.off()[i - 1] * x : 0.0)) * pivot[i * 2 * kNodes];
        z[i * 2 * kNodes] = f.c * x;
      }
    }
    __syncthreads();
    each_row(
        0,
        T,
        0,
        kNodes,
        [&](int i, int c) { return terms[i * 2 * kNodes + c]; },
        [&](int i, int lane, double sum) {
          if (lane == 0) {
            all[i] = turn > 0 ? all[i] + sum : sum;
          }
        });
  }
  __syncthreads();
  if (thread < 32) {
    Held held(all, T);
    for (int k = T - 3; k >= 0; --k) {
      held.reflect(A + k * ld, S, k);
    }
    held.store(w, T);
  }
  __syncthreads();
}

} // namespace fastmtl::cuda
