#include "weights.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common.h"
#include "../math/scaling.h"
#include "definite.h"
#include "share.h"
#include "spectral.h"
#include "tridiagonal.h"

namespace fastmtl::cpu {

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

void poison(int64_t T, double* alpha, double* eigenvalues, int64_t* rank) {
  std::fill(alpha, alpha + T, kNan);
  std::fill(eigenvalues, eigenvalues + T, kNan);
  *rank = 0;
}

// Jacobi workspace for T tasks: vectors, then 2 T scratch.
int64_t psd_workspace(int64_t T) {
  return T * psd_stride(T) + 2 * T;
}

double trace(const double* M, int64_t T) {
  double sum = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    sum += M[i * T + i];
  }
  return sum;
}

// Whether all T rows are proved to be kept, given numbers between which all eigenvalues of M lie.
bool full_rank(const double* M, double smallest, double largest, int64_t T, const Policy& policy) {
  if (policy.rank_rule == RankRule::gram) {
    return smallest > largest * policy.rtol * policy.rtol;
  }
  if (proves_full_rank(smallest, largest_diagonal(M, T), T, policy.rtol)) {
    return true;
  }
  std::vector<double> C(static_cast<size_t>(T * T));
  normalize_rows(M, T, policy.zero, C.data());
  return is_positive_definite(C.data(), T, row_norm(C.data(), T, false) * policy.rtol * policy.rtol);
}

// Rank of M whose eigenvalues (descending) are known.
int64_t decide_rank(const double* M, const double* eigenvalues, int64_t T, const Policy& policy) {
  if (policy.rank_rule == RankRule::gram) {
    return kept(eigenvalues, T, policy.rtol);
  }
  int64_t positive = 0; // of M's own, Cholesky may have found fewer
  while (positive < T && eigenvalues[positive] > 0.0) {
    ++positive;
  }
  if (full_rank(M, eigenvalues[T - 1], eigenvalues[0], T, policy)) {
    return positive;
  }
  Buffer<double, 1024> memory(T * T + T + psd_workspace(T) + 8);
  double *C = memory.get(), *judged = C + T * T, *X = aligned(judged + T);
  normalize_rows(M, T, policy.zero, C);
  if (T <= kJacobiTasks || !Tridiagonal(C, T).solve(judged, false)) { // the diagonal of C is even
    kernels().psd_eigh(C, T, judged, X, X + T * psd_stride(T));
  }
  return std::min(kept(judged, T, policy.rtol), positive);
}

// α = sqrt(s) V diag(λ^-1/2, of the kept ones) Vᵀ w
void task_weights(
    const Tridiagonal& solver,
    const double* eigenvalues,
    int64_t rank,
    int64_t T,
    const Policy& policy,
    double* alpha) {
  std::vector<double> factors(static_cast<size_t>(T));
  const double s = rank ? squared_scale(eigenvalues, rank, policy.scale) : 0.0;
  for (int64_t j = 0; j < rank; ++j) {
    factors[size_t(j)] = std::sqrt(s / eigenvalues[j]);
  }
  for (int64_t i = 0; i < T; ++i) {
    alpha[i] = policy.weights ? policy.weights[i] : 1.0 / double(T);
  }
  solver.apply(factors.data(), alpha, alpha);
}

// The ratio of the longest row to the shortest, squared. If it is small, a tridiagonalisation is as accurate as M is.
double row_ratio(const double* M, int64_t T) {
  double largest = 0.0, smallest = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < T; ++i) {
    largest = std::max(largest, M[i * T + i]);
    smallest = M[i * T + i] > 0.0 ? std::min(smallest, M[i * T + i]) : smallest;
  }
  return largest / smallest;
}

