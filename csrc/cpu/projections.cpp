#include "projections.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "../math/solvers.h"
#include "kernels.h"
#include "threads.h"

namespace fastmtl::cpu {

namespace {

// From this many matrices on, each is the work of one thread.
constexpr int64_t kEnoughMatrices = 16;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// x > 0 on a support, the largest first.
struct Solution {
  std::vector<int64_t> support;
  std::vector<double> x;
  double raised = 0.0; // what was added to C's diagonal
  double residual = 0.0;
};

// argmin ½ xᵀCx - pᵀx over x >= 0, for one p after the other.
class Solver {
 public:
  Solver(const double* C, int64_t T)
      : C_(C),
        T_(T),
        stride_((T / kSetPadding + 2) * kSetPadding),
        delta_(kProximal * double(T)),
        U_(new double[size_t(T * stride_)]),
        memory_(size_t(5 * T)),
        y_(memory_.data()),
        slope_(y_ + T),
        before_(slope_ + T),
        inverse_(before_ + T),
        inside_(inverse_ + T) {}

  // From the support and the raise of `found`; false if the solution is not certified. `never` stays out (-1: none).
  bool solve(const double* p, double size, int64_t never, Solution& found) {
    set_ = found.support;
    raised_ = found.raised;
    factored_ = 0;
    std::fill_n(before_, T_, 0.0);
    double last = kInfinity;
    found.residual = kInfinity;
    for (int64_t k = 0; k < kMaxPoints && exchange(p, size, never); ++k) {
      const double now = residual(size);
      if (now < last) {
        found.support = set_;
        found.x.assign(y_, y_ + set_.size());
        found.residual = now;
      }
      if (!(now <= 0.5 * last) || now <= kRounding) {
        break;
      }
      last = now;
      std::fill_n(before_, T_, 0.0);
      for (size_t i = 0; i < set_.size(); ++i) {
        before_[set_[i]] = y_[i];
      }
    }
    found.raised = raised_;
    return found.residual <= kSolutionError;
  }

 private:
  void factor() {
    const int64_t n = int64_t(set_.size());
    while (factored_ < n) {
      const bool good = kernels().set_factor(
          C_, T_, set_.data(), factored_, n, delta_ + raised_, 2.0 * kRounding, U_.get(), stride_, inverse_);
      factored_ = good ? n : 0;
      raised_ = good ? raised_ : 16.0 * (raised_ > 0.0 ? raised_ : delta_);
    }
  }

  // y and the slopes of the proximal problem around `before`; false if its support is not found.
  bool exchange(const double* p, double size, int64_t never) {
    int64_t fewest = T_ + 1, patience = kPatience;
    for (int64_t round = 0; round < kMaxRounds; ++round) {
      const int64_t n = int64_t(set_.size());
      factor();
      for (int64_t i = 0; i < n; ++i) {
        y_[i] = p[set_[size_t(i)]] + delta_ * before_[set_[size_t(i)]];
      }
      kernels().set_solve(U_.get(), n, stride_, inverse_, y_);
      for (int64_t j = 0; j < T_; ++j) {
        slope_[j] = -p[j];
        inside_[j] = 0.0;
      }
      kernels().set_products(C_, T_, set_.data(), n, y_, slope_);
      double sum = size;
      int64_t wrong = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t j = set_[size_t(i)];
        inside_[j] = 1.0;
        slope_[j] += raised_ * y_[i];
        sum += std::fabs(y_[i]);
        wrong += !(y_[i] > 0.0);
      }
      const double limit = kSolved * std::sqrt(double(T_)) * sum;
      const auto below = [&](int64_t j) { return slope_[j] - delta_ * before_[j]; };
      entering_.clear();
      for (int64_t j = 0; j < T_; ++j) {
        if (below(j) < -limit && inside_[j] == 0.0 && j != never) {
          entering_.push_back({below(j), j});
        }
      }
      wrong += int64_t(entering_.size());
      if (wrong == 0) {
        return true;
      }
      patience = wrong < fewest ? kPatience : patience - 1;
      fewest = std::min(fewest, wrong);
      const size_t most = patience > 0 ? size_t(std::max(kEnterLeast, int64_t(kEnter * double(n)))) : 1;
      if (entering_.size() > most) {
        std::nth_element(entering_.begin(), entering_.begin() + int64_t(most), entering_.end());
        entering_.resize(most);
      }
      std::sort(entering_.begin(), entering_.end());
      size_t kept = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (y_[i] > 0.0) {
          set_[kept++] = set_[size_t(i)];
        } else {
          factored_ = std::min(factored_, i);
        }
      }
      set_.resize(kept);
      for (const auto& [slope, j] : entering_) {
        set_.push_back(j);
      }
    }
    return false;
  }

