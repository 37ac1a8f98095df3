// The inner loops of csrc/cpu/tridiagonal.h: products with a symmetric matrix of tiles, its update, and rotations.
//
// A tile is kSide x kSide, row-major, eight cache lines. Row panel q of the lower triangle holds its q + 1 tiles one
// after the other, the last one with both of its triangles: there are no ragged ends, and a walk over the triangle is
// one stream of addresses.
//
// Columns of the reduction's panel are kept in blocks of kSide rows: block b holds v_0, w_0, v_1, w_1, ... of rows
// 8 b ... 8 b + 7, one vector of eight after the other, so that each loop below reads a block from front to back.
#pragma once

namespace fastmtl::cpu {
namespace {

constexpr int64_t kTileSize = kSide * kSide;
constexpr int64_t kTileVectors = kSide / kWidth; // in a row of a tile
#if FASTMTL_VECTOR_BYTES == 64
constexpr int64_t kRowsAtOnce = 8; // of a tile times a vector: 8 + 8 vectors stay in the 32 registers
constexpr int64_t kUpdateRows = 8; // of the update: 8 x 3 sums, 3 + 1 operands
constexpr int64_t kUpdateTiles = 3;
#elif FASTMTL_VECTOR_BYTES == 32
constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kUpdateRows = 4; // 4 x 2 sums, 2 + 1 operands
constexpr int64_t kUpdateTiles = 1;
#else
constexpr int64_t kRowsAtOnce = 2;
constexpr int64_t kUpdateRows = 2; // 2 x 4 sums, 4 + 1 operands
constexpr int64_t kUpdateTiles = 1;
#endif
constexpr int64_t kPrefetchTiles = 16; // ahead, in a walk that waits for the third-level cache

// out[r] += the sum of the lanes of v[r], for kRowsAtOnce of them.
FASTMTL_INLINE void add_row_sums(const Vd* v, double* out) {
#if FASTMTL_VECTOR_BYTES == 64
  // A transposition whose every step adds: 8 vectors become one.
  const auto fold = [](__m512d a, __m512d b) {
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
  };
  __m512d pairs[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512d a = (__m512d)v[2 * k], b = (__m512d)v[2 * k + 1];
    pairs[k] = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
  }
  write(out, read<Vd>(out) + (Vd)fold(fold(pairs[0], pairs[1]), fold(pairs[2], pairs[3])));
#else
  add_sums(v, kRowsAtOnce, out);
#endif
}

// y += A x over row panels [first, last) of the triangle: every tile is read once and used for its rows and, but for
// those of the diagonal, for its columns. x and y are whole blocks. To walk back after a walk forth finds in the
// second-level cache what fits there.
void symmetric_multiply(const double* tiles, int64_t first, int64_t last, bool back, const double* x, double* y) {
  for (int64_t walked = first; walked < last; ++walked) {
    const int64_t q = back ? first + last - 1 - walked : walked;
    const int64_t start = back ? q - 1 : 0, step = back ? -1 : 1;
    const double* const panel = tiles + tile_offset(q, 0);
    for (int64_t r0 = 0; r0 < kSide; r0 += kRowsAtOnce) {
      Vd of_row[kRowsAtOnce], sums[kRowsAtOnce];
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRowsAtOnce; ++r) {
        of_row[r] = splat(x[q * kSide + r0 + r]);
        sums[r] = Vd{};
      }
      const double* tile = panel + start * kTileSize + r0 * kSide;
      for (int64_t walk = 0, c = start; walk < q; ++walk, c += step, tile += step * kTileSize) {
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRowsAtOnce; ++r) { // a row is a cache line
          __builtin_prefetch(tile + step * kPrefetchTiles * kTileSize + r * kSide, 0, 3);
        }
#pragma GCC unroll 4
        for (int64_t u = 0; u < kTileVectors; ++u) {
          const int64_t at = c * kSide + u * kWidth;
          const Vd of_column = read<Vd>(x + at);
          Vd even = read<Vd>(y + at), odd{};
#pragma GCC unroll 8
          for (int64_t r = 0; r < kRowsAtOnce; ++r) {
            const Vd a = read<Vd>(tile + r * kSide + u * kWidth);
            sums[r] += a * of_column;
            (r % 2 ? odd : even) += a * of_row[r];
          }
          write(y + at, even + odd);
        }
      }
      tile = panel + q * kTileSize + r0 * kSide;
#pragma GCC unroll 4
      for (int64_t u = 0; u < kTileVectors; ++u) {
        const Vd of_column = read<Vd>(x + q * kSide + u * kWidth);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRowsAtOnce; ++r) {
          sums[r] += read<Vd>(tile + r * kSide + u * kWidth) * of_column;
        }
      }
      add_row_sums(sums, y + q * kSide + r0);
    }
  }
}

