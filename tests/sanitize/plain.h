// What the kernels are checked against: the definitions, in plain loops over float64, one element after the other. Not
// instrumented: they are the better part of the work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "gradients.h"

#define FASTMTL_PLAIN __attribute__((no_sanitize("address", "undefined", "thread"), noinline))
#if defined(__clang__)
#define FASTMTL_FAST FASTMTL_PLAIN
#else
#define FASTMTL_FAST __attribute__((no_sanitize("address", "undefined", "thread"), noinline, optimize("O3")))
#endif

namespace plain {

using fastmtl::Dtype;

FASTMTL_PLAIN inline double read(const void* from, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<const float*>(from)[i];
    case Dtype::f64:
      return static_cast<const double*>(from)[i];
    case Dtype::f16:
      return double(static_cast<const _Float16*>(from)[i]);
    case Dtype::bf16:
      break;
  }
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FASTMTL_PLAIN inline void write(void* to, Dtype dtype, int64_t i, double x) { // bfloat16 towards zero
  const float single = float(x);
  uint32_t bits;
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(to)[i] = single;
      return;
    case Dtype::f64:
      static_cast<double*>(to)[i] = x;
      return;
    case Dtype::f16:
      static_cast<_Float16*>(to)[i] = _Float16(single);
      return;
    case Dtype::bf16:
      std::memcpy(&bits, &single, sizeof bits);
      static_cast<uint16_t*>(to)[i] = uint16_t((bits >> 16) | (x != x ? 0x40 : 0));
      return;
  }
}

inline double epsilon(Dtype dtype) { // of rounding to it, relative
  return dtype == Dtype::f64 ? 0x1p-52 : dtype == Dtype::f32 ? 0x1p-23 : dtype == Dtype::f16 ? 0x1p-10 : 0x1p-7;
}

inline double smallest(Dtype dtype) { // subnormal
  return dtype == Dtype::f64 ? 0x1p-1074 : dtype == Dtype::f32 ? 0x1p-149 : dtype == Dtype::f16 ? 0x1p-24 : 0x1p-133;
}

inline double largest(Dtype dtype) {
  return dtype == Dtype::f64 ? 0x1.fffffffffffffp1023 : dtype == Dtype::f16 ? 65504.0 : 0x1.fep127;
}

// M += G Gᵀ and S += |G| |G|ᵀ, rows [T] -> [n], null where there is none: column by column, which the compiler can
// vectorise without another order of the sums.
FASTMTL_FAST inline void gram(const double* const* rows, int64_t T, int64_t n, double* M, double* S) {
  std::vector<int64_t> present;
  for (int64_t t = 0; t < T; ++t) {
    if (rows[t]) {
      present.push_back(t);
    }
  }
  const int64_t R = int64_t(present.size());
  std::vector<double> column(static_cast<size_t>(R)), sums(static_cast<size_t>(R * R)),
      sizes(static_cast<size_t>(R * R));
  double* const x = column.data();
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t r = 0; r < R; ++r) {
      x[r] = rows[present[size_t(r)]][k];
    }
    for (int64_t i = 0; i < R; ++i) {
      const double a = x[i];
      double *const sum = sums.data() + i * R, *const size = sizes.data() + i * R;
#pragma GCC ivdep
      for (int64_t j = i; j < R; ++j) {
        sum[j] += a * x[j];
        size[j] += __builtin_fabs(a * x[j]);
      }
    }
  }
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) {
      const size_t from = size_t(i < j ? i * R + j : j * R + i),
                   to = size_t(present[size_t(i)] * T + present[size_t(j)]);
      M[to] += sums[from];
      S[to] += sizes[from];
    }
  }
}

// Eigenvalues, ascending, and eigenvectors, one a row, by cyclic Jacobi.
FASTMTL_FAST inline void eigh(const double* M, int64_t T, double* eigenvalues, double* V) {
  double* A = new double[size_t(T * T)];
  std::memcpy(A, M, size_t(T * T) * sizeof(double));
  for (int64_t i = 0; i < T * T; ++i) {
    V[i] = i % (T + 1) == 0 ? 1.0 : 0.0;
  }
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < 60; ++sweep) {
    rotated = false;
    for (int64_t p = 0; p < T; ++p) {
      for (int64_t q = p + 1; q < T; ++q) {
        const double b = A[p * T + q], scale = std::sqrt(std::fabs(A[p * T + p] * A[q * T + q]));
        if (!(std::fabs(b) > 0x1p-50 * scale) || std::fabs(b) < 1e-280) {
          continue;
        }
        rotated = true;
        const double h = (A[q * T + q] - A[p * T + p]) / (2.0 * b);
        const double t = (h < 0.0 ? -1.0 : 1.0) / (std::fabs(h) + std::sqrt(1.0 + h * h));
        const double c = 1.0 / std::sqrt(1.0 + t * t), s = t * c;
        for (int64_t k = 0; k < T; ++k) {
          const double x = A[k * T + p], y = A[k * T + q];
          A[k * T + p] = c * x - s * y;
          A[k * T + q] = s * x + c * y;
        }
        for (int64_t k = 0; k < T; ++k) {
          const double x = A[p * T + k], y = A[q * T + k];
          A[p * T + k] = c * x - s * y;
          A[q * T + k] = s * x + c * y;
          const double u = V[p * T + k], v = V[q * T + k];
          V[p * T + k] = c * u - s * v;
          V[q * T + k] = s * u + c * v;
        }
      }
    }
  }
  for (int64_t i = 0; i < T; ++i) {
    eigenvalues[i] = A[i * T + i];
  }
  delete[] A;
  for (int64_t i = 0; i < T; ++i) { // selection sort
    int64_t least = i;
    for (int64_t j = i + 1; j < T; ++j) {
      least = eigenvalues[j] < eigenvalues[least] ? j : least;
    }
    const double kept = eigenvalues[i];
    eigenvalues[i] = eigenvalues[least];
    eigenvalues[least] = kept;
    for (int64_t k = 0; k < T; ++k) {
      const double x = V[i * T + k];
      V[i * T + k] = V[least * T + k];
      V[least * T + k] = x;
    }
  }
}

// y = M x
FASTMTL_PLAIN inline std::vector<double> product(const double* M, int64_t T, const double* x) {
  std::vector<double> y(static_cast<size_t>(T));
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j < T; ++j) {
      y[size_t(i)] += M[i * T + j] * x[j];
    }
  }
  return y;
}

} // namespace plain
