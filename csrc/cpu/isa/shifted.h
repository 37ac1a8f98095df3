// A symmetric tridiagonal matrix S with many numbers beside its diagonal at once, one a SIMD lane: where all
// eigenvalues are kept, these take the place of QL's rotations, each of which waits for the one before.
//
// S - s I = U D Uᵀ from the last row up, which holds what is largest (tridiagonal.h): without pivoting, since only
// definite matrices count. A factorisation and a solve are some ten operations a row and lane, one a division.
#pragma once

namespace fastmtl::cpu {
namespace {

constexpr int64_t kShiftVectors = 4; // one waits for its divisions while the others divide
constexpr int64_t kShifts = kShiftVectors * kWidth;
constexpr int64_t kSolveVectors = 2;

// The first of the ascending `shifts` s [kShifts] for which S - s I is not positive definite; kShifts where there is
// none.
int64_t definite_shifts(
    const double* d, // [n], the diagonal
    const double* e, // [n - 1], beside it
    int64_t n,
    const double* shifts) {
  Vd shift[kShiftVectors], pivot[kShiftVectors], least[kShiftVectors];
#pragma GCC unroll 4
  for (int64_t u = 0; u < kShiftVectors; ++u) {
    shift[u] = read<Vd>(shifts + u * kWidth);
    pivot[u] = least[u] = d[n - 1] - shift[u];
  }
  for (int64_t i = n - 2; i >= 0; --i) {
    const Vd square = splat(e[i] * e[i]), diagonal = splat(d[i]);
#pragma GCC unroll 4
    for (int64_t u = 0; u < kShiftVectors; ++u) {
      pivot[u] = diagonal - shift[u] - square / pivot[u];
      least[u] = pivot[u] < least[u] ? pivot[u] : least[u]; // a pivot of zero is remembered, and not the NaN behind it
    }
  }
  for (int64_t j = 0; j < kShifts; ++j) {
    if (!(least[j / kWidth][j % kWidth] > 0.0)) {
      return j;
    }
  }
  return kShifts;
}

// x = Σ_j c_j (S + t_j I)⁻¹ y over j < count, all of which are positive definite.
void shifted_solves(
    const double* d, // [n]
    const double* e, // [n - 1]
    int64_t n,
    const double* y, // [n]
    const double* t, // [count]
    const double* c, // [count]
    int64_t count,
    double* x,         // [n]
    double* scratch) { // shifted_scratch(n) doubles, aligned to 64 bytes
  constexpr int64_t V = kSolveVectors;
  Vd* const inverse = reinterpret_cast<Vd*>(scratch); // [n, V], of the pivots
  Vd *const z = inverse + n * V, *const sums = z + n * V;
  for (int64_t i = 0; i < n; ++i) {
    sums[i] = Vd{};
  }
  for (int64_t j = 0; j < count; j += V * kWidth) {
    Vd shift[V], factor[V];
#pragma GCC unroll 2
    for (int64_t u = 0; u < V; ++u) {
      for (int64_t l = 0; l < kWidth; ++l) { // lanes without a number repeat the last one, for nothing
        const int64_t k = j + u * kWidth + l;
        shift[u][l] = t[k < count ? k : count - 1];
        factor[u][l] = k < count ? c[k] : 0.0;
      }
      inverse[(n - 1) * V + u] = 1.0 / (d[n - 1] + shift[u]);
      z[(n - 1) * V + u] = splat(y[n - 1]);
    }
    for (int64_t i = n - 2; i >= 0; --i) {
#pragma GCC unroll 2
      for (int64_t u = 0; u < V; ++u) {
        const Vd along = e[i] * inverse[(i + 1) * V + u];
        z[i * V + u] = y[i] - along * z[(i + 1) * V + u];
        inverse[i * V + u] = 1.0 / (d[i] + shift[u] - along * e[i]);
      }
    }
#pragma GCC unroll 2
    for (int64_t u = 0; u < V; ++u) {
      Vd last = z[u] * inverse[u];
      sums[0] += factor[u] * last;
      for (int64_t i = 1; i < n; ++i) {
        last = (z[i * V + u] - e[i - 1] * last) * inverse[i * V + u];
        sums[i] += factor[u] * last;
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    x[i] = sum(sums[i]);
  }
}

} // namespace
} // namespace fastmtl::cpu