  // By how much the conditions are violated: slope >= 0, and 0 on the support.
  double residual(double size) const {
    double worst = 0.0, sum = size;
    for (int64_t j = 0; j < T_; ++j) {
      worst = larger(worst, inside_[j] > 0.0 ? std::fabs(slope_[j]) : -slope_[j]);
    }
    for (size_t i = 0; i < set_.size(); ++i) {
      sum += y_[i];
    }
    return worst / sum;
  }

  const double* C_; // [T, T]
  int64_t T_, stride_;
  double delta_, raised_ = 0.0;
  std::unique_ptr<double[]> U_; // [T, stride]: that of C over the support, `factored` columns of it
  int64_t factored_ = 0;
  std::vector<double> memory_;
  double *y_, *slope_, *before_, *inverse_, *inside_; // [T] each
  std::vector<int64_t> set_;
  std::vector<std::pair<double, int64_t>> entering_;
};

// The largest first.
void sort_solution(Solution& found) {
  std::vector<int64_t> order(found.support.size());
  std::iota(order.begin(), order.end(), int64_t(0));
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double x = found.x[size_t(a)], y = found.x[size_t(b)];
    return x > y || (x == y && found.support[size_t(a)] < found.support[size_t(b)]);
  });
  Solution sorted = found;
  for (size_t i = 0; i < order.size(); ++i) {
    sorted.support[i] = found.support[size_t(order[i])];
    sorted.x[i] = found.x[size_t(order[i])];
  }
  found = std::move(sorted);
}

// What csrc/math/dual_cone.h finds for u, as a `Solution`: v - u on rows of unit length.
void solve_alone(const double* C, int64_t T, const double* u, Solution& found) {
  DualCone method;
  method.weights = u;
  method.each = false;
  std::vector<double> v(static_cast<size_t>(T)), scratch(static_cast<size_t>(DualCone::scratch(T)));
  found.residual = kernels().solvers[kSolver<DualCone>](&method, C, T, 0, 0, v.data(), scratch.data());
  found.support.clear();
  found.x.clear();
  for (int64_t j = 0; j < T; ++j) {
    if (v[size_t(j)] > u[j]) {
      found.support.push_back(j);
      found.x.push_back(v[size_t(j)] - u[j]);
    }
  }
}

// Starts task t from the solution of the nearest of the tasks [0, begin), which have one.
void start_from_nearest(
    const double* row,
    const double* weights,
    int64_t begin,
    int64_t t,
    std::vector<Solution>& found) {
  int64_t nearest = -1;
  for (int64_t j = 0; j < begin; ++j) {
    nearest = weights[j] > 0.0 && (nearest < 0 || row[j] > row[nearest]) ? j : nearest;
  }
  if (nearest >= 0) {
    Solution& one = found[size_t(t)];
    one = found[size_t(nearest)];
    one.support.erase(std::remove(one.support.begin(), one.support.end(), t), one.support.end());
  }
}

