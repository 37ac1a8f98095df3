// Small symmetric eigenproblems by Jacobi rotations, which keep the small eigenvalues of a graded positive definite
// matrix accurate where tridiagonalisation does not (Demmel and Veselić 1992). Both stop by the relative rule |m_ij| <=
// eps sqrt(m_ii m_jj).
//
// eigh_lanes: many matrices, one a SIMD lane, two-sided, round-robin: T - 1 rounds a sweep, each of T / 2 disjoint
// rotations that are applied to 2 x 2 blocks, so every element is loaded once a round. About 6 T³ flops a sweep.
//
// psd_eigh: one positive semi-definite matrix of any size. Cholesky with diagonal pivoting, M = L Lᵀ, then one-sided
// Jacobi on the columns of L: they end orthogonal, with norms sqrt(λ) and directions the eigenvectors. Rows are
// vectorised.
#pragma once

#include "../../math/jacobi.h"

namespace fastmtl::cpu {
namespace {

constexpr int kMaxSweeps = 40;

struct Rotation {
  Vd t, c, s; // tangent, cosine, sine
  Vi active;  // lanes in which there is something to rotate
};

// The rotation that annihilates b of [[a, b], [b, d]], from cos 2θ = |h| / r with h = d - a and r² = h² + 4 b²: two
// inverse roots, no division.
FASTMTL_INLINE Rotation rotation(Vd a, Vd d, Vd b, double tolerance = kRounding) {
  // Entries are at most one; what is smaller than kTinyEntry is zero.
  const Vi active = (b * b > tolerance * tolerance * magnitude(a * d)) & (magnitude(b) > splat(kTinyEntry));
  const Vd h = d - a, b2 = b + b;
  const Vd y = reciprocal_root(active ? h * h + b2 * b2 : splat(1.0));
  const Vd square = 0.5 + 0.5 * magnitude(h) * y; // cos² θ
  const Vd secant = reciprocal_root(square);
  Vd s = (Vd)((Vi)b ^ ((Vi)h & INT64_MIN)) * y * secant;
  s = active ? s : Vd{};
  return {s * secant, active ? square * secant : splat(1.0), s, active};
}

// Rows of lanes are an odd number of cache lines apart: columns then fall into different cache sets.
constexpr int64_t lanes_stride(int64_t T) {
  return T | 1;
}

// Above this many tasks the vectors are rotated after each sweep of the matrix, a few components at a time: both then
// stay in the first-level cache.
constexpr int64_t kMaxTogether = 12;
constexpr int64_t kMaxPairs = kMaxLanesTasks / 2;

struct Round {
  int64_t p[kMaxPairs], q[kMaxPairs];
  int64_t pairs = 0;
  int64_t bye = -1;

