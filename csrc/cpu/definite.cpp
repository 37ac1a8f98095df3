#include "definite.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "../common.h"
#include "../math/thresholds.h"
#include "kernels.h"
#include "threads.h"

namespace fastmtl::cpu {

namespace {

// Up to this many tasks a matrix is factored in one piece.
constexpr int64_t kSmallFactor = 64;
// The fewest rows of a factorisation, or of a product with a vector, that a thread takes; a multiple of every tile.
constexpr int64_t kRows = 60;
// Up to this many multiply-adds another thread is not worthwhile.
constexpr int64_t kSerial = int64_t(1) << 19;
constexpr int64_t kParts = 8; // of a product with a vector

// f(begin, end) for rows [first, T), which cost `work` multiply-adds each.
template <class F>
void share_rows(int64_t first, int64_t T, int64_t work, F&& f) {
  const int64_t units = (T - first + kRows - 1) / kRows;
  const auto range = [&](int64_t begin, int64_t end) { f(first + begin * kRows, std::min(T, first + end * kRows)); };
  if ((T - first) * work <= kSerial) {
    range(0, units);
  } else {
    parallel_for(0, units, 1, range);
  }
}

// M^(-1/2) w may take T / 4 steps, or this many: more, in vain, would cost as much as the tridiagonalisation that would
// follow.
constexpr int64_t kKrylovLeastSteps = 48;

double norm(const double* x, int64_t n) {
  double square = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    square += x[i] * x[i];
  }
  return std::sqrt(square);
}

// Eigenvalues of a symmetric tridiagonal matrix into its diagonal d [m], eigenvectors into the columns of Z [m, m], by
// implicit QL (Golub and Van Loan, section 8.3). `e` [m]: what is beside the diagonal; overwritten.
bool tridiagonal_eigh(double* d, double* e, int64_t m, double* Z) {
  for (int64_t i = 0; i < m * m; ++i) {
    Z[i] = i % (m + 1) == 0 ? 1.0 : 0.0;
  }
  e[m - 1] = 0.0;
  for (int64_t l = 0; l < m; ++l) {
    for (int64_t iteration = 0;; ++iteration) {
      int64_t end = l;
      while (end < m - 1 && std::fabs(e[end]) > kQlEnd * (std::fabs(d[end]) + std::fabs(d[end + 1]))) {
        ++end;
      }
      if (end == l) {
        break;
      }
      if (iteration == 60) {
        return false;
      }
      double g = (d[l + 1] - d[l]) / (2.0 * e[l]), r = std::hypot(g, 1.0);
      g = d[end] - d[l] + e[l] / (g + std::copysign(r, g));
      double s = 1.0, c = 1.0, p = 0.0;
      int64_t i = end - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        e[i + 1] = r = std::hypot(f, g);
        if (r == 0.0) {
          d[i + 1] -= p;
          e[end] = 0.0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - p;
        r = (d[i] - g) * s + 2.0 * c * b;
        p = s * r;
        d[i + 1] = g + p;
        g = c * r - b;
        for (int64_t k = 0; k < m; ++k) {
          const double z = Z[k * m + i + 1];
          Z[k * m + i + 1] = s * Z[k * m + i] + c * z;
          Z[k * m + i] = c * Z[k * m + i] - s * z;
        }
      }
      if (r == 0.0 && i >= l) {
        continue;
      }
      d[l] -= p;
      e[l] = g;
      e[end] = 0.0;
    }
  }
  return true;
}

// The Krylov space of a symmetric operator from a start, fully orthogonalised: A Q = Q S + rest, S tridiagonal.
class Lanczos {
 public:
  Lanczos(const double* start, int64_t T)
      : T_(T), stride_((T + 7) / 8 * 8), Q_(size_t((kKrylovMaxSteps + 1) * stride_)) {
    length_ = norm(start, T);
    for (int64_t i = 0; i < T; ++i) {
      Q_[size_t(i)] = start[i] / length_;
    }
  }

