// Eigenvalues of one symmetric matrix, and a function of it times a vector, without its eigenvectors.
//
// M = Q S Qᵀ with S tridiagonal, Q = H_{T-1} ... H_1 a product of reflections H_n = I - τ v vᵀ, and S = Z Λ Zᵀ with Z
// the product of the rotations of implicit QL. V = Q Z is never formed: V f(Λ) Vᵀ w = Q Z f(Λ) Zᵀ Qᵀ w.
//
// Reduction (Dongarra, Sorensen and Hammarling 1989; LAPACK's dsytrd), from the last row up: H_n takes what is left of
// row n to its last entry. Up to kPanel steps make a panel V, W [n, kPanel], during which the matrix A stays as it was:
//     y = A v - V (Wᵀ v) - W (Vᵀ v),  w = τ (y - τ/2 (vᵀ y) v),  and in the end A -= V Wᵀ + W Vᵀ.
// A v and the update take 2/3 T³ flops each. A v reads a triangle of A, each element once and used twice: 4/3 T³ bytes,
// from the third-level cache where T is above about 700, and that is what takes the time; every other step walks the
// triangle backwards, to meet first what the second-level cache still holds. The update's sums stay in the registers;
// it reads and writes 8/3 T³ / kPanel bytes. The products with V and W are 3 kPanel T² flops and 8 kPanel T² bytes from
// the second-level cache.
//
// QL (Francis 1961; EISPACK's tql2): about two sweeps an eigenvalue, T² rotations, each waiting for the root
// and the quotient of the one before. They are kept where they are wanted, 16 bytes each; a vector meets them once
// there and once back. Q costs a vector 4 T² flops and 8 T² bytes. An off-diagonal e_i falls to zero once e_i² <= eps²
// |d_i d_{i+1}|.
//
// The matrix is scaled by a power of two to entries near one, beside which 2^-465 is zero. Backward stable: eigenvalues
// are off by a few eps λ_max; where rows are of very different norms, by far less, as they are taken in ascending
// order. The bits do not depend on the number of threads: sums are split by T alone.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fastmtl::cpu {

// Σ_j c_j / (x + t_j)
struct PartialFractions {
  std::vector<double> t, c;
};

// x^-1/2 for low <= x <= high, to a relative `error`.
PartialFractions inverse_root_fractions(double low, double high, double error);

class Tridiagonal {
 public:
  // M [T, T], symmetric and finite.
  Tridiagonal(const double* M, int64_t T);

  // How λ_min lies: below < λ_min <= above, a relative 1e-13 apart. False where M is not positive definite but for
  // rounding. Like all that follows up to `solve`, before that.
  bool smallest(double* below, double* above) const;

  // A number that no eigenvalue exceeds.
  double largest() const;

  // y = (M + t I)⁻¹ w, where that is positive definite. y may be w.
  void resolvent(double t, const double* w, double* y) const;

  // y = M^-1/2 w, where all eigenvalues are at least `smallest` > 0. y may be w.
  void inverse_root(double smallest, const double* w, double* y) const;

  // Eigenvalues in descending order, once only; `rotations` keeps what `apply` needs. False and NaN should QL not
  // converge.
  bool solve(double* eigenvalues, bool rotations);

  // By how much the reflections have mixed rows of different lengths [T], at least `floor`: the largest of what one
  // takes from a row to one that is shorter. One where M is diagonal.
  double growth(const double* lengths, double floor) const;

  // y = V diag(f) Vᵀ w, f in the order of the eigenvalues. y may be w.
  void apply(const double* f, const double* w, double* y) const;

 private:
  struct Sweep {
    int64_t first; // row
    int64_t step;
    int64_t count;
    double* rotations;
  };

  void reduce(double* tiles);
  // y = Q Σ_j c_j (S + t_j I)⁻¹ Qᵀ w
  void shifted(const PartialFractions& f, const double* w, double* y) const;
  void to_basis(const double* w, double* x) const; // x = Qᵀ w, whole blocks
  void from_basis(double* x, double* y) const;     // y = Q x; overwrites x
  double* keep(int64_t rotations);                 // memory for so many more of them
  // QL of rows first ... last of S, between which no off-diagonal entry is small. False where it does not converge.
  bool solve_block(int64_t first, int64_t last, bool rotations);
  bool falls(int64_t i); // whether e_i counts as zero; makes it so

  int64_t T_;
  int exponent_ = 0; // M = 2^exponent Q S Qᵀ
  std::unique_ptr<double[]> memory_;
  double* vectors_;                                  // v of H_1, then of H_2, ..., whole blocks
  std::vector<double> tau_;                          // of H_n
  std::vector<double> diagonal_;                     // d_0 ... d_{T-1}
  std::vector<double> off_;                          // 0, e_0 ... e_{T-2}, 0
  std::vector<std::unique_ptr<double[]>> rotations_; // c, s, ... in pieces
  int64_t used_ = 0, capacity_ = 0;                  // doubles of the last piece
  std::vector<Sweep> sweeps_;
  std::vector<int64_t> rows_;  // of M, by ascending diagonal entry
  std::vector<int64_t> order_; // rows of Λ by descending eigenvalue
  int64_t left_;               // sweeps until it is given up
};

} // namespace fastmtl::cpu
