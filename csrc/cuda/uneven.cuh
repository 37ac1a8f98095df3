// M^-1/2 w where the norms of the rows differ by orders of magnitude and C = D^-1/2 M D^-1/2 has full rank, T <= 128,
// by one block. csrc/cpu/spectral.h does the same for many tasks, and docs/numerics.md says why:
//
//     M = L Lᵀ with pivoting, A = Lᵀ L, M^-1/2 w = L⁻ᵀ A^-1/2 Lᵀ w, and A by its tridiagonal form
//
// keeps small eigenvalues to a relative accuracy, as far as the reflections do not add long rows to short ones: their
// `growth` is measured. The factorisation has T steps of two barriers and a search of five shuffles, some 500 cycles.
#pragma once

#include "tridiagonal.cuh"

namespace fastmtl::cuda {

// L of M = L Lᵀ where M was: row i of it is row i of M, column k is column order[k]. Rows are counted in the order of
// their pivots from here on, the largest first.
struct Factor {
  double* L; // [T, ld]
  int ld, T;
  int* order;      // [T]: the row of each pivot
  int* step;       // [T]: and the pivot of each row
  double* inverse; // [T]: 1 / L_kk

  __device__ double entry(int row, int column) const {
    return L[order[row] * ld + order[column]];
  }
};

// The largest diagonal entry of the rows that have no step yet, and where it is. Every thread gets it.
__device__ inline double largest_pivot(const Factor& F, int& place) {
  double most = -1.0;
  place = -1;
  for (int i = int(threadIdx.x) % 32; i < F.T; i += 32) {
    const double x = F.step[i] < 0 ? F.L[i * F.ld + i] : -1.0;
    place = x > most ? i : place;
    most = x > most ? x : most;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kWholeWarp, most, offset);
    const int there = __shfl_xor_sync(kWholeWarp, place, offset);
    const bool better = other > most || (other == most && there < place);
    place = better ? there : place;
    most = better ? other : most;
  }
  return most;
}

// M [T, ld], in full, becomes L; false where a pivot is not positive. Begins and ends with a barrier.
__device__ inline FASTMTL_ONE_COPY bool factor(const Factor& F) {
  const int T = F.T, ld = F.ld, thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int i = thread; i < T; i += threads) {
    F.step[i] = -1;
  }
  __syncthreads();
  for (int k = 0; k < T; ++k) {
    int p;
    const double d = largest_pivot(F, p);
    __syncthreads(); // the diagonal has been read
    if (!(d > 0.0)) {
      return false;
    }
    if (thread == 0) {
      F.order[k] = p;
      F.step[p] = k;
      F.inverse[k] = rsqrt(d);
    }
    const double reciprocal = 1.0 / d;
    for (int i = thread / kRowLanes; i < T; i += threads / kRowLanes) {
      if (i == p || F.step[i] >= 0) {
        continue;
      }
      const double along = F.L[i * ld + p] * reciprocal;
      for (int c = thread % kRowLanes; c < T; c += kRowLanes) {
        if (c != p && F.step[c] < 0) {
          F.L[i * ld + c] -= along * F.L[c * ld + p];
        }
      }
    }
    __syncthreads();
  }
  for (int e = thread; e < T * T; e += threads) {
    const int i = e / T, k = e % T;
    double& x = F.L[i * ld + F.order[k]];
    x = F.step[i] < k ? 0.0 : x * F.inverse[k];
  }
  __syncthreads();
  return true;
}

// One step of the LR algorithm: A = Lᵀ L in full, and y = Lᵀ w. Ends with a barrier.
__device__ inline FASTMTL_ONE_COPY void
lr_step(const Factor& F, const double* w, double* A, int ld, double* y) { // w, y [T], A [T, ld]
  const int T = F.T, thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int e = thread; e < T * T; e += threads) {
    const int k = e / T, l = e % T;
    double sum = 0.0;
    for (int m = l; m < T && k <= l; ++m) {
      sum += F.entry(m, k) * F.entry(m, l);
    }
    if (k <= l) {
      A[k * ld + l] = A[l * ld + k] = sum;
    }
  }
  for (int k = thread; k < T; k += threads) {
    double sum = 0.0;
    for (int m = k; m < T; ++m) {
      sum += F.entry(m, k) * w[F.order[m]];
    }
    y[k] = sum;
  }
  __syncthreads();
}

// The largest factor by which a reflection of the reduced A has added a row of length a_i to another, relative to that:
// rounding errors of A are then about eps growth² a_i a_j. Every thread gets it, after a barrier.
__device__ inline double growth(
    const double* A, // [T, ld], reduced
    int ld,
    Reduced S,
    const double* lengths, // [T]
    double* of_warps) {    // [threads / 32]
  const int T = S.T, lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  double most = 1.0;
  for (int k = int(threadIdx.x) / 32; k < T - 2; k += warps) {
    double from = 0.0, to = 0.0;
    for (int i = k + 1 + lane; i < T; i += 32) {
      const double size = fabs(A[k * ld + i] + (i == k + 1 ? S.head()[k] : 0.0));
      from = fmax(from, size * lengths[i]);
      to = fmax(to, size / lengths[i]);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      from = fmax(from, __shfl_xor_sync(kWholeWarp, from, offset));
      to = fmax(to, __shfl_xor_sync(kWholeWarp, to, offset));
    }
    most = fmax(most, from * to * S.inverse()[k]);
  }
  if (lane == 0) {
    of_warps[threadIdx.x / 32] = most;
  }
  __syncthreads();
  for (int j = 0; j < warps; ++j) {
    most = fmax(most, of_warps[j]);
  }
  return most;
}

// x [T], in the order of the rows of M, = L⁻ᵀ z. By one warp.
__device__ inline void unscale(const Factor& F, const double* z, double* x) { // z [T]
  Held left(z, F.T);
  const int lane = int(threadIdx.x) % 32;
  for (int k = F.T - 1; k >= 0; --k) {
    double own = 0.0;
    Held::each(F.T, [&](int p, int j) { own = j == k ? left.part[p] : own; });
    const double a = __shfl_sync(kWholeWarp, own, k % 32) * F.inverse[k];
    Held::each(F.T, [&](int p, int j) { left.part[p] -= j < k ? a * F.entry(k, j) : 0.0; });
    if (lane == 0) {
      x[F.order[k]] = a;
    }
  }
}

} // namespace fastmtl::cuda