  // Adds a dimension; false if the space cannot grow further.
  template <class F>
  bool extend(F&& apply) { // apply(x, y): y = A x
    const double* q = Q_.data() + m_ * stride_;
    double* next = Q_.data() + (m_ + 1) * stride_;
    apply(q, next);
    const double before = norm(next, T_);
    double coefficients[kKrylovMaxSteps + 1];
    double along = 0.0;
    for (int pass = 0; pass < 2; ++pass) {
      kernels().row_products(Q_.data(), stride_, next, T_, 0, m_ + 1, coefficients);
      along += coefficients[m_];
      for (int64_t i = 0; i <= m_; ++i) {
        coefficients[i] = -coefficients[i];
      }
      kernels().add_rows(Q_.data(), stride_, coefficients, m_ + 1, T_, next);
    }
    diagonal_[m_] = along;
    const double rest = norm(next, T_);
    beside_[m_] = rest;
    ++m_;
    if (!(rest > kKrylovEnd * before)) {
      beside_[m_ - 1] = 0.0;
      return false;
    }
    for (int64_t i = 0; i < T_; ++i) {
      next[i] /= rest;
    }
    return m_ < kKrylovMaxSteps;
  }

  // The eigenproblem of S.
  bool solve() {
    std::copy_n(diagonal_, m_, ritz_);
    double e[kKrylovMaxSteps];
    std::copy_n(beside_, m_, e);
    Z_.resize(size_t(m_ * m_));
    return tridiagonal_eigh(ritz_, e, m_, Z_.data());
  }

  int64_t steps() const {
    return m_;
  }
  int64_t smallest() const {
    return std::min_element(ritz_, ritz_ + m_) - ritz_;
  }
  int64_t largest() const {
    return std::max_element(ritz_, ritz_ + m_) - ritz_;
  }
  double ritz(int64_t j) const {
    return ritz_[j];
  }
  double residual(int64_t j) const { // of Ritz pair j
    return std::fabs(beside_[m_ - 1] * Z_[size_t((m_ - 1) * m_ + j)]);
  }

  // The coefficients of A^-1/2 start in the basis Q.
  void inverse_root(double* coefficients) const { // [m]
    std::fill_n(coefficients, m_, 0.0);
    for (int64_t j = 0; j < m_; ++j) {
      const double factor = length_ * Z_[size_t(j)] / std::sqrt(ritz_[j]);
      for (int64_t i = 0; i < m_; ++i) {
        coefficients[i] += factor * Z_[size_t(i * m_ + j)];
      }
    }
  }

  void eigenvector(int64_t j, double* y) const { // Ritz vector j; y [T]
    double coefficients[kKrylovMaxSteps];
    for (int64_t i = 0; i < m_; ++i) {
      coefficients[i] = Z_[size_t(i * m_ + j)];
    }
    expand(coefficients, y);
  }

  void expand(const double* coefficients, double* y) const { // y [T]
    std::fill_n(y, T_, 0.0);
    kernels().add_rows(Q_.data(), stride_, coefficients, m_, T_, y);
  }

 private:
  int64_t T_, stride_, m_ = 0;
  double length_;
  std::vector<double> Q_, Z_; // [steps + 1, stride], [m, m]
  double diagonal_[kKrylovMaxSteps], beside_[kKrylovMaxSteps], ritz_[kKrylovMaxSteps];
};

// Adds a vector a tenth as long as a unit vector, to which an eigenvector could be orthogonal only by accident.
void scatter(double* x, int64_t T) {
  const double size = kScatter * 0x1p-63 / std::sqrt(double(T));
  uint64_t state = 0;
  for (int64_t i = 0; i < T; ++i) { // SplitMix64 (Steele, Lea and Flood 2014)
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    x[i] += size * double(int64_t(z ^ (z >> 31)));
  }
}

// x -> M x / unit, in parts of the upper triangle of about equal area, whose number does not depend on that of threads.
class Product {
 public:
  Product(const double* M, int64_t T, double unit) : M_(M), T_(T), unit_(unit), sums_(size_t(kParts * T)) {}

  void operator()(const double* x, double* y) {
    const auto parts = [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        kernels().symmetric_rows(M_, T_, x, bound(p), p + 1 == kParts ? T_ : bound(p + 1), &sums_[size_t(p * T_)]);
      }
    };
    if (T_ * T_ <= kSerial) {
      parts(0, kParts);
    } else {
      parallel_for(0, kParts, 1, parts);
    }
    for (int64_t i = 0; i < T_; ++i) {
      y[i] = sums_[size_t(i)];
    }
    for (int64_t p = 1; p < kParts; ++p) {
      for (int64_t i = bound(p); i < T_; ++i) {
        y[i] += sums_[size_t(p * T_ + i)];
      }
    }
    for (int64_t i = 0; i < T_; ++i) {
      y[i] /= unit_;
    }
  }