// `rows` of a tile row and C tiles: A -= Σ_k v_k w_kᵀ + w_k v_kᵀ.
template <int C>
FASTMTL_INLINE void update_tiles(double* tile, const double* rows, const double* columns, int64_t pairs) {
  constexpr int64_t kVectors = C * kTileVectors;
  for (int64_t r0 = 0; r0 < kSide; r0 += kUpdateRows) {
    Vd sums[kUpdateRows][kVectors];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kUpdateRows; ++r) {
#pragma GCC unroll 8
      for (int64_t u = 0; u < kVectors; ++u) {
        sums[r][u] = Vd{};
        if (u % kTileVectors == 0) {
          __builtin_prefetch(tile + u / kTileVectors * kTileSize + (r0 + r) * kSide, 1, 3);
        }
      }
    }
    const double *of_row = rows + r0, *of_column = columns;
    const auto add = [&](const double* left, const double* right) __attribute__((always_inline)) {
      Vd b[kVectors];
#pragma GCC unroll 8
      for (int64_t u = 0; u < kVectors; ++u) {
        b[u] = read<Vd>(right + u / kTileVectors * kPanelBlock + u % kTileVectors * kWidth);
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < kUpdateRows; ++r) {
        const Vd a = splat(left[r]);
#pragma GCC unroll 8
        for (int64_t u = 0; u < kVectors; ++u) {
          sums[r][u] += a * b[u];
        }
      }
    };
    for (int64_t k = 0; k < pairs; ++k, of_row += 2 * kSide, of_column += 2 * kSide) {
      add(of_row, of_column + kSide);
      add(of_row + kSide, of_column);
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kUpdateRows; ++r) {
#pragma GCC unroll 8
      for (int64_t u = 0; u < kVectors; ++u) {
        double* const at = tile + u / kTileVectors * kTileSize + (r0 + r) * kSide + u % kTileVectors * kWidth;
        write(at, read<Vd>(at) - sums[r][u]);
      }
    }
  }
}

// A -= Σ_k v_k w_kᵀ + w_k v_kᵀ over row panels [first, last), for the first `pairs` columns v, w of the panel. The
// blocks of a few columns stay in the first-level cache while those of the rows go by.
void symmetric_update(double* tiles, int64_t first, int64_t last, const double* panel, int64_t pairs) {
  for (int64_t c = 0; c < last; c += kUpdateTiles) {
    const double* const columns = panel + c * kPanelBlock;
    for (int64_t q = std::max(first, c); q < last; ++q) {
      double* const tile = tiles + tile_offset(q, c);
      const double* const rows = panel + q * kPanelBlock;
      if constexpr (kUpdateTiles > 1) {
        if (q > c + 1) {
          update_tiles<3>(tile, rows, columns, pairs);
          continue;
        }
        if (q == c + 1) {
          update_tiles<2>(tile, rows, columns, pairs);
          continue;
        }
      }
      update_tiles<1>(tile, rows, columns, pairs);
    }
  }
}

// The reflection H = I - τ v vᵀ that takes x [n] to β e_{n-1}: v with v_{n-1} = 1, whole blocks, zeros behind; into the
// panel's column k too. Returns τ; 0 where x is β e_{n-1} already but for what is lost beside the matrix, whose entries
// are near one.
double reflector(const double* x, int64_t n, double* v, double* beta, double* panel, int64_t k) {
  const int64_t blocks = (n + kSide - 1) / kSide;
  for (int64_t i = 0; i < n - 1; ++i) {
    v[i] = x[i];
  }
  for (int64_t i = n - 1; i < blocks * kSide; ++i) {
    v[i] = 0.0;
  }
  Vd squares[2] = {Vd{}, Vd{}};
  for (int64_t i = 0; i < blocks * kSide; i += kWidth) {
    const Vd a = read<Vd>(v + i);
    squares[i / kWidth % 2] += a * a;
  }
  const double below = sum(squares[0] + squares[1]), pivot = x[n - 1];
  double tau = 0.0, inverse = 0.0;
  *beta = pivot;
  if (below > kTinySquare) {
    const double norm = __builtin_sqrt(below + pivot * pivot);
    *beta = pivot > 0.0 ? -norm : norm;
    tau = (*beta - pivot) / *beta;
    inverse = 1.0 / (pivot - *beta);
  }
  for (int64_t i = 0; i < blocks * kSide; i += kWidth) {
    write(v + i, read<Vd>(v + i) * inverse);
  }
  v[n - 1] = 1.0;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < kSide; i += kWidth) {
      write(panel + b * kPanelBlock + 2 * k * kSide + i, read<Vd>(v + b * kSide + i));
    }
  }
  return tau;
}

