// Eigenvalues and task weights of a Gram matrix with rows of any lengths, for the cost of one tridiagonalisation.
//
// M = L Lᵀ with pivoting, and A = Lᵀ L, which has the same eigenvalues; A = Q S Qᵀ with S tridiagonal, largest row
// first (tridiagonal.h). As Lᵀ f(L Lᵀ) = f(Lᵀ L) Lᵀ,
//
//     f(M) w = L⁻ᵀ z,  z = f(A) Lᵀ w,
//
// and the error of g = αᵀ G is that of z in the 2-norm, since ‖Gᵀ L⁻ᵀ z‖ = ‖z‖. All that makes M ill-conditioned is now
// in the scaling of A's rows a_i = √A_ii, in descending order, and D_a⁻¹ A D_a⁻¹ is closer to 1 than C is (Demmel and
// Veselić 1992: one step of the LR algorithm). Householder's reflections from the top keep small rows apart from large
// ones, but for what `growth` measures: rounding errors of A are about eps growth² a_i a_j.
//
// Results are certified: if a proof fails, so does the function, and Jacobi rotations take over. Besides the
// tridiagonalisation it takes T³/3 multiply-adds for L and A, and T³/6 for each proof, all of it in blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../math/balance.h"
#include "tridiagonal.h"

namespace fastmtl::cpu {

class Spectral {
 public:
  explicit Spectral(int64_t T) : T_(T) {}

  // Finds S for a finite M [T, T]. False if no accuracy can be promised.
  bool reduce(const double* M);

  // Two numbers that enclose λ_min(M). False if M may be singular.
  bool smallest(double* below, double* above) const;

  // α = √s M^-½ w for scale min or rmse, with all T rows kept; `smallest` is the lower of those numbers. False if it is
  // not certified.
  bool full_rank_weights(double smallest, const Policy& policy, double* alpha) const;

  // The same without S, for rows in groups of norms that nothing lies between, for which reflections are not accurate
  // enough: by a Cholesky factorisation of M + t_j I for each of some fifty t_j. `smallest_directly` is its λ_min.
  bool smallest_directly(double* smallest) const;
  bool direct_weights(double smallest, const Policy& policy, double* alpha) const;

  // Eigenvalues of M in descending order, none negative; the last word about S. False where QL does not converge.
  bool solve(double* eigenvalues);

  // α = √s M_R^-½ w for the R largest of them. False where it is not certified.
  bool weights(const double* eigenvalues, int64_t R, const Policy& policy, double* alpha) const;

 private:
  std::vector<double> task_weights(const Policy& policy) const;
  // α from x = f(S) w, where xᵀ S x is as expected.
  bool finish(const std::vector<double>& x, double expected, double squared_scale, double* alpha) const;
  double trace() const;                                                // of S, at least its largest eigenvalue
  double full_rank_scale(double smallest, const Policy& policy) const; // s
  bool certified_smallest(double smallest, std::vector<double> x) const;
  bool certified(double t, const double* y, const std::vector<double>& x, double least, double size) const;
  void unscale(double* x) const; // x = L⁻ᵀ x

  int64_t T_;
  int64_t n_ = 0;                    // rows that are not zero
  int64_t found_ = 0;                // of them, pivots
  int64_t stride_ = 0;               // of L
  int exponent_ = 0;                 // M = 4^exponent S
  std::vector<int64_t> order_;       // row of M that is row i of L
  std::unique_ptr<double[]> S_;      // [n, n], rows in the order of L
  std::unique_ptr<double[]> L_;      // [n, stride], lower triangle
  std::unique_ptr<double[]> A_;      // [n, n]
  std::vector<double> lengths_;      // a_i
  std::vector<double> lam_;          // of S
  std::unique_ptr<Tridiagonal> tri_; // of A
};

} // namespace fastmtl::cpu
