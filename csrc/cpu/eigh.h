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

namespace fastmtl::cpu {
namespace {

constexpr double kEps = 0x1p-52;
constexpr int kMaxSweeps = 40;

struct Rotation {
  Vd t, c, s; // tangent, cosine, sine
  Vi active;  // lanes in which there is something to rotate
};

// 1 / sqrt(x) to full precision, x >= 1/2.
FASTMTL_INLINE Vd reciprocal_root(Vd x) {
#if FASTMTL_VECTOR_BYTES == 64
  Vd y = (Vd)_mm512_rsqrt14_pd((__m512d)x);
  Vd e = 1.0 - x * y * y; // 14 -> 42 -> 84 bits
  y += y * e * (0.5 + 0.375 * e);
  e = 1.0 - x * y * y;
  return y + 0.5 * y * e;
#else
  return 1.0 / square_root(x);
#endif
}

// The rotation that annihilates b of [[a, b], [b, d]].
FASTMTL_INLINE Rotation rotation(Vd a, Vd d, Vd b) {
  const Vi active = b * b > kEps * kEps * magnitude(a * d);
  const Vd h = d - a, b2 = b + b;
  const Vd size = magnitude(b2);
  Vd r = square_root(h * h + b2 * b2);
  r = r < size ? size : r; // the squares may underflow
  const Vd signed_b2 = (Vd)((Vi)b2 ^ ((Vi)h & INT64_MIN));
  Vd t = signed_b2 / (magnitude(h) + r);
  t = active ? t : Vd{};
  const Vd c = reciprocal_root(1.0 + t * t);
  return {t, c, t * c, active};
}

// Pairs of round `round` of a round-robin tournament of `players` (even); indices from T on are byes.
FASTMTL_INLINE void pairing(int64_t players, int64_t round, int64_t k, int64_t& p, int64_t& q) {
  p = k == 0 ? players - 1 : (round + k) % (players - 1);
  q = (round + players - 1 - k) % (players - 1);
  if (p > q) {
    std::swap(p, q);
  }
}

// T = 0 means that the size is known only at run time.
template <int64_t kT>
void jacobi_lanes(Vd* A, Vd* V, int64_t runtime_T, bool vectors) {
  const int64_t T = kT ? kT : runtime_T;
  const int64_t players = T + T % 2;
  constexpr int64_t kMaxPairs = kT ? (kT + 1) / 2 : 16;
  // Only i <= j is kept.
  const auto at = [&](int64_t i, int64_t j)
                      __attribute__((always_inline)) -> Vd& { return i < j ? A[i * T + j] : A[j * T + i]; };
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    Vi rotated{};
    for (int64_t round = 0; round < players - 1; ++round) {
      int64_t P[kMaxPairs], Q[kMaxPairs], pairs = 0;
      Vd c[kMaxPairs], s[kMaxPairs];
      for (int64_t k = 0; k < players / 2; ++k) {
        int64_t p, q;
        pairing(players, round, k, p, q);
        if (q < T) {
          P[pairs] = p;
          Q[pairs++] = q;
        }
      }
      Vi active{};
      for (int64_t k = 0; k < pairs; ++k) {
        Vd &app = A[P[k] * T + P[k]], &aqq = A[Q[k] * T + Q[k]], &apq = A[P[k] * T + Q[k]];
        const Rotation r = rotation(app, aqq, apq);
        app -= r.t * apq;
        aqq += r.t * apq;
        apq = r.active ? Vd{} : apq;
        c[k] = r.c;
        s[k] = r.s;
        active |= r.active;
      }
      rotated |= active;
      if (!any(active)) {
        continue;
      }
      for (int64_t k = 0; k < pairs; ++k) {
        const int64_t p = P[k], q = Q[k];
        const Vd ck = c[k], sk = s[k];
        for (int64_t l = k + 1; l < pairs; ++l) {
          Vd &px = at(p, P[l]), &py = at(p, Q[l]), &qx = at(q, P[l]), &qy = at(q, Q[l]);
          const Vd cl = c[l], sl = s[l];
          const Vd a = ck * px - sk * qx, d = sk * px + ck * qx;
          const Vd b = ck * py - sk * qy, e = sk * py + ck * qy;
          px = cl * a - sl * b;
          py = sl * a + cl * b;
          qx = cl * d - sl * e;
          qy = sl * d + cl * e;
        }
        if (vectors) {
          Vd *vp = V + p * T, *vq = V + q * T;
          for (int64_t i = 0; i < T; ++i) {
            const Vd a = vp[i], b = vq[i];
            vp[i] = ck * a - sk * b;
            vq[i] = sk * a + ck * b;
          }
        }
      }
      if (T % 2) { // the player with a bye
        const int64_t f = round;
        for (int64_t k = 0; k < pairs; ++k) {
          Vd &ap = at(P[k], f), &aq = at(Q[k], f);
          const Vd a = ap, b = aq;
          ap = c[k] * a - s[k] * b;
          aq = s[k] * a + c[k] * b;
        }
      }
    }
    if (!any(rotated)) {
      break;
    }
  }
}

void eigh_lanes(const double* A, int64_t T, int64_t count, double* eigenvalues, double* eigenvectors, double* scratch) {
  Vd* a = reinterpret_cast<Vd*>(scratch);
  Vd* v = a + T * T;
  double scale[kWidth];
  for (int64_t l = 0; l < kWidth; ++l) {
    const double* m = A + (l < count ? l : 0) * T * T;
    double largest = 0.0, sum = 0.0;
    for (int64_t i = 0; i < T; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const double x = m[i * T + j];
        largest = std::max(largest, std::fabs(x));
        sum += x * 0.0; // NaN where an entry is not finite
      }
    }
    // A power of two: the eigenvectors stay the same bits.
    int exponent = 0;
    std::frexp(largest, &exponent);
    scale[l] = largest > 0.0 && sum == 0.0 ? std::ldexp(1.0, exponent) : 1.0;
    const double down = 1.0 / scale[l];
    if (sum != 0.0) {
      scale[l] = __builtin_nan("");
    }
    for (int64_t i = 0; i < T; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        a[j * T + i][l] = sum == 0.0 ? m[i * T + j] * down : double(i == j);
      }
    }
  }
  if (eigenvectors) {
    for (int64_t i = 0; i < T; ++i) {
      for (int64_t j = 0; j < T; ++j) {
        v[i * T + j] = splat(i == j ? 1.0 : 0.0);
      }
    }
  }
  const bool vectors = eigenvectors != nullptr;
  switch (T) {
    case 1:
      break;
    case 2:
      jacobi_lanes<2>(a, v, T, vectors);
      break;
    case 3:
      jacobi_lanes<3>(a, v, T, vectors);
      break;
    case 4:
      jacobi_lanes<4>(a, v, T, vectors);
      break;
    default:
      jacobi_lanes<0>(a, v, T, vectors);
  }
  for (int64_t l = 0; l < count; ++l) {
    int32_t order[32];
    for (int64_t i = 0; i < T; ++i) { // insertion sort: almost sorted input is common
      const double x = a[i * T + i][l];
      int64_t j = i;
      for (; j > 0 && a[order[j - 1] * T + order[j - 1]][l] > x; --j) {
        order[j] = order[j - 1];
      }
      order[j] = int32_t(i);
    }
    double* lam = eigenvalues + l * T;
    for (int64_t j = 0; j < T; ++j) {
      lam[j] = a[order[j] * T + order[j]][l] * scale[l];
    }
    if (eigenvectors) {
      double* out = eigenvectors + l * T * T;
      const double poison = scale[l] * 0.0;
      for (int64_t j = 0; j < T; ++j) {
        const double* from = reinterpret_cast<const double*>(v + order[j] * T) + l;
        for (int64_t i = 0; i < T; ++i) {
          out[i * T + j] = from[i * kWidth] + poison;
        }
      }
    }
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
  exponent += exponent % 2; // its root is a power of two as well
  const double down = std::ldexp(1.0, -exponent), up = std::ldexp(1.0, exponent / 2);
  for (int64_t i = 0; i < T; ++i) {
    left[i] = A[i * T + i] * down;
    eigenvalues[i] = 0.0;
  }
  // Rows that depend on the pivots so far to rounding are done with: what is left of them is noise.
  const double noise = 4.0 * kEps;
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
  const double tolerance = kEps * (4.0 + std::sqrt(double(T))); // dot products round
  const int64_t players = rank + rank % 2;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool rotated = false;
    for (int64_t j = 0; j < rank; ++j) {
      norms[j] = dot(X + j * ld, X + j * ld, ld);
    }
    for (int64_t round = 0; round < players - 1; ++round) {
      for (int64_t k = 0; k < players / 2; ++k) {
        int64_t p, q;
        pairing(players, round, k, p, q);
        if (q >= rank) {
          continue;
        }
        double *x = X + p * ld, *y = X + q * ld;
        const double b = dot(x, y, ld), a = norms[p], d = norms[q];
        if (std::fabs(b) <= tolerance * std::sqrt(a) * std::sqrt(d)) {
          continue;
        }
        rotated = true;
        const double h = d - a, r = std::sqrt(h * h + 4.0 * b * b);
        const double t = 2.0 * (h < 0.0 ? -b : b) / (std::fabs(h) + std::max(r, 2.0 * std::fabs(b)));
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = t * c;
        norms[p] = std::max(a - t * b, 0.0);
        norms[q] = d + t * b;
        const Vd vc = splat(c), vs = splat(s);
        for (int64_t i = 0; i < ld; i += kWidth) {
          const Vd u = read<Vd>(x + i), v = read<Vd>(y + i);
          write(x + i, vc * u - vs * v);
          write(y + i, vs * u + vc * v);
        }
      }
    }
    if (!rotated) {
      break;
    }
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
