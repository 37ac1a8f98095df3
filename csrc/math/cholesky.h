// C_S + δ = Uᵀ D^-1 U for the rows and columns S of a symmetric matrix: row i of U is what elimination has left of row
// i, and D its diagonal (Cholesky without the roots). All of it in steps x -= Σ a_k r_k over rows that are contiguous.
// A factor costs n³/3, a solution 2 n², a row more or less n² multiply-adds.
//
// C has a unit diagonal, or one between 1 and 2: what rounding leaves of a row that depends on those before it is at
// most `noise(n)`.
#pragma once

#include "team.h"

namespace fastmtl {
namespace {

FASTMTL_HOST_DEVICE inline double noise(int64_t n) {
  return 2.0 * double(n + 2) * kRounding;
}

// y[j] -= Σ_k a(k) row(k)[j] over j < n, k < count.
template <class Team, class Factor, class Row>
FASTMTL_HOST_DEVICE void subtract_rows(Team team, int64_t count, Factor a, Row row, int64_t n, double* y) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const double a0 = a(k), a1 = a(k + 1), a2 = a(k + 2), a3 = a(k + 3);
    const double *r0 = row(k), *r1 = row(k + 1), *r2 = row(k + 2), *r3 = row(k + 3);
    team.each(n, [=](int64_t j) { y[j] -= (a0 * r0[j] + a1 * r1[j]) + (a2 * r2[j] + a3 * r3[j]); });
  }
  for (; k < count; ++k) {
    const double a0 = a(k);
    const double* r0 = row(k);
    team.each(n, [=](int64_t j) { y[j] -= a0 * r0[j]; });
  }
}

// Rows of U and the inverses of D, from rows i of the matrix that fill(i, u) writes from u[i] on, and D_i = pivot(i,
// what is left). False where that is not positive.
template <class Team, class Fill, class Pivot>
FASTMTL_HOST_DEVICE bool eliminate(
    Team team,
    int64_t n,
    Fill fill,
    Pivot pivot,
    double* U, // [n, T]
    int64_t T,
    double* inverse) { // [n]
  for (int64_t i = 0; i < n; ++i) {
    double* u = U + i * T;
    fill(i, u);
    subtract_rows(
        team,
        i,
        [=](int64_t k) { return U[k * T + i] * inverse[k]; },
        [=](int64_t k) { return U + k * T + i; },
        n - i,
        u + i);
    const double D = pivot(i, u[i]);
    if (!(D > 0.0)) {
      return false;
    }
    team.once([=] {
      u[i] = D;
      inverse[i] = 1.0 / D;
    });
  }
  return true;
}

struct Cholesky {
  const double* C; // [T, T]
  int64_t T;
  double* U;        // [T, T], upper triangle
  double* inverse;  // [T], 1 / D
  int64_t* support; // [T], the first `count` are S
  int64_t count;
  double ridge = 0.0; // δ

  // Factors C + ridge over the support; false where a row depends on those before it to rounding.
  template <class Team>
  FASTMTL_HOST_DEVICE bool factor(Team team) const {
    const double* const C = this->C;
    const int64_t* const support = this->support;
    const int64_t T = this->T, n = count;
    const double ridge = this->ridge;
    return eliminate(
        team,
        n,
        [=](int64_t i, double* u) {
          const double* from = C + support[i] * T;
          team.each(n - i, [=](int64_t j) { u[i + j] = from[support[i + j]]; });
        },
        [=](int64_t i, double left) { return left + ridge > noise(i) ? left + ridge : 0.0; },
        U,
        T,
        inverse);
  }

  // y <- Uᵀ^-1 y
  template <class Team>
  FASTMTL_HOST_DEVICE void forward(Team team, double* y) const {
    for (int64_t i = 0; i < count; ++i) {
      const double* u = U + i * T;
      const double a = y[i] * inverse[i];
      team.each(count - i - 1, [=](int64_t j) { y[i + 1 + j] -= a * u[i + 1 + j]; });
    }
  }

  // y <- U^-1 D y, which follows `forward`.
  template <class Team>
  FASTMTL_HOST_DEVICE void backward(Team team, double* y) const {
    for (int64_t i = count - 1; i >= 0; --i) {
      const double* u = U + i * T;
      const double right = y[i], over = inverse[i];
      const double known = team.sum(count - i - 1, [=](int64_t j) { return u[i + 1 + j] * y[i + 1 + j]; });
      team.once([=] { y[i] = (right - known) * over; });
    }
  }

  // y <- C_S^-1 y
  template <class Team>
  FASTMTL_HOST_DEVICE void solve(Team team, double* y) const {
    forward(team, y);
    backward(team, y);
  }

  // The column of U that C's row `t` would add, in y; returns its diagonal. `append` makes it part of the factor.
  template <class Team>
  FASTMTL_HOST_DEVICE double column(Team team, int64_t t, double* y) const {
    const double* from = C + t * T;
    const double* const inverse = this->inverse;
    const int64_t* const support = this->support;
    team.each(count, [=](int64_t i) { y[i] = from[support[i]]; });
    forward(team, y);
    return from[t] + ridge - team.sum(count, [=](int64_t i) { return y[i] * y[i] * inverse[i]; });
  }

  template <class Team>
  FASTMTL_HOST_DEVICE void append(Team team, int64_t t, const double* y, double pivot) {
    double* const to = U + count;
    double* const inverse = this->inverse;
    int64_t* const support = this->support;
    const int64_t T = this->T, n = count;
    team.each(n, [=](int64_t i) { to[i * T] = y[i]; });
    team.once([=] {
      to[n * T] = pivot;
      inverse[n] = 1.0 / pivot;
      support[n] = t;
    });
    ++count;
  }

  // Takes entry k out of the support: the rows behind it get back what it took from them, w wᵀ / δ (Gill et al. 1974).
  template <class Team>
  FASTMTL_HOST_DEVICE void remove(Team team, int64_t k, double* w) {
    double* const inverse = this->inverse;
    int64_t* const support = this->support;
    const int64_t behind = --count - k;
    for (int64_t i = 0; i < k; ++i) {
      double* u = U + i * T + k;
      team.each(behind, [=](int64_t j) { w[j] = u[j + 1]; });
      team.each(behind, [=](int64_t j) { u[j] = w[j]; });
    }
    double delta = U[k * T + k];
    const double* gone = U + k * T + k + 1;
    team.each(behind, [=](int64_t j) { w[j] = gone[j]; });
    for (int64_t i = 0; i < behind; ++i) {
      double* to = U + (k + i) * (T + 1);
      const double* from = to + T + 1;
      double* rest = w + i;
      const double pivot = from[0], a = w[i] / delta, b = w[i] / pivot, lifted = pivot + a * w[i];
      team.each(behind - i - 1, [=](int64_t j) {
        const double u = from[j + 1], x = rest[j + 1];
        to[j + 1] = u + a * x;
        rest[j + 1] = x - b * u;
      });
      team.once([=] {
        to[0] = lifted;
        inverse[k + i] = 1.0 / lifted;
        support[k + i] = support[k + i + 1];
      });
      delta *= lifted / pivot;
    }
  }
};

} // namespace
} // namespace fastmtl
