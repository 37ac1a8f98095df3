// Symmetric eigenproblems, T <= 128, one matrix a block: two-sided Jacobi in shared memory, round-robin, by the CPU's
// relative rule |m_ij| <= eps sqrt(|m_ii m_jj|), which keeps the small eigenvalues of a graded matrix accurate (Demmel
// and Veselić 1992). Convergence is decided on the device.
//
// Reads T² 8 bytes a matrix and writes T² 8 (vectors) + T 8; some 6 to 9 sweeps of 6 T³ float64 operations.
#pragma once

#include <cstdint>

#include "../math/jacobi.h"
#include "../math/scaling.h"
#include "platform.h"

namespace fastmtl::cuda {

constexpr int kMaxJacobiTasks = 128; // of one block; then products take less (fastmtl/ops/reference/products.py)

constexpr int kMaxJacobiThreads = 512;

// Threads that solve one matrix, as measured: fewer have more to do one after the other, more wait longer at barriers.
__host__ __device__ constexpr int jacobi_threads(int64_t T) {
  return T <= 16 ? 64 : T <= 32 ? 256 : kMaxJacobiThreads;
}

// Rows are an odd number of doubles apart: a column then lies in different banks.
__host__ __device__ constexpr int jacobi_stride(int64_t T) {
  return int(T) | 1;
}

__device__ inline void rotate(double& x, double& y, double c, double s) {
  const double a = x, b = y;
  x = c * a - s * b;
  y = s * a + c * b;
}

// The rotation that annihilates b of [[a, b], [b, d]]: cosine, sine, and returned the tangent.
__device__ __forceinline__ double jacobi_angle(double a, double d, double b, double& c, double& s) {
  // cos 2θ = |h| / r with h = d - a and r² = h² + 4 b²: two inverse roots, no division.
  const double h = d - a, y = rsqrt(h * h + 4.0 * b * b);
  const double square = 0.5 + 0.5 * fabs(h) * y, secant = rsqrt(square);
  s = (h < 0.0 ? -b : b) * y * secant;
  c = square * secant;
  return s * secant;
}

// Both rotations of pairs (pk, qk) and (pm, qm) of rows on the 2 x 2 block they meet in; at(i, j) is its entry.
template <class At>
__device__ __forceinline__ void
rotate_block(const At& at, int T, int pk, int qk, int pm, int qm, double ck, double sk, double cm, double sm) {
  if (qk >= T) { // the row without an opponent
    rotate(at(pk, pm), at(pk, qm), cm, sm);
  } else if (qm >= T) {
    rotate(at(pk, pm), at(qk, pm), ck, sk);
  } else {
    double &pp = at(pk, pm), &pq = at(pk, qm), &qp = at(qk, pm), &qq = at(qk, qm);
    double a = pp, b = pq, c = qp, d = qq;
    rotate(a, c, ck, sk);
    rotate(b, d, ck, sk);
    rotate(a, b, cm, sm);
    rotate(c, d, cm, sm);
    pp = a;
    pq = b;
    qp = c;
    qq = d;
  }
}

// Rotates A [T, ld], entries at most one, until it is diagonal; V [T, next_row] becomes the product of the rotations,
// or is null. Only the upper triangle of A is used. `cosine`, `sine` [(T + 1) / 2] are shared memory.
__device__ inline void jacobi(double* A, int ld, double* V, int next_row, int T, double* cosine, double* sine) {
  constexpr int kMaxSweeps = 40;
  const int players = T + T % 2, pairs = players / 2, thread = int(threadIdx.x);
  // Half of the threads turn V while the others turn A; a power of two of them has a row, or two short ones.
  const int threads = V ? int(blockDim.x) / 2 : int(blockDim.x), mine = thread % threads;
  int width = 1;
  while (width < pairs) {
    width *= 2;
  }
  const int l = mine % width, group = mine / width, groups = threads / width;
  if (V) {
    for (int k = thread; k < T * T; k += int(blockDim.x)) {
      V[k / T * next_row + k % T] = k / T == k % T ? 1.0 : 0.0;
    }
  }
  const auto at = [&](int i, int j) -> double& { return A[i < j ? i * ld + j : j * ld + i]; };
  const auto matters = [&](double a, double d, double b) {
    return b * b > kRounding * kRounding * fabs(a * d) && fabs(b) > kTinyEntry;
  };
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    __syncthreads();
    bool more = false;
    for (int k = thread; k < T * T; k += int(blockDim.x)) {
      const int i = k / T, j = k % T;
      more = more || (i < j && matters(A[i * ld + i], A[j * ld + j], A[i * ld + j]));
    }
    if (!__syncthreads_or(more)) {
      break;
    }
    for (int round = 0; round < players - 1; ++round) {
      __syncthreads();
      if (thread < pairs) {
        int p, q;
        pairing(players, round, thread, p, q);
        double c = 1.0, s = 0.0;
        if (q < T) {
          double &a = A[p * ld + p], &d = A[q * ld + q], &b = A[p * ld + q];
          if (matters(a, d, b)) {
            const double t = jacobi_angle(a, d, b, c, s);
            a -= t * b;
            d += t * b;
            b = 0.0;
          }
        }
        cosine[thread] = c;
        sine[thread] = s;
      }
      __syncthreads();
      if (thread < threads) {
        // The 2 x 2 blocks above the diagonal: row k of them has pairs - 1 - k, and row pairs - 1 - k has the k others.
        for (int row = group; row < (pairs + 1) / 2 && l < pairs - 1; row += groups) {
          const bool second = l >= pairs - 1 - row;
          const int k = second ? pairs - 1 - row : row, m = second ? l + 1 : row + 1 + l;
          const double ck = cosine[k], sk = sine[k], cm = cosine[m], sm = sine[m];
          if ((second && k == row) || (sk == 0.0 && sm == 0.0)) { // an odd number of rows: the middle one is alone
            continue;
          }
          int pk, qk, pm, qm;
          pairing(players, round, k, pk, qk);
          pairing(players, round, m, pm, qm);
          rotate_block(at, T, pk, qk, pm, qm, ck, sk, cm, sm);
        }
      }
      if (V && thread >= threads && l < pairs && sine[l] != 0.0) {
        int p, q;
        pairing(players, round, l, p, q);
        const double c = cosine[l], s = sine[l];
        for (int i = group; i < T; i += groups) {
          rotate(V[i * next_row + p], V[i * next_row + q], c, s);
        }
      }
    }
  }
  __syncthreads();
}

// Room for an array [T], and for twice one of T / 2 pairs.
__host__ __device__ constexpr int jacobi_array(int64_t T) {
  return int(T + T % 2);
}

// Shared memory of `jacobi` and what surrounds it, in bytes: A, V if `vectors`, and an array each of cosines and sines
// (half of it), sorted eigenvalues, and places.
__host__ __device__ constexpr size_t jacobi_shared(int64_t T, bool vectors) {
  return (size_t(T) * size_t(jacobi_stride(T)) * (vectors ? 2 : 1) + 3 * jacobi_array(T)) * sizeof(double);
}

// place[r]: which eigenvalue is the r-th largest (or smallest), ties in order.
__device__ inline void sort(const double* A, int ld, int T, bool descending, double* sorted, int* place) {
  for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
    const double x = A[i * ld + i];
    int before = 0;
    for (int j = 0; j < T; ++j) {
      const double y = A[j * ld + j];
      before += (descending ? y > x : y < x) || (y == x && j < i);
    }
    sorted[before] = x;
    place[before] = i;
  }
  __syncthreads();
}

} // namespace fastmtl::cuda