  FASTMTL_INLINE Round(int64_t T, int64_t round) {
    const int64_t players = T + T % 2;
    for (int64_t k = 0; k < players / 2; ++k) {
      int64_t i, j;
      pairing(players, round, k, i, j);
      if (j < T) {
        p[pairs] = i;
        q[pairs++] = j;
      } else {
        bye = i;
      }
    }
  }
};

FASTMTL_INLINE void rotate(Vd& x, Vd& y, Vd c, Vd s) {
  const Vd a = x, b = y;
  x = c * a - s * b;
  y = s * a + c * b;
}

// One round of disjoint rotations on A (upper triangle); returns the lanes in which anything was rotated. T = 0 as a
// template argument means that the size is known only at run time.
template <int64_t kT>
FASTMTL_INLINE Vi jacobi_round(Vd* A, int64_t runtime_T, const Round& round, Vd* c, Vd* s) {
  const int64_t T = kT ? kT : runtime_T, ld = lanes_stride(T), pairs = kT ? kT / 2 : round.pairs;
  Vi active{};
  for (int64_t k = 0; k < pairs; ++k) {
    const int64_t p = round.p[k], q = round.q[k];
    Vd &app = A[p * ld + p], &aqq = A[q * ld + q], &apq = A[p * ld + q];
    const Rotation r = rotation(app, aqq, apq);
    app -= r.t * apq;
    aqq += r.t * apq;
    apq = r.active ? Vd{} : apq;
    c[k] = r.c;
    s[k] = r.s;
    active |= r.active;
  }
  if (!any(active)) {
    return active;
  }
  const auto at = [&](int64_t i, int64_t j)
                      __attribute__((always_inline)) -> Vd& { return A[i < j ? i * ld + j : j * ld + i]; };
  for (int64_t k = 0; k < pairs; ++k) {
    const int64_t p = round.p[k], q = round.q[k];
    const Vd ck = c[k], sk = s[k];
    for (int64_t l = k + 1; l < pairs; ++l) {
      const Vd cl = c[l], sl = s[l];
      Vd &px = at(p, round.p[l]), &py = at(p, round.q[l]), &qx = at(q, round.p[l]), &qy = at(q, round.q[l]);
      Vd a = px, b = py, d = qx, e = qy;
      rotate(a, d, ck, sk);
      rotate(b, e, ck, sk);
      rotate(a, b, cl, sl);
      rotate(d, e, cl, sl);
      px = a, py = b, qx = d, qy = e;
    }
    if (T % 2) {
      rotate(at(p, round.bye), at(q, round.bye), ck, sk);
    }
  }
  return active;
}

// Sweeps until nothing is left to rotate. V[i ld + j] is component i of vector j, or null.
template <int64_t kT>
void jacobi_lanes(Vd* A, Vd* V, Vd* rotations, int64_t runtime_T) {
  const int64_t T = kT ? kT : runtime_T, ld = lanes_stride(T), rounds = T - 1 + T % 2;
  const bool together = kT || T <= kMaxTogether;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    Vi rotated{};
#pragma GCC unroll 1
    for (int64_t r = 0; r < rounds; ++r) {
      const Round round(T, r);
      Vd* c = rotations + (together ? 0 : r * 2 * kMaxPairs);
      Vd* s = c + kMaxPairs;
      const Vi active = jacobi_round<kT>(A, T, round, c, s);
      rotated |= active;
      if (V && together && any(active)) {
        for (int64_t k = 0; k < (kT ? kT / 2 : round.pairs); ++k) {
          const Vd ck = c[k], sk = s[k];
          Vd *vp = V + round.p[k], *vq = V + round.q[k];
          for (int64_t i = 0; i < T; ++i, vp += ld, vq += ld) {
            rotate(*vp, *vq, ck, sk);
          }
        }
      }
    }
    if (!any(rotated)) {
      break;
    }
    if (V && !together) {
      constexpr int64_t kComponents = 8;
      for (int64_t first = 0; first < T; first += kComponents) {
        const int64_t last = std::min(T, first + kComponents);
        for (int64_t r = 0; r < rounds; ++r) {
          const Round round(T, r);
          const Vd *c = rotations + r * 2 * kMaxPairs, *s = c + kMaxPairs;
          for (int64_t k = 0; k < round.pairs; ++k) {
            const Vd ck = c[k], sk = s[k];
            if (!any(sk != 0.0)) { // common in the last sweeps
              continue;
            }
            Vd *vp = V + first * ld + round.p[k], *vq = V + first * ld + round.q[k];
            for (int64_t i = first; i < last; ++i, vp += ld, vq += ld) {
              rotate(*vp, *vq, ck, sk);
            }
          }
        }
      }
    }
  }
}

// Ascending order in every lane, by compare-and-exchange of neighbours.
FASTMTL_INLINE void sort_lanes(Vd* A, Vd* V, int64_t T) {
  const int64_t ld = lanes_stride(T);
  for (int64_t pass = T - 1; pass > 0; --pass) {
    for (int64_t j = 0; j < pass; ++j) {
      Vd &x = A[j * ld + j], &y = A[(j + 1) * ld + j + 1];
      const Vi wrong = x > y;
      const Vd lo = wrong ? y : x, hi = wrong ? x : y;
      x = lo, y = hi;
      for (int64_t i = 0; V && i < T; ++i) {
        Vd &u = V[i * ld + j], &v = V[i * ld + j + 1];
        const Vd first = wrong ? v : u, second = wrong ? u : v;
        u = first, v = second;
      }
    }
  }
}
// What lanes [0, count) hold, in ascending order.
FASTMTL_INLINE void write_lanes(
    const Vd* a, // [T, lanes_stride(T)]
    const Vd* v, // [T, lanes_stride(T)], or null
    int64_t T,
    int64_t count,
    bool sorted,
    double* eigenvalues,    // [count, T]
    double* eigenvectors) { // [count, T, T]
  const int64_t ld = lanes_stride(T);
  for (int64_t l = 0; l < count; ++l) {
    int32_t order[2 * kMaxPairs];
    for (int64_t i = 0; i < T; ++i) {
      const double x = a[i * ld + i][l];
      int64_t j = i;
      for (; !sorted && j > 0 && a[order[j - 1] * ld + order[j - 1]][l] > x; --j) {
        order[j] = order[j - 1];
      }
      order[j] = int32_t(i);
    }
    for (int64_t j = 0; j < T; ++j) {
      eigenvalues[l * T + j] = a[order[j] * ld + order[j]][l];
    }
    for (int64_t i = 0; v && i < T; ++i) {
      const double* from = reinterpret_cast<const double*>(v + i * ld) + l;
      for (int64_t j = 0; j < T; ++j) {
        eigenvectors[(l * T + i) * T + j] = from[order[j] * kWidth];
      }
    }
  }
}

template <int64_t kT>
void solve_lanes(
    const double* A,
    int64_t runtime_T,
    int64_t count,
    double* eigenvalues,
    double* eigenvectors,
    double* scratch) {
  const int64_t T = kT ? kT : runtime_T, ld = lanes_stride(T);
  Vd* a = reinterpret_cast<Vd*>(scratch);
  Vd* v = eigenvectors ? a + T * ld : nullptr;
  Vd* rotations = a + 2 * T * ld;
  // Lanes without a matrix repeat the last one.
  double padded[kT && kT <= 4 ? kWidth * kT * kT : 1];
  const bool gatherable = count == kWidth;
  if (kT && kT <= 4 && !gatherable) {
    for (int64_t l = 0; l < kWidth; ++l) {
      std::copy_n(A + std::min(l, count - 1) * T * T, T * T, padded + l * T * T);
    }
    A = padded;
  }
  Vd largest{}, poison{};
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      Vd x{};
      if ((kT && kT <= 4) || gatherable) {
        x = gather(A + i * T + j, T * T);
      } else {
        for (int64_t l = 0; l < kWidth; ++l) {
          x[l] = A[std::min(l, count - 1) * T * T + i * T + j];
        }
      }
      a[j * ld + i] = x;
      largest = larger(magnitude(x), largest);
      poison += x * 0.0; // NaN where an entry is not finite
    }
  }
  // A power of two near the largest entry: scaling by it changes no bits. Subnormal matrices are left as they are.
  const Vi finite = poison == 0.0;
  const Vi exponent = (Vi)largest & INT64_C(0x7ff0000000000000);
  const Vi scalable = finite & (exponent != 0) & (exponent < INT64_C(0x7fd0000000000000));
  const Vd up = scalable ? (Vd)exponent : splat(1.0);
  const Vd down = scalable ? (Vd)(INT64_C(0x7fe0000000000000) - exponent) : splat(1.0);
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = i; j < T; ++j) {
      a[i * ld + j] = finite ? a[i * ld + j] * down : splat(i == j ? 1.0 : 0.0);
    }
  }
  if (v) {
    for (int64_t i = 0; i < T; ++i) {
      for (int64_t j = 0; j < T; ++j) {
        v[i * ld + j] = splat(i == j ? 1.0 : 0.0);
      }
    }
  }
  if (T > 1) {
    jacobi_lanes<kT>(a, v, rotations, T);
  }
  const bool sorted = T <= kMaxTogether;
  if (sorted) {
    sort_lanes(a, v, T);
  }
  for (int64_t i = 0; i < T; ++i) {
    a[i * ld + i] = a[i * ld + i] * up + poison;
    for (int64_t j = 0; v && j < T; ++j) {
      v[i * ld + j] += poison;
    }
  }
  write_lanes(a, v, T, count, sorted, eigenvalues, eigenvectors);
}

