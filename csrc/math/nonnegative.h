// argmin ½ xᵀCx - pᵀx over x >= 0, which MGDA, the projection on the dual cone and CAGrad all come down to.
//
// C [T, T] is positive semi-definite with a diagonal of one (up to two): gradients of unit length. The solution has
// slope s = Cx - p >= 0 with s_t = 0 where x_t > 0.
//
// 1. Block principal pivoting (Júdice and Pires 1994; Kim and Park 2011) guesses the support S, solves C_S x_S = p_S,
//    and exchanges all indices with x_t < 0 or s_t < 0 at once; where that does not lead to fewer of them, one by one
//    for a while. It takes a handful of factorisations, and is done for only where C_S is regular.
// 2. Where it is not, or where that takes too long: the active-set method of Lawson and Hanson (1974), which lets in
//    one index at a time and never leaves x >= 0. An index that depends on the support to rounding comes in along the
//    null vector of both, in exchange for the one that gets to zero first; so C_S stays regular.
//
// Both end in a solution on a support that is judged by its slope, whatever led there.
#pragma once

#include "cholesky.h"

namespace fastmtl {
namespace {

constexpr int64_t kFullExchanges = 3;
constexpr int64_t kMaxFactors = 25;
constexpr double kNegligible = 1e-10;       // entries of a null vector below this are rounding
constexpr double kDoubtful = 1e-12;         // a solution worse than this is looked for again, from the start
constexpr double kSolved = 4.0 * kRounding; // slopes this small, times sqrt(T) and the size of the terms, are zero

// C = D^-1/2 M D^-1/2 with D the diagonal; zero gradients become orthogonal to all others.
template <class Team>
FASTMTL_HOST_DEVICE void unit_rows(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    double* C,         // [T, T]
    double* norms,     // [T]
    double* inverse) { // [T], 0 for zero gradients
  team.each(T, [=](int64_t i) {
    const double square = M[i * T + i];
    norms[i] = square > 0.0 ? std::sqrt(square) : 0.0;
    inverse[i] = square > 0.0 ? 1.0 / norms[i] : 0.0;
  });
  for (int64_t i = 0; i < T; ++i) {
    const double a = inverse[i];
    const double* m = M + i * T;
    double* c = C + i * T;
    team.each(T, [=](int64_t j) { c[j] = j == i ? 1.0 : m[j] * a * inverse[j]; });
  }
}

// y = A x
template <class Team>
FASTMTL_HOST_DEVICE void multiply(
    Team team,
    const double* A, // [T, T], symmetric
    int64_t T,
    const double* x, // [T]
    double* y) {     // [T]
  team.each(T, [=](int64_t j) { y[j] = 0.0; });
  subtract_rows(team, T, [=](int64_t k) { return -x[k]; }, [=](int64_t k) { return A + k * T; }, T, y);
}

struct Nonnegative : Cholesky {
  double* x;     // [T]
  double* slope; // [T], Cx - p
  double* work;  // [2 T]
  bool factored; // whether U is the factor of C over the support

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t T) {
    return T * T + 6 * T;
  }

  FASTMTL_HOST_DEVICE Nonnegative(const double* C, int64_t T, double* scratch)
      : Cholesky{C, T, scratch, scratch + T * T, reinterpret_cast<int64_t*>(scratch + T * T + T), 0},
        x(scratch + T * T + 2 * T),
        slope(x + T),
        work(slope + T),
        factored(false) {}

  // Which support is tried first: the indices with f(t).
  template <class Team, class F>
  FASTMTL_HOST_DEVICE void start(Team team, F f) {
    int64_t* const support = this->support;
    const int64_t T = this->T;
    int64_t n = 0;
    team.once([=] {
      for (int64_t t = 0, n = 0; t < T; ++t) {
        if (f(t)) {
          support[n++] = t;
        }
      }
    });
    for (int64_t t = 0; t < T; ++t) {
      n += f(t) ? 1 : 0;
    }
    count = n;
    factored = false;
  }

  // Solves for p, from the support as it is. `size` is that of the terms that p is made of. Returns how much the
  // optimality conditions are violated, relative to size + Σx.
  template <class Team>
  FASTMTL_HOST_DEVICE FASTMTL_ONE_COPY double solve_for(Team team, const double* p, double size) {
    if (!exchange(team, p, size)) {
      settle(team, p);
      grow(team, p, size);
      if (!(residual(team, size) <= kDoubtful)) {
        count = 0;
        settle(team, p);
        grow(team, p, size);
      }
    }
    return residual(team, size);
  }

