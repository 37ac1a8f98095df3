#include "spectral.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../math/thresholds.h"
#include "definite.h"
#include "kernels.h"
#include "threads.h"

namespace fastmtl::cpu {

namespace {

constexpr int64_t kMaxPanel = kMaxCholeskyPanel;

// f(block) for blocks of columns of a triangle, long ones paired with short ones.
template <class F>
void share_blocks(int64_t blocks, F&& f) {
  parallel_for(0, (blocks + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      f(u);
      if (blocks - 1 - u != u) {
        f(blocks - 1 - u);
      }
    }
  });
}

// A -= X Xᵀ over rows and columns from `end` on, lower triangle, X columns [begin, end) of A.
void update_trailing(double* A, int64_t n, int64_t stride, int64_t begin, int64_t end) {
  const int64_t panel = kernels().cholesky_panel;
  share_blocks((n - end + panel - 1) / panel, [&](int64_t block) {
    alignas(64) double P[kMaxPanel * kMaxPanel] = {};
    const int64_t c0 = end + block * panel, width = std::min(panel, n - c0);
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t k = begin; k < end; ++k) {
        P[(k - begin) * panel + c] = A[(c0 + c) * stride + k];
      }
    }
    kernels().subtract_panel(A, stride, begin, end, P, false, c0, n, A + c0, stride, width);
  });
}

void swap_rows(double* A, int64_t n, int64_t stride, int64_t j, int64_t p) { // of a lower triangle, and columns
  std::swap_ranges(A + j * stride, A + j * stride + j, A + p * stride);
  std::swap(A[j * stride + j], A[p * stride + p]);
  for (int64_t i = j + 1; i < p; ++i) {
    std::swap(A[i * stride + j], A[p * stride + i]);
  }
  for (int64_t i = p + 1; i < n; ++i) {
    std::swap(A[i * stride + j], A[i * stride + p]);
  }
}

// A = L Lᵀ in place, the largest pivot first; `order` follows. Returns how many there are.
int64_t factor(double* A, int64_t n, int64_t stride, int64_t* order) {
  const int64_t panel = kernels().cholesky_panel;
  const double noise = kPivotNoise * std::sqrt(double(n));
  std::vector<double> whole(static_cast<size_t>(n)), taken(static_cast<size_t>(n)), products(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    whole[size_t(i)] = A[i * stride + i];
  }
  for (int64_t begin = 0; begin < n; begin += panel) {
    const int64_t end = std::min(n, begin + panel);
    std::fill(taken.begin() + begin, taken.end(), 0.0);
    for (int64_t j = begin; j < end; ++j) {
      int64_t p = -1;
      double largest = 0.0;
      for (int64_t i = j; i < n; ++i) {
        const double left = A[i * stride + i] - taken[size_t(i)];
        if (left > largest && left > noise * whole[size_t(i)]) {
          p = i;
          largest = left;
        }
      }
      if (p < 0) {
        return j;
      }
      if (p != j) {
        swap_rows(A, n, stride, j, p);
        std::swap(whole[size_t(j)], whole[size_t(p)]);
        std::swap(taken[size_t(j)], taken[size_t(p)]);
        std::swap(order[j], order[p]);
      }
      const double root = std::sqrt(largest), inverse = 1.0 / root;
      A[j * stride + j] = root;
      double* const below = A + (j + 1) * stride;
      kernels().row_products(below + begin, stride, A + j * stride + begin, j - begin, 0, n - j - 1, products.data());
      for (int64_t i = 0; i < n - j - 1; ++i) {
        double& x = below[i * stride + j];
        x = (x - products[size_t(i)]) * inverse;
        taken[size_t(j + 1 + i)] += x * x;
      }
    }
    update_trailing(A, n, stride, begin, end);
  }
  return n;
}