// The projections of every task, for weights of 1, -1 or 0 in place of its own.
std::vector<Solution> project_tasks(const double* C, int64_t T, const double* weights) {
  std::vector<Solution> found(static_cast<size_t>(T));
  for (int64_t begin = 0, end = 1; begin < T; begin = end, end = std::min(T, 2 * end)) {
    parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
      Solver solver(C, T);
      std::vector<double> right(static_cast<size_t>(T));
      for (int64_t t = first; t < last; ++t) {
        Solution& one = found[size_t(t)];
        bool solved = weights[t] == 0.0;
        if (weights[t] > 0.0) {
          start_from_nearest(C + t * T, weights, begin, t, found);
          for (int64_t j = 0; j < T; ++j) {
            right[size_t(j)] = -C[t * T + j];
          }
          solved = solver.solve(right.data(), 1.0, t, one);
        }
        if (!solved) {
          std::fill(right.begin(), right.end(), 0.0);
          right[size_t(t)] = weights[t] > 0.0 ? 1.0 : -1.0;
          solve_alone(C, T, right.data(), one);
        }
        sort_solution(one);
      }
    });
  }
  return found;
}

// The projection for u / `longest` = `scaled`, on rows of unit length.
Solution project_once(const double* C, int64_t T, const double* scaled) {
  std::vector<double> p(static_cast<size_t>(T));
  multiply(Serial{}, C, T, scaled, p.data());
  double size = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    p[size_t(t)] = -p[size_t(t)];
    size += std::fabs(scaled[t]);
  }
  Solution found;
  if (!Solver(C, T).solve(p.data(), size, -1, found)) {
    solve_alone(C, T, scaled, found);
  }
  return found;
}

// One matrix, whose diagonal is positive.
double project(const double* M, int64_t T, const double* weights, bool each, double* alpha) {
  std::vector<double> memory(static_cast<size_t>(T * T + 3 * T));
  double *const C = memory.data(), *const norms = C + T * T, *const inverse = norms + T, *const scaled = inverse + T;
  unit_rows(Serial{}, M, T, C, norms, inverse);
  // Lengths of the gradients times their weights, these in units of a power of two: no length leaves the range.
  int unit = 0;
  double largest = 0.0, longest = 0.0, residual = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    largest = std::max(largest, std::fabs(weights[t]));
    alpha[t] = weights[t];
  }
  std::frexp(largest, &unit);
  for (int64_t t = 0; t < T; ++t) {
    scaled[t] = norms[t] * std::ldexp(weights[t], -unit);
    longest = std::max(longest, std::fabs(scaled[t]));
  }
  const auto add = [&](const Solution& found, double length) {
    for (size_t i = 0; i < found.support.size(); ++i) {
      const int64_t j = found.support[i];
      alpha[j] += std::ldexp(found.x[i] * length * inverse[j], unit);
    }
    residual = larger(residual, found.residual);
  };
  if (each) {
    const std::vector<Solution> found = project_tasks(C, T, weights);
    for (int64_t t = 0; t < T; ++t) {
      add(found[size_t(t)], std::fabs(scaled[t]));
    }
  } else if (longest > 0.0) {
    for (int64_t t = 0; t < T; ++t) {
      scaled[t] /= longest;
    }
    add(project_once(C, T, scaled), longest);
  }
  for (int64_t t = 0; t < T; ++t) { // as many more of that size may be summed
    residual = 0.0 * (double(T) * alpha[t]) == 0.0 ? residual : kInfinity;
  }
  return residual;
}

} // namespace

void projections(
    const double* M,
    int64_t B,
    int64_t T,
    const double* weights,
    bool each,
    double* alpha,
    double* residual) {
  const std::vector<double> even(static_cast<size_t>(T), 1.0 / double(T));
  const auto range = [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(static_cast<size_t>(present_scratch(T) + T * T));
    const auto one = [=](const double* N, int64_t n, const double* u, double* v, double*) {
      return project(N, n, u, each, v);
    };
    for (int64_t b = begin; b < end; ++b) {
      if (all_finite(Serial{}, M + b * T * T, T * T)) {
        residual[b] = for_present(
            Serial{}, M + b * T * T, T, weights ? weights : even.data(), alpha + b * T, scratch.data(), one);
      } else {
        std::fill_n(alpha + b * T, T, kNan);
        residual[b] = kNan;
      }
    }
  };
  if (B >= kEnoughMatrices) {
    parallel_for(0, B, 1, range);
  } else { // one at a time, on several threads
    range(0, B);
  }
}

} // namespace fastmtl::cpu