 private:
  int64_t bound(int64_t part) const {
    return int64_t(double(T_) * (1.0 - std::sqrt(1.0 - double(part) / double(kParts)))) / 4 * 4;
  }

  const double* M_; // [T, T]
  int64_t T_;
  double unit_;
  std::vector<double> sums_; // [kParts, T]
};

// M^-1/2 w in the basis of `space`, which grows until four more steps change nothing. False if that takes too many, or
// if an eigenvalue turns out to be at most `cut`.
bool inverse_root(Lanczos& space, Product& multiply, double cut, int64_t most, double* coefficients) {
  double before[kKrylovMaxSteps] = {};
  for (bool more = true;;) {
    more = space.extend(multiply);
    if (more && space.steps() % 4) {
      continue;
    }
    if (!space.solve() || !(space.ritz(space.smallest()) > cut)) { // Ritz values lie above the smallest eigenvalue
      return false;
    }
    space.inverse_root(coefficients);
    double change = 0.0, size = 0.0;
    for (int64_t i = 0; i < space.steps(); ++i) {
      change += (coefficients[i] - before[i]) * (coefficients[i] - before[i]);
      size += coefficients[i] * coefficients[i];
      before[i] = coefficients[i];
    }
    if (space.steps() >= most) {
      return false;
    }
    if (!more || change <= kKrylovChange * size) {
      return true;
    }
  }
}

// A point below λ_min, as near to an estimate as possible, and the factorisation that proves it; in units of `unit`.
// False if M is not positive definite.
bool factor_below(PanelCholesky& cholesky, const double* M, double estimate, double unit, double* below) {
  for (const double part : {0.95, 0.8, 0.5, 0.0}) {
    *below = part * estimate;
    if (cholesky.factor(M, *below * unit)) {
      return true;
    }
  }
  return false;
}

// Estimates λ_min of the matrix M of which `shifted` is the factor of M - below I; all in units of `unit`.
bool inverse_iteration(
    const PanelCholesky& shifted,
    double* start,
    int64_t T,
    double unit,
    double below,
    double* estimate) {
  Lanczos inverse(start, T);
  for (bool more = true;;) {
    more = inverse.extend([&](const double* x, double* y) {
      std::copy_n(x, T, y);
      shifted.solve(y);
      for (int64_t i = 0; i < T; ++i) {
        y[i] *= unit;
      }
    });
    if (more && inverse.steps() % 4) {
      continue;
    }
    if (!inverse.solve() || inverse.steps() >= kKrylovMaxSteps) {
      return false;
    }
    const int64_t j = inverse.largest();
    if (!more || inverse.residual(j) <= kCertified * inverse.ritz(j)) {
      *estimate = below + 1.0 / inverse.ritz(j);
      return true;
    }
  }
}

} // namespace

double row_norm(const double* M, int64_t T, bool normalized) {
  std::vector<double> inverse(static_cast<size_t>(T), 1.0);
  for (int64_t i = 0; normalized && i < T; ++i) {
    inverse[size_t(i)] = 1.0 / std::sqrt(M[i * T + i]);
  }
  double largest = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    double sum = 0.0;
    for (int64_t j = 0; j < T; ++j) {
      sum += std::fabs(M[i * T + j]) * inverse[size_t(j)];
    }
    largest = std::max(largest, sum * inverse[size_t(i)]);
  }
  return largest;
}

PanelCholesky::PanelCholesky(int64_t T)
    : T_(T),
      stride_((T + 7) / 8 * 8 + 8), // not a power of two: rows would share a set of the cache
      L_(new double[size_t(T * stride_)]),
      inverses_(
          new double[size_t((T / kernels().cholesky_panel + 1) * kernels().cholesky_panel * kernels().cholesky_panel)]),
      rows_(new double[size_t(T * kernels().cholesky_panel)]) {}