// `unit_solve` of one matrix.
void unit_solve_one(const double* M, int64_t T, const double* weights, double rtol, double* alpha, double* cosines) {
  if (!all_finite(Serial{}, M, T * T)) {
    std::fill_n(alpha, T, kNan);
    std::fill_n(cosines, T, kNan);
    return;
  }
  Buffer<double, 1024> memory(T * T + 3 * T + psd_workspace(T) + 8);
  double *C = memory.get(), *inverse = C + T * T, *x = inverse + T, *lam = x + T, *X = aligned(lam + T);
  for (int64_t i = 0; i < T; ++i) {
    inverse[i] = M[i * T + i] > 0.0 ? 1.0 / std::sqrt(M[i * T + i]) : 0.0;
  }
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j < T; ++j) {
      C[i * T + j] = M[i * T + j] * inverse[i] * inverse[j];
    }
  }
  constexpr double eps = std::numeric_limits<double>::epsilon();
  const double relative_cut = std::max(rtol * rtol, 4.0 * double(T) * eps);
  const auto entry = [&](int64_t i) { return inverse[i] > 0.0 ? weights ? weights[i] : 1.0 : 0.0; };
  double squares = 0.0, reached = 0.0; // of w, and of what is kept of it
  for (int64_t i = 0; i < T; ++i) {
    squares += entry(i) * entry(i);
  }
  bool solved = false;
  if (T > kJacobiTasks) { // the diagonal of C is even
    Tridiagonal solver(C, T);
    solved = solver.solve(lam, true);
    const double cut = lam[0] * relative_cut;
    std::vector<double> kept(static_cast<size_t>(T)), part(static_cast<size_t>(T));
    for (int64_t i = 0; i < T; ++i) {
      kept[size_t(i)] = lam[i] > cut ? 1.0 : 0.0;
      lam[i] = lam[i] > cut ? 1.0 / lam[i] : 0.0;
      x[i] = entry(i);
    }
    solver.apply(kept.data(), x, part.data());
    for (const double p : part) {
      reached += p * p;
    }
    solver.apply(lam, x, x);
  }
  if (!solved) {
    kernels().psd_eigh(C, T, lam, X, X + T * psd_stride(T));
    const double cut = lam[0] * relative_cut;
    std::fill_n(x, T, 0.0);
    for (int64_t j = 0; j < T && lam[j] > cut; ++j) {
      const double* v = X + j * psd_stride(T); // of any length
      double along = 0.0, square = 0.0;
      for (int64_t i = 0; i < T; ++i) {
        along += v[i] * entry(i);
        square += v[i] * v[i];
      }
      reached += along * along / square;
      const double factor = along / square / lam[j];
      for (int64_t i = 0; i < T; ++i) {
        x[i] += factor * v[i];
      }
    }
  }
  const double least = std::max(rtol, 16.0 * double(T) * eps);
  if (!(reached > least * least * squares)) {
    std::fill_n(x, T, 0.0);
  }
  for (int64_t i = 0; i < T; ++i) {
    alpha[i] = x[i] * inverse[i];
    cosines[i] = 0.0;
  }
  for (int64_t j = 0; j < T; ++j) {
    for (int64_t i = 0; i < T; ++i) {
      cosines[i] += x[j] * C[j * T + i];
    }
  }
}

} // namespace

double largest_diagonal(const double* M, int64_t T) {
  double largest = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    largest = std::max(largest, M[i * T + i]);
  }
  return largest;
}

namespace {

// `balance_one` of a matrix whose rows are about equally long, or (`balance_uneven`) are not; false if no accuracy can
// be promised. If eigenvalues are not wanted, only the smallest is computed as long as all rows are kept.
bool balance_even(
    const double* M,
    int64_t T,
    const Policy& policy,
    bool wanted,
    double* alpha,
    double* eigenvalues,
    int64_t* rank) {
  Tridiagonal solver(M, T);
  double below, above;
  if (!wanted && policy.scale != Scale::median && solver.smallest(&below, &above) &&
      full_rank(M, below, solver.largest(), T, policy)) {
    for (int64_t i = 0; i < T; ++i) {
      alpha[i] = policy.weights ? policy.weights[i] : 1.0 / double(T);
    }
    const double root = std::sqrt(policy.scale == Scale::min ? below : trace(M, T) / double(T));
    solver.inverse_root(below, alpha, alpha);
    std::for_each(alpha, alpha + T, [&](double& a) { a *= root; });
    *rank = T;
    return true;
  }
  if (!solver.solve(eigenvalues, true)) {
    return false;
  }
  for (int64_t j = 0; j < T; ++j) {
    eigenvalues[j] = std::max(eigenvalues[j], 0.0);
  }
  *rank = decide_rank(M, eigenvalues, T, policy);
  task_weights(solver, eigenvalues, *rank, T, policy, alpha);
  return true;
}

bool balance_uneven(
    const double* M,
    int64_t T,
    const Policy& policy,
    bool wanted,
    double* alpha,
    double* eigenvalues,
    int64_t* rank) {
  Spectral solver(T);
  if (!solver.reduce(M)) {
    return false;
  }
  double below, above;
  if (!wanted && policy.scale != Scale::median && solver.smallest(&below, &above) &&
      full_rank(M, below, trace(M, T), T, policy) && solver.full_rank_weights(below, policy, alpha)) {
    *rank = T;
    return true;
  }
  if (solver.solve(eigenvalues)) {
    *rank = decide_rank(M, eigenvalues, T, policy);
    if (solver.weights(eigenvalues, *rank, policy, alpha)) {
      return true;
    }
  }
  *rank = T;
  return !wanted && policy.scale != Scale::median && solver.smallest_directly(&below) &&
         full_rank(M, below, trace(M, T), T, policy) && solver.direct_weights(below, policy, alpha);
}

} // namespace

