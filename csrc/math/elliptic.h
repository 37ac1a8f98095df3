// The best rational approximation of x^-1/2 on an interval, as partial fractions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "thresholds.h"

namespace fastmtl {

// x^-1/2 = Σ_j c_j / (x + t_j) for low <= x <= high, to a relative `error`: Zolotarev's t_j = low sc²(u_j),
// with the u_j evenly over a quarter period of Jacobi's elliptic functions of the complementary modulus √(low / high).
// N terms leave 4 exp(-2 π² N / ln(16 high / low)).
struct PartialFractions {
  std::vector<double> t, c;
};

inline PartialFractions inverse_root_fractions(double low, double high, double error) {
  constexpr double kPi = 3.14159265358979323846;
  constexpr int kMaxMeans = 12; // of the arithmetic-geometric mean, which doubles its digits each time
  const double ratio = std::max(1.0, high / low);
  const auto N = int64_t(std::ceil(std::log(4.0 / error) * std::log(16.0 * ratio) / (2.0 * kPi * kPi)));
  double a[kMaxMeans], b[kMaxMeans];
  int means = 1;
  a[0] = 1.0;
  b[0] = 1.0 / std::sqrt(ratio);
  while (means < kMaxMeans && a[means - 1] - b[means - 1] > kMeansEqual * a[means - 1]) {
    a[means] = 0.5 * (a[means - 1] + b[means - 1]);
    b[means] = std::sqrt(a[means - 1] * b[means - 1]);
    ++means;
  }
  const double mean = 0.5 * (a[means - 1] + b[means - 1]), root = std::sqrt(low * high);
  PartialFractions f{std::vector<double>(size_t(N)), std::vector<double>(size_t(N))};
  for (int64_t j = 0; 2 * j < N; ++j) {
    // cs(u) and dn(u), from the trigonometric functions that the last mean leaves of them (Landen; Bulirsch 1965).
    const double angle = 0.5 * kPi * (double(j) + 0.5) / double(N);
    double rest = std::cos(angle) / std::sin(angle), cs = mean * rest, dn = 1.0;
    for (int i = means - 1; i >= 0; --i) {
      rest *= cs;
      cs *= dn;
      dn = (b[i] + rest) / (a[i] + rest);
      rest = cs / a[i];
    }
    const double t = low / (cs * cs), c = dn * (1.0 + cs * cs) / (cs * cs) * std::sqrt(low) / (mean * double(N));
    f.t[size_t(j)] = t;
    f.c[size_t(j)] = c;
    f.t[size_t(N - 1 - j)] = low * high / t;
    f.c[size_t(N - 1 - j)] = root / t * c;
  }
  return f;
}

} // namespace fastmtl