void eigh_lanes(const double* A, int64_t T, int64_t count, double* eigenvalues, double* eigenvectors, double* scratch) {
  switch (T) {
    case 2:
      return solve_lanes<2>(A, T, count, eigenvalues, eigenvectors, scratch);
    case 3:
      return solve_lanes<3>(A, T, count, eigenvalues, eigenvectors, scratch);
    case 4:
      return solve_lanes<4>(A, T, count, eigenvalues, eigenvectors, scratch);
    case 8:
      return solve_lanes<8>(A, T, count, eigenvalues, eigenvectors, scratch);
    default:
      return solve_lanes<0>(A, T, count, eigenvalues, eigenvectors, scratch);
  }
}

FASTMTL_INLINE double dot(const double* x, const double* y, int64_t n) { // n a multiple of 8
  Vd a{}, b{};
  int64_t k = 0;
  for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
    a += read<Vd>(x + k) * read<Vd>(y + k);
    b += read<Vd>(x + k + kWidth) * read<Vd>(y + k + kWidth);
  }
  for (; k < n; k += kWidth) {
    a += read<Vd>(x + k) * read<Vd>(y + k);
  }
  return sum(a + b);
}

// The rows of Lᵀ, M = L Lᵀ with the largest pivot first, for A = M / down; returns how many there are.
int64_t pivoted_cholesky(const double* A, int64_t T, double down, double* left, double* X) {
  const int64_t ld = psd_stride(T);
  // Rows that depend on the pivots so far to rounding are done with: what is left of them is noise.
  const double noise = 4.0 * kRounding;
  int64_t rank = 0;
  for (; rank < T; ++rank) {
    int64_t pivot = -1;
    for (int64_t i = 0; i < T; ++i) {
      if (left[i] > noise * (A[i * T + i] * down) && (pivot < 0 || left[i] > left[pivot])) {
        pivot = i;
      }
    }
    if (pivot < 0) {
      break;
    }
    double* x = X + rank * ld;
    for (int64_t i = 0; i < T; ++i) {
      x[i] = A[pivot * T + i] * down;
    }
    for (int64_t i = T; i < ld; ++i) {
      x[i] = 0.0;
    }
    for (int64_t j = 0; j < rank; ++j) {
      const double* y = X + j * ld;
      const Vd factor = splat(y[pivot]);
      for (int64_t i = 0; i < ld; i += kWidth) {
        write(x + i, read<Vd>(x + i) - factor * read<Vd>(y + i));
      }
    }
    const double root = std::sqrt(left[pivot]);
    const Vd inverse = splat(1.0 / root);
    for (int64_t i = 0; i < ld; i += kWidth) {
      write(x + i, read<Vd>(x + i) * inverse);
    }
    for (int64_t i = 0; i < T; ++i) {
      left[i] -= x[i] * x[i];
    }
    x[pivot] = root;
    left[pivot] = 0.0;
  }
  return rank;
}

