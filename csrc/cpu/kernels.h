// What the CPU kernels compute, independent of the instruction set that computes it.
#pragma once

#include <cstdint>

#include "../gradients.h"

namespace fastmtl::cpu {

// A symmetric matrix is stored in tiles of kSide x kSide, its lower triangle's rows of tiles one after the other; a
// panel holds kPanel pairs of columns for each block of kSide rows. See householder.h.
constexpr int64_t kSide = 8;
constexpr int64_t kPanel = 32;
constexpr int64_t kPanelBlock = 2 * kPanel * kSide;

constexpr int64_t tile_offset(int64_t row, int64_t column) {
  return (row * (row + 1) / 2 + column) * kSide * kSide;
}

// How many vectors judge float32 sums: of gram_blocks, and of wide_gram, where they cost less. They have entries for
// whole panels of rows.
constexpr int64_t kNarrowProbes = 2;
constexpr int64_t kWideProbes = 4;
constexpr int64_t probe_stride(int64_t T) {
  return (T + 31) / 32 * 32;
}

// A solver of csrc/math, `method` being the functor, for task i of matrix b.
using SolverKernel = double (*)(
    const void* method,
    const double* M, // [T, T], finite
    int64_t T,
    int64_t b,
    int64_t i,
    double* v, // [T]
    double* scratch);

// The same kernels for one instruction set; `kernels()` picks the best that this machine runs.
struct Kernels {
  const char* name;
  int64_t lanes; // matrices that eigh_lanes solves at once

  // M += G Gᵀ over the columns of each chunk, upper triangle only, exact: products and sums in float64.
  // Chunk c covers columns [bounds[c], bounds[c + 1]) and adds to M + c T².
  void (*gram_exact)(
      const Gradients& G,
      const int64_t* bounds, // [chunks + 1]
      int64_t first,
      int64_t last,
      double* M); // [chunks, T, T]

  // The same with products and short sums in float32 (at most 1024 columns), flushed to float64; and y += G (Gᵀ z) in
  // float64, which shows how much accuracy that costs.
  void (*gram_blocks)(
      const Gradients& G,
      const int64_t* bounds,
      int64_t first,
      int64_t last,
      const double* z, // [kNarrowProbes, probe_stride(T)]
      double* M,       // [chunks, T, T]
      double* y);      // [chunks, kNarrowProbes, probe_stride(T)]

  // The same for many rows, in panels of wide_panel(exact) rows. wide_pack packs columns [begin, end) of a panel as
  // [panel][end - begin, wide_panel], in float64 if `exact`, else in float32. wide_gram adds the products of pairs
  // [first, last) of panels to M's upper triangle (and to the lower part of its diagonal blocks); pair j (j + 1) / 2 +
  // i is panels i <= j. Float32 panels are probed in two steps: u = Gᵀ z of columns [first, last), then y += G u for
  // panels [first, last).
  int64_t (*wide_panel)(bool exact);
  void (*wide_pack)(const Gradients& G, int64_t begin, int64_t end, int64_t panel, bool exact, void* packed);
  void (*wide_gram)(
      const void* packed,
      int64_t columns,
      int64_t T,
      bool exact,
      int64_t first,
      int64_t last,
      double* M); // [T, T]
  void (*wide_project)(
      const float* packed,
      int64_t columns,
      int64_t T,
      const double* z, // [kWideProbes, probe_stride(T)]
      int64_t first,
      int64_t last,
      double* u); // [kWideProbes, columns]
  void (*wide_reflect)(
      const float* packed,
      int64_t columns,
      int64_t T,
      const double* u, // [kWideProbes, columns]
      int64_t first,
      int64_t last,
      double* y); // [kWideProbes, probe_stride(T)]

  // out = αᵀ G over columns [begin, end), float64 sums, walked backwards (the end of G is still in the cache after a
  // Gram pass); `stream` writes past the cache.
  void (*combine)(
      const Gradients& G,
      const double* alpha, // [T]
      int64_t begin,
      int64_t end,
      bool stream);