// A = Lᵀ L, in full.
void product(const double* L, int64_t n, int64_t stride, double* A) {
  const int64_t panel = kernels().cholesky_panel;
  const std::unique_ptr<double[]> upper(new double[size_t(n * stride)]);
  constexpr int64_t kTile = 16;
  parallel_for(0, (n + kTile - 1) / kTile, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i0 = begin * kTile; i0 < std::min(n, end * kTile); i0 += kTile) {
      const int64_t i1 = std::min(n, i0 + kTile);
      for (int64_t k0 = std::max<int64_t>(0, i0 - kTile); k0 < n; k0 += kTile) { // a tile may begin further left
        for (int64_t i = i0; i < i1; ++i) {
          for (int64_t k = k0; k < std::min(n, k0 + kTile); ++k) {
            upper[size_t(i * stride + k)] = L[k * stride + i];
          }
        }
      }
    }
  });
  share_blocks((n + panel - 1) / panel, [&](int64_t block) {
    const int64_t c0 = block * panel, width = std::min(panel, n - c0);
    std::vector<double> P(static_cast<size_t>((n - c0) * panel));
    for (int64_t k = c0; k < n; ++k) {
      for (int64_t c = 0; c < std::min(width, k - c0 + 1); ++c) {
        P[size_t((k - c0) * panel + c)] = -L[k * stride + c0 + c];
      }
    }
    for (int64_t i = c0; i < n; ++i) {
      std::fill_n(A + i * n + c0, width, 0.0);
    }
    kernels().subtract_panel(upper.get(), stride, c0, n, P.data(), true, c0, n, A + c0, n, width);
  });
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      A[j * n + i] = A[i * n + j];
    }
  }
}

double squares(const double* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    sum += x[i] * x[i];
  }
  return sum;
}

// A vector to which an eigenvector is orthogonal only by accident.
std::vector<double> scattered(int64_t n) {
  std::vector<double> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    x[size_t(i)] = 1.0 / double(1 + i % 7) - (i % 2 ? 0.6 : 0.0);
  }
  return x;
}

} // namespace

bool Spectral::reduce(const double* M) {
  double largest = 0.0, smallest = std::numeric_limits<double>::infinity();
  order_.clear();
  for (int64_t i = 0; i < T_; ++i) {
    const double d = M[i * T_ + i];
    if (d > 0.0) {
      order_.push_back(i);
      largest = std::max(largest, d);
      smallest = std::min(smallest, d);
    }
  }
  n_ = int64_t(order_.size());
  if (n_ < 2 || !(largest <= kSpectralMaxRatio * smallest)) {
    return false;
  }
  std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return M[a * T_ + a] > M[b * T_ + b]; });
  std::frexp(largest, &exponent_);
  exponent_ = (exponent_ + (exponent_ & 1)) / 2;
  const double half = std::ldexp(1.0, -exponent_);
  stride_ = (n_ + 7) / 8 * 8 + 8;
  L_.reset(new double[size_t(n_ * stride_)]);
  const auto fill = [&](double lift) {
    for (int64_t i = 0; i < n_; ++i) {
      const double* row = M + order_[size_t(i)] * T_;
      for (int64_t j = 0; j <= i; ++j) {
        L_[size_t(i * stride_ + j)] = row[order_[size_t(j)]] * half * half;
      }
      L_[size_t(i * stride_ + i)] *= 1.0 + lift;
    }
  };
  fill(0.0);
  found_ = factor(L_.get(), n_, stride_, order_.data());
  if (found_ < n_) { // dependent to rounding, which the rank rule leaves out
    fill(kLift * double(n_));
    if (factor(L_.get(), n_, stride_, order_.data()) < n_) {
      return false;
    }
  }
  for (int64_t i = 0; i < n_; ++i) {
    std::fill_n(L_.get() + i * stride_ + i + 1, n_ - i - 1, 0.0);
  }
  A_.reset(new double[size_t(n_ * n_)]);
  product(L_.get(), n_, stride_, A_.get());
  lengths_.resize(size_t(n_));
  for (int64_t i = 0; i < n_; ++i) {
    lengths_[size_t(i)] = std::sqrt(A_[size_t(i * n_ + i)]);
  }
  tri_.reset(new Tridiagonal(A_.get(), n_));
  S_.reset(new double[size_t(n_ * n_)]);
  for (int64_t i = 0; i < n_; ++i) {
    const double* row = M + order_[size_t(i)] * T_;
    for (int64_t j = 0; j < n_; ++j) {
      S_[size_t(i * n_ + j)] = row[order_[size_t(j)]] * half * half;
    }
  }
  return true;
}

