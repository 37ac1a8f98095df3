// What the CPU kernels compute, independent of the instruction set that computes it.
#pragma once

#include <cstdint>

#include "../gradients.h"

namespace fastmtl::cpu {

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

  // The same with products and short sums in float32 (1024 columns at most), flushed to float64.
  void (*gram_blocks)(const Gradients& G, const int64_t* bounds, int64_t first, int64_t last, double* M);

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

  // Task weights of one Gram matrix of finite entries, and how far they are from optimal; see csrc/math. `scratch`
  // holds what <name>_scratch(T) there says.
  double (*mgda)(
      const double* M, // [T, T]
      int64_t T,
      double* alpha, // [T]
      double* scratch);
  double (*dual_cone)(
      const double* M, // [T, T]
      int64_t T,
      const double* u, // [T]
      double* v,       // [T]
      double* scratch);
  double (*cagrad)(
      const double* M, // [T, T]
      int64_t T,
      double c,
      double* alpha, // [T]
      double* scratch);
  double (*nash)(
      const double* M, // [T, T]
      int64_t T,
      double power,
      double* alpha, // [T]
      double* scratch);

  // The weights v of what becomes of gradient i of matrix b; `scratch` holds conflicts_scratch(T) doubles.
  void (*pcgrad_row)(
      const double* M, // [T, T]
      int64_t T,
      uint64_t seed,
      int64_t b,
      int64_t i,
      bool per_task,
      double* v, // [T]
      double* scratch);
  void (*gradvac_row)(
      const double* M, // [T, T]
      int64_t T,
      uint64_t seed,
      int64_t b,
      int64_t i,
      double beta,
      double* targets, // [T], updated
      double* v,       // [T]
      double* scratch);
};

constexpr int64_t psd_stride(int64_t T) {
  return (T + 7) / 8 * 8;
}

constexpr int64_t eigh_lanes_scratch(int64_t T) {
  return (2 * T * (T + 1) + 32 * T) * 8; // matrix, vectors, the rotations of a sweep
}

// Memory of this thread that only grows, aligned to 64 bytes; `slot` (0 or 1) tells apart buffers in use at once.
double* thread_scratch(int slot, int64_t doubles);

// The best set this machine runs, or the lesser one that FASTMTL_CPU names; chosen once.
const Kernels& kernels();

const Kernels* avx512_kernels(); // null where the compiler cannot build them
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

} // namespace fastmtl::cpu
