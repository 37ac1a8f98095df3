// For a Gram matrix far from singular: its smallest eigenvalue, and M^-1/2 w, without any other eigenvector.
#pragma once

#include <cstdint>
#include <memory>

#include "../math/balance.h"

namespace fastmtl::cpu {

// M - shift I = L Lᵀ of a possibly large matrix: panel by panel, on all threads.
class PanelCholesky {
 public:
  explicit PanelCholesky(int64_t T);

  // Whether M - shift I is positive definite; if so, `solve` uses its factor. Rows of very different norms should come
  // in descending order.
  bool factor(const double* M, double shift); // M [T, T]
  void solve(double* x) const;                // x [T] <- (M - shift I)⁻¹ x

 private:
  int64_t T_, stride_;
  std::unique_ptr<double[]> L_;        // [T, stride]
  std::unique_ptr<double[]> inverses_; // [panels, panel, panel]
  std::unique_ptr<double[]> rows_;     // [T, panel]
};

// A proven lower bound of λ_min(M), a relative kCertified below what inverse iteration finds near `estimate`, which may
// be any number. False if M is not positive definite or it takes too many steps.
bool smallest_eigenvalue(const double* M, int64_t T, double estimate, double* below); // M [T, T]

// Whether M - shift I is positive definite; the same answer for any number of threads.
bool is_positive_definite(const double* M, int64_t T, double shift); // M [T, T]

// ‖M‖ in the maximum norm, which bounds its largest eigenvalue; if `normalized`, that of D^-1/2 M D^-1/2, D its
// diagonal.
double row_norm(const double* M, int64_t T, bool normalized); // M [T, T]

// α = sqrt(s) M^-1/2 w if M, whose entries are finite, is proved to have full rank under the policy's rule, and if few
// steps suffice: T³ / 3 multiply-adds and some forty reads of M. λ_min is certified to a relative 1e-6 and usually
// accurate to 1e-10; the rest is accurate to rounding. Otherwise false, and α is undefined: for scale `median`, for
// rows whose norms are far apart, for condition numbers of M beyond a hundred or so.
bool definite_weights(
    const double* M, // [T, T]
    int64_t T,
    const Policy& policy,
    double* alpha,     // [T]
    double* smallest); // a lower bound of λ_min(M)

} // namespace fastmtl::cpu
