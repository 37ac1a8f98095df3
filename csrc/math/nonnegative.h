// argmin ½ xᵀCx - pᵀx over x >= 0, which MGDA, the projection on the dual cone and CAGrad all come down to.
//
// C [T, T] is positive semi-definite with a diagonal of one (up to two): gradients of unit length. The solution has
// slope s = Cx - p >= 0 with s_t = 0 where x_t > 0. Where gradients depend on each other it is not unique, and C has no
// factors. So it is approached by proximal points (Rockafellar 1976),
//
//   x_k = argmin ½ xᵀ(C + δ)x - (p + δ x_{k-1})ᵀx over x >= 0,    x_0 = 0,
//
// each of them unique, continuous in C and p, and off in the slope by δ (x_k - x_{k-1}) only. With δ = 64 T roundings
// the first is nearly as good as C is known, and one to three more leave nothing but rounding; where C is regular they
// are iterated refinement.
//
// 1. Block principal pivoting (Júdice and Pires 1994; Kim and Park 2011) guesses the support S, solves for x_S, and
//    exchanges all indices with x_t < 0 or s_t < 0 at once: a handful of factorisations, unless it runs in circles.
// 2. Then the active-set method of Lawson and Hanson (1974) goes on from x >= 0, which it never leaves: one index at a
//    time, downhill, for T² multiply-adds each.
//
// A Gram matrix from products in float32 is indefinite by their rounding, and there may be no minimum. Where a pivot
// shows that, C's diagonal is raised until there are factors: the residual is that of the raised C.
#pragma once

#include "cholesky.h"

namespace fastmtl {
namespace {

// C = D^-1/2 M D^-1/2 with D the diagonal, which is positive: cosines. M's upper triangle
// is read: one from products in float32 may be asymmetric by rounding, which is more than the solvers leave. M may lie
// where C is made.
template <class Team>
FASTMTL_HOST_DEVICE void unit_rows(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    double* C,         // [T, T]
    double* norms,     // [T]
    double* inverse) { // [T]
  team.each(T, [=](int64_t i) {
    norms[i] = std::sqrt(M[i * T + i]);
    inverse[i] = 1.0 / norms[i];
  });
  for (int64_t i = 0; i < T; ++i) {
    const double a = inverse[i];
    const double* m = M + i * T;
    double* c = C + i * T;
    team.each(i, [=](int64_t j) { c[j] = C[j * T + i]; });
    team.each(T - i, [=](int64_t k) {
      const double cosine = m[i + k] * a * inverse[i + k];
      c[i + k] = k == 0 || !(cosine < 1.0) ? 1.0 : cosine > -1.0 ? cosine : -1.0;
    });
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
  double* matrix; // C, where it may be raised
  double* x;      // [T]
  double* slope;  // [T], Cx - p
  double* before; // [T], the proximal point before x
  double* work;   // [2 T]
  double raised;  // what C's diagonal has got
  bool factored;  // whether U is the factor of C + δ over the support

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t T) {
    return T * T + 7 * T;
  }

  FASTMTL_HOST_DEVICE Nonnegative(double* C, int64_t T, double* scratch)
      : Cholesky{
            C,
            T,
            scratch,
            scratch + T * T,
            reinterpret_cast<int64_t*>(scratch + T * T + T),
            0,
            kProximal * double(T)},
        matrix(C),
        x(scratch + T * T + 2 * T),
        slope(x + T),
        before(slope + T),
        work(before + T),
        raised(0.0),
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
    double *const x = this->x, *const before = this->before;
    double violation = kInfinity;
    team.each(T, [=](int64_t t) { x[t] = 0.0; });
    for (int64_t k = 0; k < kMaxPoints; ++k) {
      team.each(T, [=](int64_t t) { before[t] = x[t]; });
      if (!exchange(team, p, size)) {
        grow(team, p, size);
      }
      const double last = violation;
      violation = residual(team, size);
      if (!(violation < last)) { // only rounding is left, and the point before had less of it
        team.each(T, [=](int64_t t) { x[t] = before[t]; });
        double* const slope = this->slope;
        multiply(team, C, T, x, slope);
        team.each(T, [=](int64_t t) { slope[t] -= p[t]; });
        return last;
      }
      if (violation > 0.5 * last || violation <= kRounding) {
        break;
      }
    }
    return violation;
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
    return worst <= 0.0 ? 0.0 : worst / (size + total(team)); // NaN stays
  }

 private:
  FASTMTL_HOST_DEVICE double tolerance(double size) const {
    return kSolved * std::sqrt(double(T)) * size;
  }

  // y [count] <- the minimum of the proximal problem on the support.
  template <class Team>
  FASTMTL_HOST_DEVICE void minimise(Team team, const double* p, double* y) {
    const double* const before = this->before;
    const int64_t* const support = this->support;
    const double ridge = this->ridge;
    while (!factored) {
      factored = this->factor(team);
      if (!factored) {
        raise(team);
      }
    }
    team.each(count, [=](int64_t i) { y[i] = p[support[i]] + ridge * before[support[i]]; });
    this->solve(team, y);
  }

