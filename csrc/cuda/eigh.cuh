// Symmetric eigenproblems, T <= 64, one matrix a block: two-sided Jacobi in shared memory, round-robin, by the CPU's
// relative rule |m_ij| <= eps sqrt(|m_ii m_jj|), which keeps the small eigenvalues of a graded matrix accurate (Demmel
// and Veselić 1992). Convergence is decided on the device.
//
// Reads T² 8 bytes a matrix and writes T² 8 (vectors) + T 8; some 6 to 9 sweeps of 6 T³ float64 operations.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace fastmtl::cuda {

constexpr int kMaxJacobiTasks = 64;

// Threads that solve one matrix: a row and a pair of columns each for the smallest, at least one warp.
__host__ __device__ constexpr int jacobi_threads(int64_t T) {
  return T <= 8 ? 32 : T <= 16 ? 64 : T <= 32 ? 128 : 256;
}

// Rows are an odd number of doubles apart: a column then lies in different banks.
__host__ __device__ constexpr int jacobi_stride(int64_t T) {
  return int(T) | 1;
}

// Pair k of a round of a round-robin tournament of `players` (even); p < q, and q = T is a bye where T is odd.
__device__ inline void pairing(int players, int round, int k, int& p, int& q) {
  const int others = players - 1;
  p = k == 0 ? others : round + k < others ? round + k : round + k - others;
  q = round >= k ? round - k : round - k + others;
  if (p > q) {
    const int swap = p;
    p = q;
    q = swap;
  }
}

__device__ inline void rotate(double& x, double& y, double c, double s) {
  const double a = x, b = y;
  x = c * a - s * b;
  y = s * a + c * b;
}

// Powers of two that bring the largest entry near one and back: exact, no bits change. Ones where it is subnormal or
// not finite.
__device__ inline void power_of_two(double largest, double& down, double& up) {
  uint64_t bits;
  memcpy(&bits, &largest, 8);
  bits &= 0x7ff0000000000000u;
  const bool scalable = bits != 0 && bits < 0x7fd0000000000000u;
  const uint64_t one = 0x3ff0000000000000u, other = 0x7fe0000000000000u - bits;
  memcpy(&up, scalable ? &bits : &one, 8);
  memcpy(&down, scalable ? &other : &one, 8);
}

// Rotates A [T, ld], entries at most one, until it is diagonal; V [T, next_row] becomes the product of the rotations,
// or is null. Only the upper triangle of A is used. `cosine`, `sine` [kMaxJacobiTasks / 2] are shared memory.
__device__ inline void jacobi(double* A, int ld, double* V, int next_row, int T, double* cosine, double* sine) {
  constexpr double kEps = 0x1p-52, kTiny = 0x1p-500; // what is smaller is zero, and its square would underflow
  constexpr int kMaxSweeps = 40;
  const int players = T + T % 2, pairs = players / 2;
  // A power of two threads handle one pair (or one row) together, one pair of columns each.
  int width = 1;
  while (width < pairs) {
    width *= 2;
  }
  const int l = int(threadIdx.x) % width, group = int(threadIdx.x) / width, groups = int(blockDim.x) / width;
  if (V) {
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      V[k / T * next_row + k % T] = k / T == k % T ? 1.0 : 0.0;
    }
  }
  const auto at = [&](int i, int j) -> double& { return A[i < j ? i * ld + j : j * ld + i]; };
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < players - 1; ++round) {
      __syncthreads();
      if (int(threadIdx.x) < pairs) {
        int p, q;
        pairing(players, round, int(threadIdx.x), p, q);
        double c = 1.0, s = 0.0;
        if (q < T) {
          double &a = A[p * ld + p], &d = A[q * ld + q], &b = A[p * ld + q];
          if (b * b > kEps * kEps * fabs(a * d) && fabs(b) > kTiny) {
            // cos 2θ = |h| / r with h = d - a and r² = h² + 4 b²: two inverse roots, no division.
            const double h = d - a, y = rsqrt(h * h + 4.0 * b * b);
            const double square = 0.5 + 0.5 * fabs(h) * y, secant = rsqrt(square);
            s = (h < 0.0 ? -b : b) * y * secant;
            c = square * secant;
            const double t = s * secant;
            a -= t * b;
            d += t * b;
            b = 0.0;
            rotated = true;
          }
        }
        cosine[threadIdx.x] = c;
        sine[threadIdx.x] = s;
      }
      __syncthreads();
      int pl = 0, ql = T;
      double cl = 1.0, sl = 0.0;
      if (l < pairs) {
        pairing(players, round, l, pl, ql);
        cl = cosine[l];
        sl = sine[l];
      }
      for (int k = group; k < pairs && l < pairs; k += groups) { // the 2 x 2 blocks above the diagonal
        int pk, qk;
        pairing(players, round, k, pk, qk);
        const double ck = cosine[k], sk = sine[k];
        if (k >= l || (sk == 0.0 && sl == 0.0)) {
          continue;
        }
        if (qk >= T) { // the row without an opponent
          rotate(at(pk, pl), at(pk, ql), cl, sl);
        } else if (ql >= T) {
          rotate(at(pk, pl), at(qk, pl), ck, sk);
        } else {
          double &pp = at(pk, pl), &pq = at(pk, ql), &qp = at(qk, pl), &qq = at(qk, ql);
          double a = pp, b = pq, c = qp, d = qq;
          rotate(a, c, ck, sk);
          rotate(b, d, ck, sk);
          rotate(a, b, cl, sl);
          rotate(c, d, cl, sl);
          pp = a;
          pq = b;
          qp = c;
          qq = d;
        }
      }
      for (int i = group; V && i < T && l < pairs; i += groups) {
        if (ql < T && sl != 0.0) {
          rotate(V[i * next_row + pl], V[i * next_row + ql], cl, sl);
        }
      }
    }
    if (!__syncthreads_or(rotated)) {
      break;
    }
  }
  __syncthreads();
}

// Shared memory of `jacobi` and what surrounds it, in doubles: A, V if `vectors`, and kMaxJacobiTasks each of cosines
// and sines (half of it), eigenvalues, sorted ones, and places.
__host__ __device__ constexpr size_t jacobi_shared(int64_t T, bool vectors) {
  return (size_t(T) * size_t(jacobi_stride(T)) * (vectors ? 2 : 1) + 4 * kMaxJacobiTasks) * sizeof(double);
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