// sums[m] += vector m of N blocks of the panel times x.
template <int N>
FASTMTL_INLINE void add_products(const double* panel, int64_t vectors, const double* x, Vd (*sums)[kTileVectors]) {
  Vd of[N][kTileVectors];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
    for (int64_t u = 0; u < kTileVectors; ++u) {
      of[i][u] = read<Vd>(x + i * kSide + u * kWidth);
    }
  }
  for (int64_t m = 0; m < vectors; ++m) {
#pragma GCC unroll 4
    for (int64_t u = 0; u < kTileVectors; ++u) {
      Vd total = sums[m][u];
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        total += read<Vd>(panel + i * kPanelBlock + m * kSide + u * kWidth) * of[i][u];
      }
      sums[m][u] = total;
    }
  }
}

// The products of the panel's columns with x.
FASTMTL_INLINE void panel_products(const double* panel, int64_t vectors, int64_t blocks, const double* x, double* out) {
  Vd sums[2 * kPanel][kTileVectors];
  for (int64_t m = 0; m < vectors; ++m) {
    for (int64_t u = 0; u < kTileVectors; ++u) {
      sums[m][u] = Vd{};
    }
  }
  int64_t b = 0;
  for (; b + 4 <= blocks; b += 4) {
    add_products<4>(panel + b * kPanelBlock, vectors, x + b * kSide, sums);
  }
  for (; b < blocks; ++b) {
    add_products<1>(panel + b * kPanelBlock, vectors, x + b * kSide, sums);
  }
  for (int64_t m = 0; m < vectors; ++m) {
    Vd total = sums[m][0];
    for (int64_t u = 1; u < kTileVectors; ++u) {
      total += sums[m][u];
    }
    out[m] = sum(total);
  }
}

// Column k of the panel: w of the step whose reflector v [n] and τ are given, from y = A v with the A that the panel's
// columns so far have not been taken from; and, where `row` is given (row n - 1 of that A), what it is after this step.
void panel_column(double* panel, int64_t k, int64_t n, const double* v, double tau, double* y, double* row) {
  const int64_t blocks = (n + kSide - 1) / kSide, pairs = k, last = n - 1;
  double products[2 * kPanel], of_row[2 * kPanel]; // with v, and entries of row n - 1
  panel_products(panel, 2 * pairs, blocks, v, products);
  const double* const entries = panel + last / kSide * kPanelBlock + last % kSide;
  for (int64_t m = 0; m < pairs; ++m) {
    std::swap(products[2 * m], products[2 * m + 1]);
    of_row[2 * m] = entries[(2 * m + 1) * kSide];
    of_row[2 * m + 1] = entries[2 * m * kSide];
  }
  // Two vectors of sums each: one alone would wait for itself.
  Vd along{};
  for (int64_t b = 0; b < blocks; ++b) {
    const double* column = panel + b * kPanelBlock;
    for (int64_t i = b * kSide; i < (b + 1) * kSide; i += kWidth, column += kWidth) {
      Vd of_y[2] = {read<Vd>(y + i), Vd{}}, of_x[2] = {Vd{}, Vd{}};
      if (row) {
        of_x[0] = read<Vd>(row + i);
        for (int64_t m = 0; m < 2 * pairs; m += 2) {
          const Vd p = read<Vd>(column + m * kSide), q = read<Vd>(column + (m + 1) * kSide);
          of_y[0] -= p * products[m];
          of_y[1] -= q * products[m + 1];
          of_x[0] -= p * of_row[m];
          of_x[1] -= q * of_row[m + 1];
        }
        write(row + i, of_x[0] + of_x[1]);
      } else {
        for (int64_t m = 0; m < 2 * pairs; m += 2) {
          of_y[0] -= read<Vd>(column + m * kSide) * products[m];
          of_y[1] -= read<Vd>(column + (m + 1) * kSide) * products[m + 1];
        }
      }
      const Vd total = of_y[0] + of_y[1];
      write(y + i, total);
      along += total * read<Vd>(v + i);
    }
  }
  const double half = 0.5 * tau * sum(along), w_last = tau * (y[last] - half * v[last]);
  for (int64_t i = n; i < blocks * kSide; ++i) {
    y[i] = 0.0;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < kSide; i += kWidth) {
      const int64_t at = b * kSide + i;
      const Vd of_v = read<Vd>(v + at), w = tau * (read<Vd>(y + at) - half * of_v);
      write(panel + b * kPanelBlock + (2 * k + 1) * kSide + i, w);
      if (row) {
        write(row + at, read<Vd>(row + at) - of_v * w_last - w); // v_last is one
      }
    }
  }
}

