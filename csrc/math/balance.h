// From the spectrum of a Gram matrix to task weights: rank rule, scale and α. Torch-free, for host and device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTMTL_HOST_DEVICE __host__ __device__
#else
#define FASTMTL_HOST_DEVICE
#endif

namespace fastmtl {

enum class Scale { min, median, rmse };
enum class RankRule { normalized, gram };

struct Policy {
  const double* weights; // [T], or null for 1/T each
  Scale scale;
  RankRule rank_rule;
  double rtol; // singular values at most rtol times the largest are dropped
  double zero; // rows whose norm is at most `zero` times the largest are rounding noise
};

// Eigenpairs in descending order; vector j has components vectors[j * next_vector + i * next_component], any length.
struct Spectrum {
  const double* eigenvalues; // [T]
  const double* vectors;
  int64_t next_vector;
  int64_t next_component;
};

// How many eigenvalues (descending) the cut keeps.
FASTMTL_HOST_DEVICE inline int64_t kept(const double* eigenvalues, int64_t T, double rtol) {
  const double cut = eigenvalues[0] * rtol * rtol;
  int64_t rank = 0;
  while (rank < T && eigenvalues[rank] > cut && eigenvalues[rank] > 0.0) {
    ++rank;
  }
  return rank;
}

// Whether the spectrum of M alone proves that all T rows are independent, whatever their norms:
// λ_min(C) >= λ_min(M) / max D and λ_max(C) <= T for C = D^-1/2 M D^-1/2.
FASTMTL_HOST_DEVICE inline bool proves_full_rank(double smallest, double largest_diagonal, int64_t T, double rtol) {
  return smallest > largest_diagonal * double(T) * rtol * rtol;
}

// C = D^-1/2 M D^-1/2, rows of noise becoming zero.
inline void normalize_rows(const double* M, int64_t T, double zero, double* C) {
  double largest = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    largest = M[i * T + i] > largest ? M[i * T + i] : largest;
  }
  const double floor = zero * std::sqrt(largest);
  double* last = C + (T - 1) * T; // the inverse norms, until that row's turn comes
  for (int64_t i = 0; i < T; ++i) {
    const double norm = std::sqrt(M[i * T + i] > 0.0 ? M[i * T + i] : 0.0);
    last[i] = norm > floor ? 1.0 / norm : 0.0;
  }
  for (int64_t i = 0; i < T; ++i) {
    const double inverse = last[i];
    for (int64_t j = 0; j < T; ++j) {
      C[i * T + j] = M[i * T + j] * inverse * last[j];
    }
  }
}

// s, from the kept ones of descending eigenvalues; rank >= 1.
FASTMTL_HOST_DEVICE inline double squared_scale(const double* eigenvalues, int64_t rank, Scale scale) {
  if (scale == Scale::min) {
    return eigenvalues[rank - 1];
  }
  if (scale == Scale::median) { // the lower one of an even number
    return eigenvalues[rank / 2];
  }
  double mean = 0.0;
  for (int64_t j = 0; j < rank; ++j) {
    mean += eigenvalues[j] / double(rank);
  }
  return mean;
}

// α = sqrt(s) Σ_{j < rank} λ_j^-1/2 v_j (v_jᵀ w)
inline void task_weights(const Spectrum& spectrum, int64_t rank, int64_t T, const Policy& policy, double* alpha) {
  for (int64_t i = 0; i < T; ++i) {
    alpha[i] = 0.0;
  }
  if (rank == 0) {
    return;
  }
  const double* lam = spectrum.eigenvalues;
  const double s = squared_scale(lam, rank, policy.scale);
  for (int64_t j = 0; j < rank; ++j) {
    const double* v = spectrum.vectors + j * spectrum.next_vector;
    double along = 0.0, square = 0.0;
    for (int64_t i = 0; i < T; ++i) {
      const double x = v[i * spectrum.next_component];
      along += x * (policy.weights ? policy.weights[i] : 1.0 / double(T));
      square += x * x;
    }
    const double factor = std::sqrt(s / lam[j]) * along / square;
    for (int64_t i = 0; i < T; ++i) {
      alpha[i] += factor * v[i * spectrum.next_component];
    }
  }
}

} // namespace fastmtl
