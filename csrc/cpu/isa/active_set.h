// Inner loops of csrc/cpu/projections.cpp: C_S + δ = Uᵀ U for the rows and columns S of a symmetric C, solves with it,
// and products with C's rows. Left-looking, in tiles of four rows: n³ / 3 flops for n columns, and those before the
// first that changed are kept. Every sum runs over the rows in order, whatever columns are computed with it.
#pragma once

namespace fastmtl::cpu {
namespace {

constexpr int64_t kSetRows = 4;
constexpr int64_t kSetVectors = 2;
constexpr int64_t kSetColumns = kSetVectors * kWidth;
static_assert(kSetColumns <= kSetPadding && kSetPadding % kSetColumns == 0, "what the callers allocate");

// A tile of `rows` rows from i0 on, columns j and on, less what the rows above take.
FASTMTL_INLINE void set_tile(
    const double* C,
    int64_t T,
    const int64_t* set,
    int64_t i0,
    int64_t rows,
    int64_t j,
    int64_t width,
    double* U,
    int64_t stride) {
  double tile[kSetRows][kSetColumns] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const double* c = C + set[i0 + r] * T;
    for (int64_t k = 0; k < width; ++k) {
      tile[r][k] = c[set[j + k]];
    }
  }
  Vd s[kSetRows][kSetVectors];
#pragma GCC unroll 4
  for (int64_t r = 0; r < kSetRows; ++r) {
#pragma GCC unroll 2
    for (int64_t u = 0; u < kSetVectors; ++u) {
      s[r][u] = read<Vd>(&tile[r][u * kWidth]);
    }
  }
  const double *p = U + i0, *q = U + j;
  for (int64_t k = 0; k < i0; ++k, p += stride, q += stride) {
    Vd b[kSetVectors];
#pragma GCC unroll 2
    for (int64_t u = 0; u < kSetVectors; ++u) {
      b[u] = read<Vd>(q + u * kWidth);
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < kSetRows; ++r) {
      const Vd a = splat(p[r]);
#pragma GCC unroll 2
      for (int64_t u = 0; u < kSetVectors; ++u) {
        s[r][u] -= a * b[u];
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t u = 0; u < kSetVectors; ++u) {
      write(U + (i0 + r) * stride + j + u * kWidth, s[r][u]);
    }
  }
}

// The diagonal block of `rows` rows, whose first pivot is the i0-th; false where one is too small.
FASTMTL_INLINE bool
set_diagonal(int64_t i0, int64_t rows, double delta, double least, double* U, int64_t stride, double* inverse) {
  for (int64_t i = i0; i < i0 + rows; ++i) {
    double* u = U + i * stride;
    for (int64_t k = i0; k < i; ++k) {
      const double* above = U + k * stride;
      for (int64_t j = i; j < i0 + rows; ++j) {
        u[j] -= above[i] * above[j];
      }
    }
    const double pivot = u[i] + delta;
    if (!(pivot > least * double(i + 2))) {
      return false;
    }
    u[i] = __builtin_sqrt(pivot);
    inverse[i] = 1.0 / u[i];
    for (int64_t j = i + 1; j < i0 + rows; ++j) {
      u[j] *= inverse[i];
    }
  }
  return true;
}

// Columns from ... n - 1 of U; false where a pivot i is at most `least` (i + 2). Columns n ... of the last tile are
// overwritten.
bool set_factor(
    const double* C, // [T, T]
    int64_t T,
    const int64_t* set, // S [n]
    int64_t from,
    int64_t n,
    double delta,
    double least,
    double* U, // [n, stride], upper triangle
    int64_t stride,
    double* inverse) { // [n], of the diagonal
  for (int64_t i0 = 0; i0 < n; i0 += kSetRows) {
    const int64_t rows = n - i0 < kSetRows ? n - i0 : kSetRows;
    const int64_t first = i0 > from / kSetRows * kSetRows ? i0 : from / kSetRows * kSetRows;
    for (int64_t j = first; j < n; j += kSetColumns) {
      set_tile(C, T, set, i0, rows, j, n - j < kSetColumns ? n - j : kSetColumns, U, stride);
    }
    if (i0 >= first && !set_diagonal(i0, rows, delta, least, U, stride, inverse)) {
      return false;
    }
    if (rows < kSetRows) {
      return true;
    }
    // What the diagonal block does to the rest of its rows, which are padded.
    double *u0 = U + i0 * stride, *u1 = u0 + stride, *u2 = u1 + stride, *u3 = u2 + stride;
    const double v0 = inverse[i0], v1 = inverse[i0 + 1], v2 = inverse[i0 + 2], v3 = inverse[i0 + 3];
    const double l10 = u0[i0 + 1], l20 = u0[i0 + 2], l21 = u1[i0 + 2], l30 = u0[i0 + 3], l31 = u1[i0 + 3],
                 l32 = u2[i0 + 3];
    for (int64_t j = first > i0 ? first : i0 + kSetRows; j < n; j += kWidth) {
      const Vd x0 = read<Vd>(u0 + j) * v0;
      const Vd x1 = (read<Vd>(u1 + j) - l10 * x0) * v1;
      const Vd x2 = (read<Vd>(u2 + j) - l20 * x0 - l21 * x1) * v2;
      write(u0 + j, x0);
      write(u1 + j, x1);
      write(u2 + j, x2);
      write(u3 + j, (read<Vd>(u3 + j) - l30 * x0 - l31 * x1 - l32 * x2) * v3);
    }
  }
  return true;
}

// y <- (Uᵀ U)^-1 y
void set_solve(const double* U, int64_t n, int64_t stride, const double* inverse, double* y) { // y [n]
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const double *r0 = U + i * stride, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    const double a0 = y[i] * inverse[i], a1 = (y[i + 1] - a0 * r0[i + 1]) * inverse[i + 1],
                 a2 = (y[i + 2] - a0 * r0[i + 2] - a1 * r1[i + 2]) * inverse[i + 2],
                 a3 = (y[i + 3] - a0 * r0[i + 3] - a1 * r1[i + 3] - a2 * r2[i + 3]) * inverse[i + 3];
    y[i] = a0;
    y[i + 1] = a1;
    y[i + 2] = a2;
    y[i + 3] = a3;
    int64_t j = i + 4;
    for (; j + kWidth <= n; j += kWidth) {
      write(
          y + j,
          read<Vd>(y + j) -
              ((a0 * read<Vd>(r0 + j) + a1 * read<Vd>(r1 + j)) + (a2 * read<Vd>(r2 + j) + a3 * read<Vd>(r3 + j))));
    }
    for (; j < n; ++j) {
      y[j] -= (a0 * r0[j] + a1 * r1[j]) + (a2 * r2[j] + a3 * r3[j]);
    }
  }
  const int64_t tail = i;
  for (; i < n; ++i) {
    const double* r = U + i * stride;
    const double a = y[i] *= inverse[i];
    for (int64_t j = i + 1; j < n; ++j) {
      y[j] -= a * r[j];
    }
  }
  for (i = n - 1; i >= tail; --i) {
    const double* r = U + i * stride;
    double a = y[i];
    for (int64_t j = i + 1; j < n; ++j) {
      a -= r[j] * y[j];
    }
    y[i] = a * inverse[i];
  }
  for (i = tail - 4; i >= 0; i -= 4) {
    const double *r0 = U + i * stride, *r1 = r0 + stride, *r2 = r1 + stride;
    double s[4];
    row_group<4>(r0 + i + 4, stride, y + i + 4, n - i - 4, s);
    y[i + 3] = (y[i + 3] - s[3]) * inverse[i + 3];
    y[i + 2] = (y[i + 2] - s[2] - r2[i + 3] * y[i + 3]) * inverse[i + 2];
    y[i + 1] = (y[i + 1] - s[1] - r1[i + 2] * y[i + 2] - r1[i + 3] * y[i + 3]) * inverse[i + 1];
    y[i] = (y[i] - s[0] - r0[i + 1] * y[i + 1] - r0[i + 2] * y[i + 2] - r0[i + 3] * y[i + 3]) * inverse[i];
  }
}

// out += Σ_k y_k C_{S_k}: rows of C, eight at a time.
void set_products(const double* C, int64_t T, const int64_t* set, int64_t n, const double* y, double* out) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    const double* row[8];
    Vd a[8];
#pragma GCC unroll 8
    for (int64_t r = 0; r < 8; ++r) {
      row[r] = C + set[k + r] * T;
      a[r] = splat(y[k + r]);
    }
    int64_t j = 0;
    for (; j + kWidth <= T; j += kWidth) {
      Vd even = read<Vd>(out + j), odd{};
#pragma GCC unroll 4
      for (int64_t r = 0; r < 8; r += 2) {
        even += a[r] * read<Vd>(row[r] + j);
        odd += a[r + 1] * read<Vd>(row[r + 1] + j);
      }
      write(out + j, even + odd);
    }
    for (; j < T; ++j) {
      double even = out[j], odd = 0.0;
      for (int64_t r = 0; r < 8; r += 2) {
        even += y[k + r] * row[r][j];
        odd += y[k + r + 1] * row[r + 1][j];
      }
      out[j] = even + odd;
    }
  }
  for (; k < n; ++k) {
    const double* row = C + set[k] * T;
    const Vd a = splat(y[k]);
    int64_t j = 0;
    for (; j + kWidth <= T; j += kWidth) {
      write(out + j, read<Vd>(out + j) + a * read<Vd>(row + j));
    }
    for (; j < T; ++j) {
      out[j] += y[k] * row[j];
    }
  }
}

} // namespace
} // namespace fastmtl::cpu
