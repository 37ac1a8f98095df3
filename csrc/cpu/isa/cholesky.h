// The Cholesky factor of a shifted Gram matrix, M - s I = L Lᵀ, panel by panel, and solves with it.
//
// Left-looking: the columns of a panel are A - L_left Pᵀ, P the panel's own rows of L_left, times the inverse of the
// panel's diagonal block: T³ / 6 multiply-adds in all, in tiles of kTile rows times a panel, as in a matrix product. P
// is transposed into a buffer that stays in the second-level cache; each panel reads what is left of it once, T³ / (6
// kCholeskyPanel) doubles in all. Every sum runs over the columns in order, so that it does not depend on who computes
// it.
//
// A solve reads L twice: T² / 2 multiply-adds and 4 T² bytes each.
#pragma once

namespace fastmtl::cpu {
namespace {

constexpr int kTileWidth = int(kTile * kWidth);                 // columns of one tile
constexpr int kTileGroups = (40 + kTileWidth - 1) / kTileWidth; // that make a panel
static_assert(kTileWidth % kWidth == 0 && kTileGroups * kTileWidth <= kMaxCholeskyPanel, "what the callers allocate");
constexpr int64_t kCholeskyPanel = kTileGroups * kTileWidth;
constexpr int64_t kCholeskyColumns = 96; // of a panel at once: 30 KB

// out = base - X P for R rows, or X P where there is no base.
template <int R>
void panel_product(
    const double* x, // X [R, n], rows `stride` apart
    int64_t stride,
    int64_t n,
    const double* P,    // [n, kCholeskyPanel]
    const double* base, // [R, width], rows `base_stride` apart, or null
    int64_t base_stride,
    double* out, // [R, width], rows `out_stride` apart
    int64_t out_stride,
    int64_t width) {
  for (int g = 0; g < kTileGroups && g * kTileWidth < width; ++g) {
    Vd s[R * kTile];
#pragma GCC unroll 32
    for (int i = 0; i < R * kTile; ++i) {
      s[i] = Vd{};
    }
    const double* p = P + g * kTileWidth;
    for (int64_t k = 0; k < n; ++k, p += kCholeskyPanel) {
      if (k % 8 == 0) { // the rows that come next: their stretches are too short for the hardware to foresee
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          __builtin_prefetch(x + (R + r) * stride + k);
        }
      }
      Vd y[kTile];
#pragma GCC unroll 8
      for (int c = 0; c < kTile; ++c) {
        y[c] = read<Vd>(p + c * kWidth);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vd a = splat(x[r * stride + k]);
#pragma GCC unroll 8
        for (int c = 0; c < kTile; ++c) {
          s[r * kTile + c] += a * y[c];
        }
      }
    }
    const int64_t from = g * kTileWidth, count = width - from < kTileWidth ? width - from : kTileWidth;
    if (count == kTileWidth) {
#pragma GCC unroll 32
      for (int i = 0; i < R * kTile; ++i) {
        const int64_t r = i / kTile, c = from + i % kTile * kWidth;
        write(out + r * out_stride + c, base ? read<Vd>(base + r * base_stride + c) - s[i] : s[i]);
      }
      continue;
    }
    double sums[R * kTileWidth];
#pragma GCC unroll 32
    for (int i = 0; i < R * kTile; ++i) {
      write(sums + i * kWidth, s[i]);
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t c = 0; c < count; ++c) {
        const double sum = sums[r * kTileWidth + c];
        out[r * out_stride + from + c] = base ? base[r * base_stride + from + c] - sum : sum;
      }
    }
  }
}

void panel_product(
    int64_t rows,
    const double* x,
    int64_t stride,
    int64_t n,
    const double* P,
    const double* base,
    int64_t base_stride,
    double* out,
    int64_t out_stride,
    int64_t width) {
  with_height(rows, [&](auto R) __attribute__((always_inline)) {
    panel_product<R>(x, stride, n, P, base, base_stride, out, out_stride, width);
  });
}