// x -= τ v (vᵀ x), whole blocks.
void reflect(const double* v, int64_t n, double tau, double* x) {
  const int64_t length = (n + kSide - 1) / kSide * kSide;
  Vd sums[4] = {Vd{}, Vd{}, Vd{}, Vd{}};
  int64_t i = 0;
  for (; i + 4 * kWidth <= length; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      sums[u] += read<Vd>(v + i + u * kWidth) * read<Vd>(x + i + u * kWidth);
    }
  }
  for (; i < length; i += kWidth) {
    sums[0] += read<Vd>(v + i) * read<Vd>(x + i);
  }
  const double factor = tau * sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (i = 0; i < length; i += kWidth) {
    write(x + i, read<Vd>(x + i) - factor * read<Vd>(v + i));
  }
}

// a b + c, rounded once where that is an instruction: left to itself a compiler may well fuse the product that is not
// waited for.
FASTMTL_INLINE double fused(double a, double b, double c) {
#if FASTMTL_VECTOR_BYTES >= 32
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// One sweep of QL with Wilkinson's shift over diagonal d[0 ... n], off-diagonal e[0 ... n - 1], both `step` (1 or -1)
// apart and e[n] there to be written; the n rotations (c, s) are written where they are wanted, that of rows n - 1, n
// first.
template <int64_t kStep>
void ql_sweep_along(double* d, double* e, int64_t n, double* rotations) {
  const auto D = [&](int64_t i) -> double& { return d[i * kStep]; };
  const auto E = [&](int64_t i) -> double& { return e[i * kStep]; };
  double p = D(0), g = (D(1) - p) / (2.0 * E(0)), r = __builtin_hypot(g, 1.0);
  g = D(n) - p + E(0) / (g + (g < 0.0 ? -r : r));
  double c = 1.0, s = 1.0, above = D(n);
  p = 0.0;
  for (int64_t i = n - 1; i >= 0; --i) {
    const double f = s * E(i), b = c * E(i), here = D(i), square = fused(g, g, f * f);
    r = __builtin_sqrt(square);
    if (__builtin_expect(square < kSafeSquare, 0)) {
      r = __builtin_hypot(f, g);
    }
    c = r > 0.0 ? g / r : 1.0;
    s = r > 0.0 ? f / r : 0.0;
    E(i + 1) = r;
    g = above - p;
    r = fused(here - g, s, 2.0 * (c * b));
    p = s * r;
    D(i + 1) = g + p;
    g = fused(c, r, -b);
    above = here;
    if (rotations) {
      rotations[0] = c;
      rotations[1] = s;
      rotations += 2;
    }
  }
  D(0) -= p;
  E(0) = g;
  E(n) = 0.0;
}

void ql_sweep(double* d, double* e, int64_t step, int64_t n, double* rotations) {
  step > 0 ? ql_sweep_along<1>(d, e, n, rotations) : ql_sweep_along<-1>(d, e, n, rotations);
}

// x := Gᵀ x for the rotations of a sweep over x[0], x[step], ..., x[n step], or back.
void rotate(const double* rotations, int64_t step, int64_t n, bool back, double* x) {
  if (back) {
    double carried = x[0];
    for (int64_t i = 0; i < n; ++i) {
      const double c = rotations[2 * (n - 1 - i)], s = rotations[2 * (n - 1 - i) + 1], next = x[(i + 1) * step];
      x[i * step] = fused(c, carried, s * next);
      carried = fused(-s, carried, c * next);
    }
    x[n * step] = carried;
    return;
  }
  double carried = x[n * step];
  for (int64_t i = n - 1; i >= 0; --i, rotations += 2) {
    const double c = rotations[0], s = rotations[1], next = x[i * step];
    x[(i + 1) * step] = fused(c, carried, s * next);
    carried = fused(-s, carried, c * next);
  }
  x[0] = carried;
}

} // namespace
} // namespace fastmtl::cpu