  // x and slope = Cx - p from the values y [count] on the support.
  template <class Team>
  FASTMTL_HOST_DEVICE void assign(Team team, const double* p, const double* y) const {
    double *const x = this->x, *const slope = this->slope;
    const double* const C = this->C;
    const int64_t* const support = this->support;
    const int64_t T = this->T;
    team.each(T, [=](int64_t t) {
      x[t] = 0.0;
      slope[t] = -p[t];
    });
    team.each(count, [=](int64_t i) { x[support[i]] = y[i]; });
    subtract_rows(
        team, count, [=](int64_t k) { return -y[k]; }, [=](int64_t k) { return C + support[k] * T; }, T, slope);
  }

  // Block principal pivoting; false where it leads nowhere.
  template <class Team>
  FASTMTL_HOST_DEVICE bool exchange(Team team, const double* p, double size) {
    double *const y = work, *const inside = work + T;
    const double *const x = this->x, *const slope = this->slope, *const before = this->before;
    const int64_t* const support = this->support;
    const int64_t T = this->T;
    const double ridge = this->ridge;
    int64_t fewest = T + 1;
    for (int64_t left = kExchanges; left > 0; --left) {
      minimise(team, p, y);
      assign(team, p, y);
      team.each(T, [=](int64_t t) { inside[t] = 0.0; });
      team.each(count, [=](int64_t i) { inside[support[i]] = 1.0; });
      const double limit = tolerance(size + team.sum(count, [=](int64_t i) { return std::fabs(y[i]); }));
      const auto wrong = [=](int64_t t) {
        return inside[t] > 0.0 ? !(x[t] > 0.0) : slope[t] - ridge * before[t] < -limit;
      };
      const int64_t count_wrong = int64_t(team.sum(T, [=](int64_t t) { return wrong(t) ? 1.0 : 0.0; }));
      if (count_wrong == 0) {
        return true;
      }
      if (count_wrong < fewest) {
        fewest = count_wrong;
        left = kExchanges;
      }
      start(team, [=](int64_t t) { return (inside[t] > 0.0) != wrong(t); });
    }
    return false;
  }

  // The method of Lawson and Hanson, from where `exchange` has left.
  template <class Team>
  FASTMTL_HOST_DEVICE void grow(Team team, const double* p, double size) {
    double *const x = this->x, *const y = work, *const barred = work + T; // in the support, or of no use where x is now
    const double *const slope = this->slope, *const before = this->before;
    const int64_t* const support = this->support;
    const int64_t T = this->T;
    const double ridge = this->ridge;
    team.each(T, [=](int64_t t) { x[t] = x[t] > 0.0 ? x[t] : 0.0; });
    start(team, [=](int64_t t) { return x[t] > 0.0; });
    team.each(T, [=](int64_t t) { barred[t] = x[t]; });
    bool moved = true;
    for (int64_t step = 0; step < 20 * T + 20; ++step) {
      // Towards the minimum on the support as far as x >= 0 allows; whoever gets to zero there leaves.
      for (;;) {
        minimise(team, p, y);
        const auto reach = [=](int64_t i) { // how far, of 1, until x gets to zero
          const double from = x[support[i]];
          return y[i] > 0.0 ? kInfinity : from > 0.0 ? from / (from - y[i]) : 0.0;
        };
        const int64_t leaving = team.argmax(count, [=](int64_t i) { return -reach(i); });
        if (leaving < 0) {
          moved = true;
          break;
        }
        const double by = reach(leaving);
        moved = moved || by > 0.0;
        team.each(count, [=](int64_t i) {
          const double to = x[support[i]] + by * (y[i] - x[support[i]]);
          x[support[i]] = i == leaving || !(to > 0.0) ? 0.0 : to;
        });
        this->remove(team, leaving, y);
      }
      assign(team, p, y);
      const double limit = tolerance(size + total(team));
      if (moved) {
        team.each(T, [=](int64_t t) { barred[t] = x[t]; });
      }
      const int64_t entering =
          team.argmax(T, [=](int64_t t) { return barred[t] > 0.0 ? -kInfinity : ridge * before[t] - slope[t]; });
      if (entering < 0 || !(ridge * before[entering] - slope[entering] > limit)) {
        return;
      }
      team.once([=] { barred[entering] = 1.0; });
      moved = false;
      const double pivot = this->column(team, entering, y);
      this->append(team, entering, y, pivot);
      factored = pivot > noise(count);
    }
  }

  // For a C that is not positive semi-definite; T would be enough for any.
  template <class Team>
  FASTMTL_HOST_DEVICE void raise(Team team) {
    double* const C = matrix;
    const int64_t T = this->T;
    const double next = 16.0 * (raised > 0.0 ? raised : ridge), by = next - raised;
    team.each(T, [=](int64_t t) { C[t * T + t] += by; });
    raised = next;
  }
};

} // namespace
} // namespace fastmtl