// Rows [kCholeskyPanel] of a panel, from the vector that holds column `from` on.
void scale_row(double* row, double factor, int64_t from) {
  for (int64_t k = from / kWidth * kWidth; k < kCholeskyPanel; k += kWidth) {
    write(row + k, factor * read<Vd>(row + k));
  }
}
void subtract_row(double* row, double factor, const double* other, int64_t from) {
  for (int64_t k = from / kWidth * kWidth; k < kCholeskyPanel; k += kWidth) {
    write(row + k, read<Vd>(row + k) - factor * read<Vd>(other + k));
  }
}

// The diagonal block of the panel of columns [j, j + width) and its inverse; `panel` becomes its rows, transposed, for
// `cholesky_below`. False where M - s I is not positive definite.
bool cholesky_diagonal(
    const double* M, // [T, T]
    int64_t T,
    double shift,
    double* L, // [T, stride], lower triangle
    int64_t stride,
    int64_t j,
    double* panel,     // [j, kCholeskyPanel]
    double* inverse) { // [kCholeskyPanel, kCholeskyPanel]: of the block, transposed
  const int64_t width = T - j < kCholeskyPanel ? T - j : kCholeskyPanel;
  for (int64_t c = 0; c < kCholeskyPanel; c += kWidth) {
    for (int64_t k = 0; k < j; k += kWidth) { // j is a multiple of kCholeskyPanel, and that of kWidth
      Vd v[kWidth];
#pragma GCC unroll 8
      for (int64_t r = 0; r < kWidth; ++r) {
        v[r] = c + r < width ? read<Vd>(L + (j + c + r) * stride + k) : Vd{};
      }
      transpose<double>(v);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kWidth; ++i) {
        write(panel + (k + i) * kCholeskyPanel + c, v[i]);
      }
    }
  }
  for (int64_t r = 0; r < width; r += kTile) {
    const int64_t height = width - r < kTile ? width - r : kTile;
    double* at = L + (j + r) * stride;
    panel_product(height, at, stride, j, panel, M + (j + r) * T + j, T, at + j, stride, width);
  }
  // Right-looking, on whole rows: U with Uᵀ U = the block, and U⁻¹ = the inverse of L transposed beside it.
  alignas(64) double U[kCholeskyPanel * kCholeskyPanel];
  for (int64_t r = 0; r < width; ++r) {
    for (int64_t c = 0; c < kCholeskyPanel; ++c) {
      U[r * kCholeskyPanel + c] = c < r || c >= width ? 0.0 : L[(j + c) * stride + j + r];
    }
    U[r * kCholeskyPanel + r] -= shift;
  }
  for (int64_t r = 0; r < width; ++r) {
    double* pivot = U + r * kCholeskyPanel;
    if (!(pivot[r] > 0.0)) {
      return false;
    }
    scale_row(pivot, 1.0 / __builtin_sqrt(pivot[r]), r);
    for (int64_t i = r + 1; i < width; ++i) {
      subtract_row(U + i * kCholeskyPanel, pivot[i], pivot, i);
    }
  }
  for (int64_t r = 0; r < width; ++r) {
    for (int64_t c = 0; c <= r; ++c) {
      L[(j + r) * stride + j + c] = U[c * kCholeskyPanel + r];
    }
  }
  // U X = 1, from the last row up.
  for (int64_t i = 0; i < kCholeskyPanel * kCholeskyPanel; ++i) {
    inverse[i] = 0.0;
  }
  for (int64_t r = width - 1; r >= 0; --r) {
    double* x = inverse + r * kCholeskyPanel;
    x[r] = 1.0;
    for (int64_t i = r + 1; i < width; ++i) {
      subtract_row(x, U[r * kCholeskyPanel + i], inverse + i * kCholeskyPanel, i);
    }
    scale_row(x, 1.0 / U[r * kCholeskyPanel + r], r);
  }
  return true;
}