// A sweep of rotations over the rows of X; false where there was nothing to rotate.
bool jacobi_rows(double* X, int64_t rank, int64_t ld, double tolerance, double* norms) {
  const int64_t players = rank + rank % 2;
  bool rotated = false;
  for (int64_t j = 0; j < rank; ++j) {
    norms[j] = dot(X + j * ld, X + j * ld, ld);
  }
  for (int64_t round = 0; round < players - 1; ++round) {
    // The pairs of a round are disjoint: those of a vector do not wait for each other's dot products and roots.
    for (int64_t first = 0; first < players / 2; first += kWidth) {
      int64_t p[kWidth], q[kWidth], pairs = 0;
      alignas(64) double at_p[kWidth] = {}, at_q[kWidth] = {}, product[kWidth] = {};
      for (int64_t k = first; k < std::min(first + kWidth, players / 2); ++k) {
        pairing(players, round, k, p[pairs], q[pairs]);
        if (q[pairs] < rank) {
          at_p[pairs] = norms[p[pairs]];
          at_q[pairs] = norms[q[pairs]];
          product[pairs] = dot(X + p[pairs] * ld, X + q[pairs] * ld, ld);
          ++pairs;
        }
      }
      const Vd a = read<Vd>(at_p), d = read<Vd>(at_q), b = read<Vd>(product);
      // A power of two that brings the larger norm of each pair near one: squares of small ones would underflow.
      const Vd scale = (Vd)(INT64_C(0x7fe0000000000000) - ((Vi)larger(a, d) & INT64_C(0x7ff0000000000000)));
      const Rotation r = rotation(a * scale, d * scale, b * scale, tolerance);
      if (!any(r.active)) {
        continue;
      }
      rotated = true;
      write(at_p, larger(a - r.t * b, Vd{}));
      write(at_q, d + r.t * b);
      for (int64_t l = 0; l < pairs; ++l) {
        if (!r.active[l]) {
          continue;
        }
        norms[p[l]] = at_p[l];
        norms[q[l]] = at_q[l];
        double *x = X + p[l] * ld, *y = X + q[l] * ld;
        const Vd c = splat(r.c[l]), s = splat(r.s[l]);
        for (int64_t i = 0; i < ld; i += kWidth) {
          const Vd u = read<Vd>(x + i), v = read<Vd>(y + i);
          write(x + i, c * u - s * v);
          write(y + i, s * u + c * v);
        }
      }
    }
  }
  return rotated;
}

