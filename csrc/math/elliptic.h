// The best rational approximation of x^-1/2 on an interval, as partial fractions. For host and device.
//
// x^-1/2 = Σ_j c_j / (x + t_j) for low <= x <= high, to a relative error of 4 exp(-2 π² N / ln(16 high / low)) with N
// terms: Zolotarev's t_j = low sc²(u_j), with the u_j evenly over a quarter period of Jacobi's elliptic functions of
// the complementary modulus √(low / high).
#pragma once

#include <cmath>
#include <cstdint>

#include "team.h"

namespace fastmtl {
namespace {

// Of the arithmetic-geometric mean, which doubles its digits each time.
constexpr int kMaxMeans = 12;

// The arithmetic means a and geometric means b of 1 and √(low / high), and returned how many there are.
FASTMTL_HOST_DEVICE inline int elliptic_means(double low, double high, double* a, double* b) { // [kMaxMeans]
  int means = 1;
  a[0] = 1.0;
  b[0] = high > low ? 1.0 / std::sqrt(high / low) : 1.0;
  while (means < kMaxMeans && a[means - 1] - b[means - 1] > kMeansEqual * a[means - 1]) {
    a[means] = 0.5 * (a[means - 1] + b[means - 1]);
    b[means] = std::sqrt(a[means - 1] * b[means - 1]);
    ++means;
  }
  return means;
}

struct PartialFraction {
  double t, c;
};

// Term j of N.
FASTMTL_HOST_DEVICE inline PartialFraction
inverse_root_fraction(double low, double high, const double* a, const double* b, int means, int64_t j, int64_t N) {
  const int64_t k = 2 * j < N ? j : N - 1 - j; // the others are mirrored
  const double mean = 0.5 * (a[means - 1] + b[means - 1]), part = (double(k) + 0.5) / double(N);
  // cs(u) and dn(u), from the trigonometric functions that the last mean leaves of them (Landen; Bulirsch 1965).
#ifdef __CUDA_ARCH__
  double sine, cosine;
  sincospi(0.5 * part, &sine, &cosine);
#else
  const double angle = 0.5 * 3.14159265358979323846 * part, sine = std::sin(angle), cosine = std::cos(angle);
#endif
  double rest = cosine / sine, cs = mean * rest, dn = 1.0;
  for (int i = means - 1; i >= 0; --i) {
    rest *= cs;
    cs *= dn;
    dn = (b[i] + rest) / (a[i] + rest);
    rest = cs / a[i];
  }
  const double t = low / (cs * cs), c = dn * (1.0 + cs * cs) / (cs * cs) * std::sqrt(low) / (mean * double(N));
  return k == j ? PartialFraction{t, c} : PartialFraction{low * high / t, std::sqrt(low * high) / t * c};
}

} // namespace
} // namespace fastmtl
