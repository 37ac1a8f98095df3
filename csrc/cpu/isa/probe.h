// What float32 sums cost a Gram matrix, measured on the very gradients: y = G (Gᵀ z) in float64 for kNarrowProbes
// vectors z, to be compared with M z. A block of columns is probed while it is packed in the cache: u = Gᵀ z of its
// columns, then y += G u. That is 2 T multiply-adds in float64 a column and probe beside T² / 2 in float32, and no
// further read of G.
#pragma once

namespace fastmtl::cpu {
namespace {

// u += aᵀ z for a panel of R packed rows; the first panel of a block starts from zero.
template <int R>
void project(
    const float* a, // [n / kWidth32, R, kWidth32]
    int64_t n,
    const double* z, // [kNarrowProbes, R]
    bool fresh,
    double* u) { // [kNarrowProbes, n]
  Vd factors[kNarrowProbes * R];
#pragma GCC unroll 16
  for (int i = 0; i < kNarrowProbes * R; ++i) {
    factors[i] = splat(z[i]);
  }
  for (int64_t k = 0; k < n; k += kWidth32, a += R * kWidth32) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < kWidth32; half += kWidth) {
      Vd sums[kNarrowProbes];
#pragma GCC unroll 4
      for (int p = 0; p < kNarrowProbes; ++p) {
        sums[p] = fresh ? Vd{} : read<Vd>(u + p * n + k + half);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vd x = load(a + r * kWidth32 + half, double{});
#pragma GCC unroll 4
        for (int p = 0; p < kNarrowProbes; ++p) {
          sums[p] += x * factors[p * R + r];
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < kNarrowProbes; ++p) {
        write(u + p * n + k + half, sums[p]);
      }
    }
  }
}

// y = a u for a panel of R packed rows.
template <int R>
void reflect_back(
    const float* a, // [n / kWidth32, R, kWidth32]
    int64_t n,
    const double* u, // [kNarrowProbes, n]
    double* y) {     // [kNarrowProbes, R]
  Vd sums[kNarrowProbes * R];
#pragma GCC unroll 16
  for (int i = 0; i < kNarrowProbes * R; ++i) {
    sums[i] = Vd{};
  }
  for (int64_t k = 0; k < n; k += kWidth32, a += R * kWidth32) {
#pragma GCC unroll 2
    for (int64_t half = 0; half < kWidth32; half += kWidth) {
      Vd along[kNarrowProbes];
#pragma GCC unroll 4
      for (int p = 0; p < kNarrowProbes; ++p) {
        along[p] = read<Vd>(u + p * n + k + half);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vd x = load(a + r * kWidth32 + half, double{});
#pragma GCC unroll 4
        for (int p = 0; p < kNarrowProbes; ++p) {
          sums[p * R + r] += x * along[p];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kNarrowProbes * R; ++i) {
    y[i] = sum(sums[i]);
  }
}

} // namespace
} // namespace fastmtl::cpu