  template <class Team>
  FASTMTL_HOST_DEVICE double total(Team team) const {
    const double* const x = this->x;
    return team.sum(T, [=](int64_t t) { return x[t]; });
  }

  template <class Team>
  FASTMTL_HOST_DEVICE double residual(Team team, double size) const {
    const double* const x = this->x;
    const double* const slope = this->slope;
    const double worst = team.largest(T, [=](int64_t t) { return x[t] > 0.0 ? std::fabs(slope[t]) : -slope[t]; });
    return worst > 0.0 ? worst / (size + total(team)) : 0.0;
  }

 private:
  FASTMTL_HOST_DEVICE double tolerance(double size) const {
    return kSolved * std::sqrt(double(T)) * size;
  }

  // slope = Cx - p for an x that vanishes off the support, where it has the values y [count].
  template <class Team>
  FASTMTL_HOST_DEVICE void differentiate(Team team, const double* p, const double* y) const {
    double* const slope = this->slope;
    const double* const C = this->C;
    const int64_t* const support = this->support;
    const int64_t T = this->T;
    team.each(T, [=](int64_t t) { slope[t] = -p[t]; });
    subtract_rows(
        team, count, [=](int64_t k) { return -y[k]; }, [=](int64_t k) { return C + support[k] * T; }, T, slope);
  }

  template <class Team>
  FASTMTL_HOST_DEVICE bool exchange(Team team, const double* p, double size) {
    double *const x = this->x, *const y = work, *const inside = work + T;
    const double* const slope = this->slope;
    int64_t* const support = this->support;
    const int64_t T = this->T;
    int64_t fewest = T + 1, left = kFullExchanges;
    for (int64_t step = 0; step < kMaxFactors; ++step) {
      if (!factored && !this->factor(team)) {
        return false;
      }
      factored = true;
      const int64_t n = count;
      team.each(n, [=](int64_t i) { y[i] = p[support[i]]; });
      this->solve(team, y);
      differentiate(team, p, y);
      team.each(T, [=](int64_t t) {
        x[t] = 0.0;
        inside[t] = 0.0;
      });
      team.each(n, [=](int64_t i) {
        x[support[i]] = y[i];
        inside[support[i]] = 1.0;
      });
      const double limit = tolerance(size + team.sum(n, [=](int64_t i) { return std::fabs(y[i]); }));
      const auto wrong = [=](int64_t t) { return inside[t] > 0.0 ? !(x[t] > 0.0) : slope[t] < -limit; };
      const int64_t count_wrong = int64_t(team.sum(T, [=](int64_t t) { return wrong(t) ? 1.0 : 0.0; }));
      if (count_wrong == 0) {
        // A factor of a nearly singular C_S may say so wrongly.
        return team.largest(n, [=](int64_t i) { return std::fabs(slope[support[i]]); }) <= 16.0 * limit;
      }
      bool all = true;
      if (count_wrong < fewest) {
        fewest = count_wrong;
        left = kFullExchanges;
      } else if (left > 0) {
        --left;
      } else {
        all = false;
      }
      const int64_t last = team.argmax(T, [=](int64_t t) { return wrong(t) ? double(t) : -1.0; });
      start(team, [=](int64_t t) { return (inside[t] > 0.0) != (wrong(t) && (all || t == last)); });
    }
    return false;
  }

  // From the support as it is to one on which C is regular and the solution positive, where `grow` can begin: without
  // the indices that depend on those before them, and, again and again, those with x_t <= 0.
  template <class Team>
  FASTMTL_HOST_DEVICE void settle(Team team, const double* p) {
    double *const x = this->x, *const y = work;
    int64_t* const support = this->support;
    thin(team);
    for (;;) {
      const int64_t n = count;
      team.each(n, [=](int64_t i) { y[i] = p[support[i]]; });
      this->solve(team, y);
      const int64_t positive = int64_t(team.sum(n, [=](int64_t i) { return y[i] > 0.0 ? 1.0 : 0.0; }));
      if (positive == n) {
        break;
      }
      team.once([=] {
        for (int64_t i = 0, kept = 0; i < n; ++i) {
          if (y[i] > 0.0) {
            support[kept++] = support[i];
          }
        }
      });
      count = positive;
      if (!this->factor(team)) {
        thin(team);
      }
    }
    factored = true;
    team.each(T, [=](int64_t t) { x[t] = 0.0; });
    team.each(count, [=](int64_t i) { x[support[i]] = y[i]; });
  }