void Spectral::unscale(double* x) const {
  for (int64_t i = n_ - 1; i >= 0; --i) {
    const double* row = L_.get() + i * stride_;
    const double a = x[i] /= row[i];
    for (int64_t j = 0; j < i; ++j) {
      x[j] -= a * row[j];
    }
  }
}

bool Spectral::smallest(double* below, double* above) const {
  if (found_ < T_ || !tri_->smallest(below, above)) {
    return false;
  }
  *below = std::ldexp(*below, 2 * exponent_);
  *above = std::ldexp(*above, 2 * exponent_);
  return true;
}

bool Spectral::solve(double* eigenvalues) {
  lam_.resize(size_t(n_));
  if (!tri_->solve(lam_.data(), true)) {
    return false;
  }
  for (int64_t j = 0; j < T_; ++j) {
    eigenvalues[j] = j < found_ ? std::ldexp(std::max(0.0, lam_[size_t(j)]), 2 * exponent_) : 0.0;
  }
  return true;
}

// λ_min of S from below by a factorisation, from above by a Rayleigh quotient, x being the eigenvector of A.
bool Spectral::certified_smallest(double smallest, std::vector<double> x) const {
  if (!(smallest > 0.0) || !is_positive_definite(S_.get(), n_, (1.0 - kCertified) * smallest)) {
    return false;
  }
  const double above = squares(x.data(), n_);
  unscale(x.data());
  return above > 0.0 && above <= (1.0 + kCertified) * smallest * squares(x.data(), n_);
}

// Whether x = (A + t)⁻¹ y solves it in the units of each row, which are at least `least`.
bool Spectral::certified(double t, const double* y, const std::vector<double>& x, double least, double size) const {
  std::vector<double> products(static_cast<size_t>(n_));
  kernels().row_products(A_.get(), n_, x.data(), n_, 0, n_, products.data());
  double worst = 0.0;
  for (int64_t i = 0; i < n_; ++i) {
    const double left = y[i] - t * x[size_t(i)] - products[size_t(i)];
    worst = std::max(worst, std::fabs(left) / std::max(lengths_[size_t(i)], least));
  }
  return worst <= kRowError * size;
}

// Of the rows of L, in their order.
std::vector<double> Spectral::task_weights(const Policy& policy) const {
  std::vector<double> w(static_cast<size_t>(n_));
  for (int64_t i = 0; i < n_; ++i) {
    w[size_t(i)] = policy.weights ? policy.weights[order_[size_t(i)]] : 1.0 / double(T_);
  }
  return w;
}

bool Spectral::finish(const std::vector<double>& x, double expected, double squared_scale, double* alpha) const {
  std::vector<double> products(static_cast<size_t>(n_));
  kernels().row_products(S_.get(), n_, x.data(), n_, 0, n_, products.data());
  const double form = std::inner_product(x.begin(), x.end(), products.begin(), 0.0);
  if (!(std::fabs(form - expected) <= kFormError * expected)) {
    return false;
  }
  const double root = std::sqrt(squared_scale) * std::ldexp(1.0, -exponent_);
  std::fill_n(alpha, T_, 0.0);
  for (int64_t i = 0; i < n_; ++i) {
    alpha[order_[size_t(i)]] = root * x[size_t(i)];
  }
  return true;
}

bool Spectral::full_rank_weights(double smallest, const Policy& policy, double* alpha) const {
  const std::vector<double> w = task_weights(policy);
  std::vector<double> y(static_cast<size_t>(n_)), x(static_cast<size_t>(n_));
  kernels().add_rows(L_.get(), stride_, w.data(), n_, n_, y.data()); // y = Lᵀ w
  const double size = std::sqrt(squares(w.data(), n_)), low = std::ldexp(smallest, -2 * exponent_);
  if (!(tri_->growth(lengths_.data(), 0.0) <= kMaxGrowth)) {
    return false;
  }
  for (const double t : {0.0, std::sqrt(low * tri_->largest())}) {
    tri_->resolvent(t, y.data(), x.data());
    if (!certified(t, y.data(), x, 0.0, size)) {
      return false;
    }
  }
  tri_->resolvent(-low, scattered(n_).data(), x.data()); // this near an eigenvalue nothing else counts
  if (!certified_smallest(low, x)) {
    return false;
  }
  tri_->inverse_root(low, y.data(), y.data());
  unscale(y.data());
  return finish(y, size * size, full_rank_scale(smallest, policy), alpha);
}