int64_t psd_eigh(const double* A, int64_t T, double* eigenvalues, double* X, double* scratch) {
  const int64_t ld = psd_stride(T);
  double* left = scratch;      // [T] what Cholesky has left of the diagonal
  double* norms = scratch + T; // [T] squared norms of the columns
  double largest = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    largest = std::max(largest, A[i * T + i]);
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  exponent = std::max(exponent + exponent % 2, -1000); // its root is a power of two as well
  const double down = std::ldexp(1.0, -exponent), up = std::ldexp(1.0, exponent / 2);
  for (int64_t i = 0; i < T; ++i) {
    left[i] = A[i * T + i] * down;
    eigenvalues[i] = 0.0;
  }
  const int64_t rank = pivoted_cholesky(A, T, down, left, X);
  const double tolerance = kRounding * (4.0 + std::sqrt(double(T))); // dot products round
  for (int sweep = 0; sweep < kMaxSweeps && jacobi_rows(X, rank, ld, tolerance, norms); ++sweep) {
  }
  for (int64_t j = 0; j < rank; ++j) {
    norms[j] = dot(X + j * ld, X + j * ld, ld);
  }
  for (int64_t j = 0; j < rank; ++j) { // selection sort, descending: T swaps of rows at most
    int64_t best = j;
    for (int64_t i = j + 1; i < rank; ++i) {
      best = norms[i] > norms[best] ? i : best;
    }
    if (best != j) {
      std::swap(norms[j], norms[best]);
      std::swap_ranges(X + j * ld, X + (j + 1) * ld, X + best * ld);
    }
  }
  for (int64_t j = 0; j < rank; ++j) {
    eigenvalues[j] = norms[j] * up * up;
    for (int64_t i = 0; i < ld; ++i) {
      X[j * ld + i] *= up;
    }
  }
  return rank;
}

} // namespace
} // namespace fastmtl::cpu