// Rows [begin, end) of the same panel, below its diagonal block.
void cholesky_below(
    const double* M, // [T, T]
    int64_t T,
    double* L, // [T, stride]
    int64_t stride,
    int64_t j,
    const double* panel,   // [j, kCholeskyPanel]
    const double* inverse, // [kCholeskyPanel, kCholeskyPanel]
    int64_t begin,
    int64_t end) {
  const auto each = [&](auto&& f) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; i += kTile) {
      f(L + i * stride, end - i < kTile ? end - i : kTile, M + i * T + j);
    }
  };
  // A stretch of the panel stays in the first-level cache while all rows pass.
  for (int64_t k = 0; k < j; k += kCholeskyColumns) {
    const int64_t n = j - k < kCholeskyColumns ? j - k : kCholeskyColumns;
    each([&](double* row, int64_t height, const double* base) __attribute__((always_inline)) {
      panel_product(
          height,
          row + k,
          stride,
          n,
          panel + k * kCholeskyPanel,
          k ? row + j : base,
          k ? stride : T,
          row + j,
          stride,
          kCholeskyPanel);
    });
  }
  each([&](double* row, int64_t height, const double* base) __attribute__((always_inline)) {
    double difference[kTile * kCholeskyPanel];
    for (int64_t r = 0; r < height; ++r) {
      __builtin_memcpy(
          difference + r * kCholeskyPanel, j ? row + r * stride + j : base + r * T, kCholeskyPanel * sizeof(double));
    }
    panel_product(
        height, difference, kCholeskyPanel, kCholeskyPanel, inverse, nullptr, 0, row + j, stride, kCholeskyPanel);
  });
}

// out -= X P, a stretch of columns of X at a time: that of P stays in the first-level cache while all rows pass.
void subtract_panel(
    const double* X, // [rows, stride]
    int64_t stride,
    int64_t first,
    int64_t last,
    const double* P, // [last - first, kCholeskyPanel]
    bool upper,
    int64_t begin,
    int64_t end,
    double* out, // [rows, out_stride]
    int64_t out_stride,
    int64_t width) {
  for (int64_t k = first; k < last; k += kCholeskyColumns) {
    const int64_t stop = last - k < kCholeskyColumns ? last : k + kCholeskyColumns;
    for (int64_t i = begin; i < end && !(upper && i >= stop); i += kTile) {
      const int64_t from = upper && i > k ? i : k;
      double* to = out + i * out_stride;
      panel_product(
          end - i < kTile ? end - i : kTile,
          X + i * stride + from,
          stride,
          stop - from,
          P + (from - first) * kCholeskyPanel,
          to,
          out_stride,
          to,
          out_stride,
          width);
    }
  }
}

// y_r = a_r · x for R rows.
template <int R>
FASTMTL_INLINE void row_group(const double* a, int64_t stride, const double* x, int64_t n, double* y) {
  Vd s[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    s[r] = Vd{};
  }
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    const Vd v = read<Vd>(x + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      s[r] += read<Vd>(a + r * stride + k) * v;
    }
  }
  for (int r = 0; r < R; ++r) {
    y[r] = sum(s[r]);
    for (int64_t l = k; l < n; ++l) {
      y[r] += a[r * stride + l] * x[l];
    }
  }
}

void row_products(
    const double* A, // [rows, stride]
    int64_t stride,
    const double* x, // [n]
    int64_t n,
    int64_t begin,
    int64_t end,
    double* y) { // [rows]
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    row_group<4>(A + i * stride, stride, x, n, y + i);
  }
  for (; i < end; ++i) {
    row_group<1>(A + i * stride, stride, x, n, y + i);
  }
}