double Spectral::trace() const {
  double sum = 0.0;
  for (int64_t i = 0; i < n_; ++i) {
    sum += S_[size_t(i * n_ + i)];
  }
  return sum;
}

double Spectral::full_rank_scale(double smallest, const Policy& policy) const {
  if (policy.scale == Scale::min) {
    return smallest;
  }
  return std::ldexp(trace() / double(n_), 2 * exponent_);
}

bool Spectral::smallest_directly(double* smallest) const {
  const double pivot = L_[size_t((n_ - 1) * stride_ + n_ - 1)];
  if (found_ < T_ || !smallest_eigenvalue(S_.get(), n_, pivot * pivot, smallest)) {
    return false;
  }
  *smallest = std::ldexp(*smallest, 2 * exponent_);
  return true;
}

bool Spectral::direct_weights(double smallest, const Policy& policy, double* alpha) const {
  const std::vector<double> w = task_weights(policy);
  const PartialFractions f = inverse_root_fractions(std::ldexp(smallest, -2 * exponent_), trace(), kDirectError);
  PanelCholesky shifted(n_);
  std::vector<double> sum(static_cast<size_t>(n_)), x(static_cast<size_t>(n_));
  for (size_t j = 0; j < f.t.size(); ++j) {
    x = w;
    if (!shifted.factor(S_.get(), -f.t[j])) {
      return false;
    }
    shifted.solve(x.data());
    for (size_t i = 0; i < x.size(); ++i) {
      sum[i] += f.c[j] * x[i];
    }
  }
  return finish(sum, squares(w.data(), n_), full_rank_scale(smallest, policy), alpha);
}

bool Spectral::weights(const double* eigenvalues, int64_t R, const Policy& policy, double* alpha) const {
  if (R == 0 || R > found_ || !(lam_[size_t(R - 1)] > 0.0)) {
    return false;
  }
  const bool full = R == n_;
  const std::vector<double> w = task_weights(policy);
  std::vector<double> y(static_cast<size_t>(n_)), x(static_cast<size_t>(n_)), f(static_cast<size_t>(n_));
  kernels().add_rows(L_.get(), stride_, w.data(), n_, n_, y.data()); // y = Lᵀ w
  const double size = std::sqrt(squares(w.data(), n_)), low = lam_[size_t(R - 1)];
  const double least = full ? 0.0 : std::sqrt(low); // of a row that counts
  if (!(tri_->growth(lengths_.data(), least) <= (full ? kMaxGrowth : kMaxGrowthTruncated))) {
    return false;
  }
  for (const double t : {full ? 0.0 : low, std::sqrt(low * lam_[0])}) {
    for (int64_t j = 0; j < n_; ++j) {
      f[size_t(j)] = 1.0 / (std::max(0.0, lam_[size_t(j)]) + t);
    }
    tri_->apply(f.data(), y.data(), x.data());
    if (!certified(t, y.data(), x, least, size)) {
      return false;
    }
  }
  std::fill(f.begin(), f.end(), 0.0);
  if (full) {
    f[size_t(n_ - 1)] = 1.0;
    tri_->apply(f.data(), scattered(n_).data(), x.data());
    if (!certified_smallest(low, x)) {
      return false;
    }
  }
  for (int64_t j = 0; j < R; ++j) {
    f[size_t(j)] = 1.0 / std::sqrt(lam_[size_t(j)]);
  }
  tri_->apply(f.data(), y.data(), y.data());
  const double expected = full ? size * size : squares(y.data(), n_);
  unscale(y.data());
  return finish(y, expected, squared_scale(eigenvalues, R, policy.scale), alpha);
}

} // namespace fastmtl::cpu