  // Factors C over those of the support that do not depend on the ones before them.
  template <class Team>
  FASTMTL_HOST_DEVICE void thin(Team team) {
    double *const y = work, *const before = work + T;
    const int64_t* const support = this->support;
    const int64_t n = count;
    team.each(n, [=](int64_t i) { before[i] = double(support[i]); });
    count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = int64_t(before[i]);
      const double pivot = this->column(team, t, y);
      if (pivot > noise(count)) {
        this->append(team, t, y, pivot);
      }
    }
  }

  // The method of Lawson and Hanson, from what `settle` has left.
  template <class Team>
  FASTMTL_HOST_DEVICE void grow(Team team, const double* p, double size) {
    double *const x = this->x, *const y = work, *const barred = work + T; // in the support, or of no use where x is now
    const double* const slope = this->slope;
    int64_t* const support = this->support;
    const int64_t T = this->T;
    team.each(T, [=](int64_t t) { barred[t] = x[t] > 0.0 ? 1.0 : 0.0; });
    differentiate(team, p, y);
    double limit = tolerance(size + total(team));
    for (int64_t step = 0; step < 20 * T + 20; ++step) {
      const int64_t entering = team.argmax(T, [=](int64_t t) { return barred[t] > 0.0 ? -kInfinity : -slope[t]; });
      if (entering < 0 || !(-slope[entering] > limit)) {
        break;
      }
      team.once([=] { barred[entering] = 1.0; });
      if (!let_in(team, entering)) {
        continue;
      }
      // Towards the solution on the support as far as x >= 0 allows; whoever gets to zero there leaves.
      bool moved = x[entering] > 0.0;
      for (;;) {
        team.each(count, [=](int64_t i) { y[i] = p[support[i]]; });
        this->solve(team, y);
        const auto reach = [=](int64_t i) { // how far, of 1, until x gets to zero
          const double from = x[support[i]];
          return y[i] > 0.0 ? kInfinity : from > 0.0 ? from / (from - y[i]) : 0.0;
        };
        const int64_t leaving = team.argmax(count, [=](int64_t i) { return -reach(i); });
        if (leaving < 0) {
          team.each(count, [=](int64_t i) { x[support[i]] = y[i]; });
          moved = true;
          break;
        }
        const double by = reach(leaving);
        moved = moved || by > 0.0;
        const int64_t gone = support[leaving];
        team.each(count, [=](int64_t i) {
          const double next = x[support[i]] + by * (y[i] - x[support[i]]);
          x[support[i]] = i == leaving || !(next > 0.0) ? 0.0 : next;
        });
        this->remove(team, leaving, y);
        team.once([=] { barred[gone] = gone == entering ? 1.0 : 0.0; });
        if (count == 0) {
          break;
        }
      }
      team.each(count, [=](int64_t i) { y[i] = x[support[i]]; });
      differentiate(team, p, y);
      limit = tolerance(size + total(team));
      if (moved) {
        team.each(T, [=](int64_t t) { barred[t] = 0.0; });
        team.each(count, [=](int64_t i) { barred[support[i]] = 1.0; });
      }
    }
    team.each(count, [=](int64_t i) { y[i] = x[support[i]]; });
    differentiate(team, p, y);
  }

  // Adds t to the support, at x_t = 0 unless others had to make room; false where the null vector leads nowhere.
  template <class Team>
  FASTMTL_HOST_DEVICE bool let_in(Team team, int64_t t) {
    double *const x = this->x, *const y = work, *const barred = work + T;
    int64_t* const support = this->support;
    for (;;) {
      const double pivot = this->column(team, t, y);
      if (pivot > noise(count)) {
        this->append(team, t, y, pivot);
        return true;
      }
      this->backward(team, y); // C (e_t - y) = 0
      const int64_t leaving =
          team.argmax(count, [=](int64_t i) { return y[i] > kNegligible ? -x[support[i]] / y[i] : -kInfinity; });
      if (leaving < 0) {
        return false;
      }
      const int64_t gone = support[leaving];
      const double by = x[gone] / y[leaving];
      team.each(count, [=](int64_t i) {
        const double next = x[support[i]] - by * y[i];
        x[support[i]] = i == leaving || !(next > 0.0) ? 0.0 : next;
      });
      team.once([=] {
        x[t] += by;
        barred[gone] = 0.0;
      });
      this->remove(team, leaving, y);
    }
  }
};

} // namespace
} // namespace fastmtl