// The symmetric product y = M x, from rows [begin, end) of the upper triangle: every element is read once and used
// twice.
void symmetric_rows(
    const double* M, // [T, T]
    int64_t T,
    const double* x, // [T]
    int64_t begin,
    int64_t end,
    double* y) { // [T], overwritten
  constexpr int kRows = 4;
  for (int64_t k = begin; k < T; ++k) {
    y[k] = 0.0;
  }
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) {
    const double* a = M + i * T;
    Vd s[kRows], weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      s[r] = Vd{};
      weight[r] = splat(x[i + r]);
    }
    int64_t k = i + kRows;
    for (; k + kWidth <= T; k += kWidth) {
      const Vd v = read<Vd>(x + k);
      Vd to = read<Vd>(y + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vd m = read<Vd>(a + r * T + k);
        s[r] += m * v;
        to += m * weight[r];
      }
      write(y + k, to);
    }
    for (int r = 0; r < kRows; ++r) {
      double total = sum(s[r]) + a[r * T + i + r] * x[i + r];
      for (int64_t l = i + r + 1; l < i + kRows; ++l) {
        total += a[r * T + l] * x[l];
        y[l] += a[r * T + l] * x[i + r];
      }
      for (int64_t l = k; l < T; ++l) {
        total += a[r * T + l] * x[l];
        y[l] += a[r * T + l] * x[i + r];
      }
      y[i + r] += total;
    }
  }
  for (; i < end; ++i) {
    const double* a = M + i * T;
    double total = a[i] * x[i];
    for (int64_t l = i + 1; l < T; ++l) {
      total += a[l] * x[l];
      y[l] += a[l] * x[i];
    }
    y[i] += total;
  }
}

// y += Σ_r x_r a_r over R rows.
template <int R>
FASTMTL_INLINE void add_group(const double* a, int64_t stride, const double* x, int64_t n, double* y) {
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    Vd s = read<Vd>(y + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      s += splat(x[r]) * read<Vd>(a + r * stride + k);
    }
    write(y + k, s);
  }
  for (; k < n; ++k) {
    for (int r = 0; r < R; ++r) {
      y[k] += x[r] * a[r * stride + k];
    }
  }
}

void add_rows(
    const double* A, // [rows, stride]
    int64_t stride,
    const double* x, // [rows]
    int64_t rows,
    int64_t n,
    double* y) { // [n]
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    add_group<8>(A + i * stride, stride, x + i, n, y);
  }
  for (; i < rows; ++i) {
    add_group<1>(A + i * stride, stride, x + i, n, y);
  }
}

// x = (L Lᵀ)⁻¹ x
void cholesky_solve(
    const double* L, // [T, stride]
    int64_t T,
    int64_t stride,
    const double* inverses, // [panels, kCholeskyPanel, kCholeskyPanel]
    double* x) {            // [T]
  double left[kCholeskyPanel], right[kCholeskyPanel];
  for (int64_t j = 0; j < T; j += kCholeskyPanel) {
    const int64_t width = T - j < kCholeskyPanel ? T - j : kCholeskyPanel;
    row_products(L + j * stride, stride, x, j, 0, width, left);
    for (int64_t c = 0; c < width; ++c) {
      left[c] = x[j + c] - left[c];
      right[c] = 0.0;
    }
    add_rows(inverses + j * kCholeskyPanel, kCholeskyPanel, left, width, width, right);
    __builtin_memcpy(x + j, right, size_t(width) * sizeof(double));
  }
  for (int64_t j = (T - 1) / kCholeskyPanel * kCholeskyPanel; j >= 0; j -= kCholeskyPanel) {
    const int64_t width = T - j < kCholeskyPanel ? T - j : kCholeskyPanel;
    row_products(inverses + j * kCholeskyPanel, kCholeskyPanel, x + j, width, 0, width, right);
    for (int64_t c = 0; c < width; ++c) {
      x[j + c] = right[c];
      left[c] = -right[c];
    }
    add_rows(L + j * stride, stride, left, width, j, x);
  }
}

} // namespace
} // namespace fastmtl::cpu
