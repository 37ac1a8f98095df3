// What a Gram matrix far from singular permits: its smallest eigenvalue and M^-1/2 w without any other eigenvector.
#pragma once

#include <cstdint>
#include <memory>

#include "../math/balance.h"

namespace fastmtl::cpu {

// M - shift I = L Lᵀ of a matrix that may be large: panel by panel, on all threads.
class PanelCholesky {
 public:
  explicit PanelCholesky(int64_t T);

  // Whether M - shift I is positive definite: then it is what `solve` divides by. Rows of very different norms are to
  // descend.
  bool factor(const double* M, double shift); // M [T, T]
  void solve(double* x) const;                // x [T] <- (M - shift I)⁻¹ x

 private:
  int64_t T_, stride_;
  std::unique_ptr<double[]> L_;        // [T, stride]
  std::unique_ptr<double[]> inverses_; // [panels, panel, panel]
  std::unique_ptr<double[]> rows_;     // [T, panel]
};

// λ_min(M) as proved from below, a relative kCertified below what inverse iteration finds about `estimate`, which may
// be any number. False where M is not positive definite, or that takes too many steps.
bool smallest_eigenvalue(const double* M, int64_t T, double estimate, double* below); // M [T, T]

// Whether M - shift I is positive definite; the same answer for any number of threads.
bool is_positive_definite(const double* M, int64_t T, double shift); // M [T, T]

// ‖M‖ in the maximum norm, which bounds its largest eigenvalue; of D^-1/2 M D^-1/2, D its diagonal, where `normalized`.
double row_norm(const double* M, int64_t T, bool normalized); // M [T, T]

// α = sqrt(s) M^-1/2 w where M, of finite entries, is proved to be of full rank under the policy's rule, and where that
// takes few steps: T³ / 3 multiply-adds and some forty reads of M. λ_min is certified to a relative 1e-6 and usually
// good to 1e-10; the rest is good to rounding. False, with nothing of use in α, where it is not so: for scale `median`,
// for rows whose norms are far apart, for condition numbers of M beyond a hundred or so.
bool definite_weights(
    const double* M, // [T, T]
    int64_t T,
    const Policy& policy,
    double* alpha,     // [T]
    double* smallest); // a lower bound of λ_min(M)

} // namespace fastmtl::cpu