  // GradDrop of columns [begin, end), column c drawing the random number first + c; `stream` writes past the cache.
  void (*sign_drop)(
      const Gradients& G,
      uint64_t seed,
      int64_t first,
      const double* leak, // [T], or null where nothing leaks
      int64_t begin,
      int64_t end,
      bool stream);

  // `count` <= lanes symmetric matrices at once (lower triangle read), ascending eigenvalues, eigenvectors in columns.
  // `scratch` holds eigh_lanes_scratch(T) doubles, aligned to 64 bytes.
  void (*eigh_lanes)(
      const double* A, // [count, T, T]
      int64_t T,
      int64_t count,
      double* eigenvalues,  // [count, T]
      double* eigenvectors, // [count, T, T] or null
      double* scratch);

  // One positive semi-definite matrix: eigenvalues descending and the eigenvectors of the nonzero ones, unnormalised:
  // X[j] = sqrt(λ_j) v_j as rows of length psd_stride(T). Returns how many there are.
  int64_t (*psd_eigh)(
      const double* A, // [T, T], full
      int64_t T,
      double* eigenvalues, // [T]
      double* X,           // [T, psd_stride(T)], aligned to 64 bytes
      double* scratch);    // [2 T]

  // M - s I = L Lᵀ, a panel of `cholesky_panel` columns at a time (<= kMaxCholeskyPanel): first the diagonal block that
  // begins at column j, which says whether it is positive definite, then rows of what is below it. `rows` [j,
  // cholesky_panel] and `inverse` [cholesky_panel, cholesky_panel] pass from the one to the other.
  int64_t cholesky_panel;
  bool (*cholesky_diagonal)(
      const double* M, // [T, T]
      int64_t T,
      double s,
      double* L, // [T, stride], lower triangle
      int64_t stride,
      int64_t j,
      double* rows,
      double* inverse);
  void (*cholesky_below)(
      const double* M, // [T, T]
      int64_t T,
      double* L, // [T, stride]
      int64_t stride,
      int64_t j,
      const double* rows,
      const double* inverse,
      int64_t begin,
      int64_t end);
  // x = (L Lᵀ)⁻¹ x
  void (*cholesky_solve)(
      const double* L, // [T, stride]
      int64_t T,
      int64_t stride,
      const double* inverses, // [panels, cholesky_panel, cholesky_panel]
      double* x);             // [T]

  // out -= X P over rows [begin, end), for columns [first, last) of X, or what of them is not left of X's diagonal; P
  // has row `first` first.
  void (*subtract_panel)(
      const double* X, // [rows, stride]
      int64_t stride,
      int64_t first,
      int64_t last,
      const double* P, // [last - first, cholesky_panel]
      bool upper,      // X is triangular
      int64_t begin,
      int64_t end,
      double* out, // [rows, out_stride]
      int64_t out_stride,
      int64_t width); // columns of `out`
  // y = A x, rows [begin, end); and y += Aᵀ x
  void (*row_products)(
      const double* A, // [rows, stride]
      int64_t stride,
      const double* x, // [n]
      int64_t n,
      int64_t begin,
      int64_t end,
      double* y); // [rows]
  void (*add_rows)(
      const double* A, // [rows, stride]
      int64_t stride,
      const double* x, // [rows]
      int64_t rows,
      int64_t n,
      double* y); // [n]

  // What rows [begin, end) of the upper triangle of a symmetric M add to M x, in elements begin and on of y.
  void (*symmetric_rows)(
      const double* M, // [T, T]
      int64_t T,
      const double* x, // [T]
      int64_t begin,
      int64_t end,
      double* y); // [T]