void balance_one(const double* M, int64_t T, const Policy& policy, double* alpha, double* eigenvalues, int64_t* rank) {
  int64_t unused;
  rank = rank ? rank : &unused;
  Buffer<double, 64> own(eigenvalues ? 0 : T);
  const bool wanted = eigenvalues != nullptr;
  eigenvalues = wanted ? eigenvalues : own.get();
  if (!all_finite(Serial{}, M, T * T)) {
    poison(T, alpha, eigenvalues, rank);
    return;
  }
  const double ratio = row_ratio(M, T);
  const bool even = ratio <= kEvenRows, few = T <= (even ? kJacobiTasks : kUnevenJacobiTasks);
  if (T > 1 && (!few || ratio > kJacobiRows) &&
      (even ? balance_even : balance_uneven)(M, T, policy, wanted, alpha, eigenvalues, rank)) {
    return;
  }
  Buffer<double, 1024> memory(psd_workspace(T) + 8);
  double* X = aligned(memory.get());
  kernels().psd_eigh(M, T, eigenvalues, X, X + T * psd_stride(T));
  if (wanted && ratio > kJacobiRows) { // the eigenvalues are right, the vectors need not be
    balance_one(M, T, policy, alpha, nullptr, rank);
    return;
  }
  *rank = decide_rank(M, eigenvalues, T, policy);
  task_weights({eigenvalues, X, psd_stride(T), 1}, *rank, T, policy, alpha);
}

bool definite(const double* M, int64_t T, const Policy& policy, double* alpha, int64_t* rank, double* smallest) {
  const bool solved =
      T > kKrylovTasks && all_finite(Serial{}, M, T * T) && definite_weights(M, T, policy, alpha, smallest);
  if (solved && rank) {
    *rank = T;
  }
  return solved;
}

bool worth_lanes(int64_t B, int64_t T) {
  return T <= kMaxLanesTasks && 2 * B >= kernels().lanes;
}

void balance_lanes(
    const double* M,
    int64_t count,
    int64_t T,
    const Policy& policy,
    double* alpha,
    double* eigenvalues,
    int64_t* rank) {
  std::vector<double> memory(static_cast<size_t>(eigh_lanes_scratch(T) + count * T * T + 8));
  double *scratch = aligned(memory.data()), *vectors = scratch + eigh_lanes_scratch(T);
  kernels().eigh_lanes(M, T, count, eigenvalues, vectors, scratch);
  for (int64_t b = 0; b < count; ++b) {
    double* lam = eigenvalues + b * T;
    if (!all_finite(Serial{}, M + b * T * T, T * T)) {
      poison(T, alpha + b * T, lam, rank + b);
      continue;
    }
    std::reverse(lam, lam + T);
    for (int64_t j = 0; j < T; ++j) {
      lam[j] = std::max(lam[j], 0.0);
    }
    if (row_ratio(M + b * T * T, T) > kJacobiRows) {
      balance_one(M + b * T * T, T, policy, alpha + b * T, nullptr, rank + b);
      continue;
    }
    rank[b] = decide_rank(M + b * T * T, lam, T, policy);
    task_weights({lam, vectors + b * T * T + T - 1, -1, T}, rank[b], T, policy, alpha + b * T);
  }
}

void balance(
    const double* M,
    int64_t B,
    int64_t T,
    const Policy& policy,
    double* alpha,
    double* eigenvalues,
    int64_t* rank) {
  if (worth_lanes(B, T)) {
    const int64_t lanes = kernels().lanes;
    parallel_for(0, (B + lanes - 1) / lanes, 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin * lanes; b < std::min(B, end * lanes); b += lanes) {
        balance_lanes(M + b * T * T, std::min(lanes, B - b), T, policy, alpha + b * T, eigenvalues + b * T, rank + b);
      }
    });
    return;
  }
  share_matrices(B, T <= kAloneTasks, [&](int64_t b) {
    balance_one(M + b * T * T, T, policy, alpha + b * T, eigenvalues + b * T, rank + b);
  });
}

void align_gram(const double* M, int64_t B, int64_t T, const Policy& policy, double* alpha, int64_t* rank) {
  if (worth_lanes(B, T)) {
    Buffer<double, 64> eigenvalues(B * T);
    balance(M, B, T, policy, alpha, eigenvalues.get(), rank);
    return;
  }
  share_matrices(B, T <= kAloneTasks, [&](int64_t b) {
    double smallest;
    if (!definite(M + b * T * T, T, policy, alpha + b * T, rank + b, &smallest)) {
      balance_one(M + b * T * T, T, policy, alpha + b * T, nullptr, rank + b);
    }
  });
}

void unit_solve(
    const double* M,
    int64_t B,
    int64_t T,
    const double* weights,
    double rtol,
    double* alpha,
    double* cosines) {
  share_matrices(B, T <= kAloneTasks, [&](int64_t b) {
    unit_solve_one(M + b * T * T, T, weights, rtol, alpha + b * T, cosines + b * T);
  });
}

void eigh(const double* M, int64_t B, int64_t T, double* eigenvalues, double* eigenvectors) {
  const int64_t lanes = kernels().lanes;
  parallel_for(0, (B + lanes - 1) / lanes, 4, [&](int64_t begin, int64_t end) {
    double* scratch = thread_scratch(0, eigh_lanes_scratch(T));
    for (int64_t b = begin * lanes; b < std::min(B, end * lanes); b += lanes) {
      kernels().eigh_lanes(
          M + b * T * T, T, std::min(lanes, B - b), eigenvalues + b * T, eigenvectors + b * T * T, scratch);
    }
  });
}

} // namespace fastmtl::cpu