bool PanelCholesky::factor(const double* M, double shift) {
  const int64_t panel = kernels().cholesky_panel;
  for (int64_t j = 0; j < T_; j += panel) {
    double* inverse = inverses_.get() + j * panel;
    if (!kernels().cholesky_diagonal(M, T_, shift, L_.get(), stride_, j, rows_.get(), inverse)) {
      return false;
    }
    share_rows(std::min(T_, j + panel), T_, (j + panel) * panel, [&](int64_t begin, int64_t end) {
      kernels().cholesky_below(M, T_, L_.get(), stride_, j, rows_.get(), inverse, begin, end);
    });
  }
  return true;
}

void PanelCholesky::solve(double* x) const {
  kernels().cholesky_solve(L_.get(), T_, stride_, inverses_.get(), x);
}

bool is_positive_definite(const double* M, int64_t T, double shift) {
  if (T <= kSmallFactor) { // panels are not worth their inverses
    const int64_t stride = T + kSetPadding;
    Buffer<double, 2048> memory(T * stride + T);
    Buffer<int64_t, kSmallFactor> all(T);
    std::iota(all.get(), all.get() + T, int64_t(0));
    return kernels().set_factor(M, T, all.get(), 0, T, -shift, 0.0, memory.get(), stride, memory.get() + T * stride);
  }
  return PanelCholesky(T).factor(M, shift);
}

bool smallest_eigenvalue(const double* M, int64_t T, double estimate, double* below) {
  PanelCholesky cholesky(T);
  double shift;
  if (!factor_below(cholesky, M, estimate, 1.0, &shift)) {
    return false;
  }
  std::vector<double> start(static_cast<size_t>(T));
  scatter(start.data(), T);
  if (!inverse_iteration(cholesky, start.data(), T, 1.0, shift, &estimate)) {
    return false;
  }
  *below = (1.0 - kCertified) * estimate;
  return *below > 0.0 && cholesky.factor(M, *below);
}

bool definite_weights(const double* M, int64_t T, const Policy& policy, double* alpha, double* smallest) {
  if (policy.scale == Scale::median) {
    return false;
  }
  double low = std::numeric_limits<double>::infinity(), high = 0.0, trace = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    low = std::min(low, M[i * T + i]);
    high = std::max(high, M[i * T + i]);
    trace += M[i * T + i];
  }
  if (!(high <= kKrylovMaxDiagonalRatio * low)) {
    return false;
  }
  // In units of the largest diagonal entry. λ_min(C) >= λ_min(M) / max D for the row-normalised C.
  const double unit = high;
  const bool normalized = policy.rank_rule == RankRule::normalized;
  const double cut = row_norm(M, T, normalized) / (normalized ? 1.0 : unit) * policy.rtol * policy.rtol;

  std::vector<double> w(static_cast<size_t>(T), 1.0 / double(T));
  if (policy.weights) {
    std::copy_n(policy.weights, T, w.begin());
  }
  Product multiply(M, T, unit);
  Lanczos space(w.data(), T);
  double coefficients[kKrylovMaxSteps];
  if (!inverse_root(space, multiply, cut, std::clamp(T / 4, kKrylovLeastSteps, kKrylovMaxSteps), coefficients)) {
    return false;
  }
  space.expand(coefficients, alpha);

  // λ_min from above: by inverse iteration about a point below it. The factorisation proves that it is below.
  PanelCholesky cholesky(T);
  double estimate = space.ritz(space.smallest()), below;
  if (!factor_below(cholesky, M, estimate, unit, &below)) {
    return false;
  }
  double squared = trace / double(T) / unit; // of scale rmse
  if (policy.scale == Scale::min || !(below > cut)) {
    // From what the first space has found, which saves steps, and from all that it may have missed.
    space.eigenvector(space.smallest(), w.data());
    scatter(w.data(), T);
    if (!inverse_iteration(cholesky, w.data(), T, unit, below, &estimate)) {
      return false;
    }
    below = (1.0 - kCertified) * estimate;
    if (!(below > cut) || !cholesky.factor(M, below * unit)) {
      return false;
    }
    squared = policy.scale == Scale::min ? estimate : squared;
  }
  for (int64_t i = 0; i < T; ++i) {
    alpha[i] *= std::sqrt(squared);
  }
  *smallest = below * unit;
  return true;
}

} // namespace fastmtl::cpu