  // What csrc/cpu/projections.cpp consists of: C_S + δ = Uᵀ U, columns from ... n - 1, false where a pivot i is at most
  // least (i + 2); y <- (Uᵀ U)^-1 y; out += Σ_k y_k C_{S_k}.
  bool (*set_factor)(
      const double* C, // [T, T]
      int64_t T,
      const int64_t* set, // S [n]
      int64_t from,
      int64_t n,
      double delta,
      double least,
      double* U, // [n, stride], stride >= n + kSetPadding
      int64_t stride,
      double* inverse); // [n], of U's diagonal
  void (*set_solve)(const double* U, int64_t n, int64_t stride, const double* inverse, double* y); // y [n]
  void (*set_products)(const double* C, int64_t T, const int64_t* set, int64_t n, const double* y, double* out);

  // What csrc/cpu/tridiagonal.h consists of; vectors are whole blocks of kSide, aligned to 64 bytes.
  // y += A x over rows of tiles [first, last), from the first or back from the last.
  void (*symmetric_multiply)(const double* tiles, int64_t first, int64_t last, bool back, const double* x, double* y);
  // A -= Σ v wᵀ + w vᵀ over rows of tiles [first, last), for the first `pairs` columns v, w of the panel.
  void (*symmetric_update)(double* tiles, int64_t first, int64_t last, const double* panel, int64_t pairs);
  // v and τ (returned) of the reflection that takes x [n] to β e_{n-1}; v is also the panel's k-th.
  double (*reflector)(const double* x, int64_t n, double* v, double* beta, double* panel, int64_t k);
  // The panel's k-th w, from y = A v, which it overwrites; updates `row`, row n - 1 of A, where that is not null.
  void (*panel_column)(double* panel, int64_t k, int64_t n, const double* v, double tau, double* y, double* row);
  // x -= τ v (vᵀ x)
  void (*reflect)(const double* v, int64_t n, double tau, double* x);
  // One implicit QL sweep over d[0 ... n], and its n rotations, where wanted.
  void (*ql_sweep)(double* d, double* e, int64_t step, int64_t n, double* rotations);
  // x := Gᵀ x for the rotations of a sweep, or G x.
  void (*rotate)(const double* rotations, int64_t step, int64_t n, bool back, double* x);

  // And of S alone, diagonal d [n], beside it e [n - 1]: the first of the ascending shifts [`shifts`] for which S - s I
  // is not positive definite, and x = Σ_j c_j (S + t_j I)⁻¹ y over j < count; scratch [shifted_scratch(n)], aligned.
  int64_t shifts;
  int64_t (*definite_shifts)(const double* d, const double* e, int64_t n, const double* shifts);
  void (*shifted_solves)(
      const double* d,
      const double* e,
      int64_t n,
      const double* y, // [n]
      const double* t, // [count]
      const double* c, // [count]
      int64_t count,
      double* x, // [n]
      double* scratch);

  const SolverKernel* solvers; // [number of Solvers]
};

constexpr int64_t kMaxCholeskyPanel = 48;
constexpr int64_t kSetPadding = 16; // of the rows of `set_factor`

constexpr int64_t kMaxShifts = 32;
constexpr int64_t shifted_scratch(int64_t n) {
  return 5 * 8 * n;
}

constexpr int64_t psd_stride(int64_t T) {
  return (T + 7) / 8 * 8;
}

constexpr int64_t kMaxLanesTasks = 32;

constexpr int64_t eigh_lanes_scratch(int64_t T) {
  return (2 * T * (T + 1) + 32 * T) * 8; // matrix, vectors, the rotations of a sweep
}

// Memory of this thread, aligned to 64 bytes, for as long as it is at work (threads.h); `slot` (0 or 1) tells apart
// buffers in use at once.
double* thread_scratch(int slot, int64_t doubles);

// trim_thread_scratch frees larger buffers; small ones stay for the next call.
constexpr int64_t kKeptScratch = int64_t(1) << 17; // doubles
void trim_thread_scratch();

// The best set that this machine runs, or a lesser one that FASTMTL_CPU names; chosen once.
const Kernels& kernels();

const Kernels* avx512_kernels(); // null if the compiler cannot build them
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

} // namespace fastmtl::cpu
