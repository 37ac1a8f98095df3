#include "pipeline.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../common.h"
#include "../math/probe.h"
#include "../math/scaling.h"
#include "definite.h"
#include "spectral.h"
#include "tridiagonal.h"
#include "threads.h"

namespace fastmtl::cpu {

namespace {

// Columns that are not worth another partial sum.
constexpr int64_t kMinChunk = 2048;

// More tasks than this have their Gram from panels that all threads share (wide.h), blocks of so many columns at a
// time.
constexpr int64_t kMaxNarrowTasks = 128;
constexpr int64_t kBlockColumns = 2048;
// The leading tasks, all of which must be as independent as every task must be, of which the first block judges.
constexpr int64_t kJudgedTasks = 256;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A batch entry of at most this many elements is still in the cache when its weights are known.
constexpr int64_t kCachedElements = int64_t(1) << 17;
// Up to so many tasks, or elements, the work on one matrix is not worth sharing while there are others.
constexpr int64_t kAloneTasks = 256;
constexpr int64_t kAloneElements = int64_t(1) << 20;
// Results are written past the cache when G is larger than this: they would only push out what is read next.
constexpr int64_t kStreamBytes = int64_t(4) << 20;

int64_t columns(const Gradients& G) {
  int64_t P = 0;
  for (int64_t k = 0; k < G.count; ++k) {
    P += G.segments[k].length;
  }
  return P;
}

bool has_float64(const Gradients& G) {
  return std::any_of(G.segments, G.segments + G.count, [](const Segment& s) { return s.dtype == Dtype::f64; });
}

bool has_missing(const Gradients& G) {
  return std::any_of(G.segments, G.segments + G.count, [&](const Segment& s) {
    return std::find(s.rows, s.rows + G.tasks, nullptr) != s.rows + G.tasks;
  });
}

// Bounds of the column chunks whose partial Grams are summed in order: they depend on the shape alone, so that the
// result does not depend on the number of threads. Their number is limited by the memory of the partial sums.
std::vector<int64_t> chunk_bounds(int64_t T, int64_t P) {
  // A small G is shared by a few threads; in float32 blocks two chunks are judged alone, which may be all.
  const int64_t largest = std::clamp<int64_t>(P / (T > kMaxExactTasks ? 2 : 4), 2 * kMinChunk, 16384);
  const int64_t wanted = std::clamp<int64_t>((int64_t(1) << 19) / T, kMinChunk, largest);
  const int64_t most = std::min<int64_t>(256, std::max<int64_t>(8, (int64_t(1) << 18) / (T * T)));
  const int64_t chunks = std::clamp<int64_t>((P + wanted - 1) / wanted, 1, most);
  std::vector<int64_t> bounds(size_t(chunks) + 1);
  for (int64_t c = 0; c <= chunks; ++c) {
    bounds[size_t(c)] = c == chunks ? P : P * c / chunks / 64 * 64;
  }
  return bounds;
}

// Calls kernel(begin, end) for chunks [first, last), whose partial sums of `size` numbers are zeroed here.
template <class F>
void share_chunks(int64_t first, int64_t last, int64_t size, double* partial, F&& kernel) {
  parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
    std::fill(partial + begin * size, partial + end * size, 0.0);
    kernel(begin, end);
  });
}

void mirror(double* M, int64_t T) {
  for (int64_t i = 1; i < T; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      M[i * T + j] = M[j * T + i];
    }
  }
}

// M = Σ_c partial[c], mirrored.
void sum_chunks(const double* partial, int64_t chunks, int64_t T, double* M) {
  const auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* row = M + i * T;
      std::copy(partial + i * T + i, partial + i * T + T, row + i);
      for (int64_t c = 1; c < chunks; ++c) {
        const double* from = partial + c * T * T + i * T;
        for (int64_t j = i; j < T; ++j) {
          row[j] += from[j];
        }
      }
    }
  };
  if (chunks * T * T > (1 << 16)) {
    parallel_for(0, T, 16, rows);
  } else {
    rows(0, T);
  }
  mirror(M, T);
}

void gram_serial(const Gradients& G, double* M) {
  const int64_t T = G.tasks, bounds[2] = {0, columns(G)};
  std::fill(M, M + T * T, 0.0);
  kernels().gram_exact(G, bounds, 0, 1, M);
  mirror(M, T);
}

// The Grams of neighbours in a batch, in one walk over their columns: while one ends, the next is fetched. A batch has
// one segment a matrix, and those of neighbours are neighbours.
void gram_serial(const Gradients* G, int64_t count, double* M) {
  const int64_t T = G[0].tasks, P = columns(G[0]);
  Buffer<int64_t, 64> bounds(count + 1);
  for (int64_t b = 0; b <= count; ++b) {
    bounds[b] = b * P;
  }
  std::fill(M, M + count * T * T, 0.0);
  kernels().gram_exact({G[0].segments, count, T}, bounds.get(), 0, count, M);
  for (int64_t b = 0; b < count; ++b) {
    mirror(M + b * T * T, T);
  }
}

double* aligned(double* p) {
  return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}

// What float32 sums cost the Gram of these very gradients: Δ = D^-1/2 (M - G Gᵀ) D^-1/2, D the diagonal of M,
// multiplied with random vectors. Norms that are only guessed before G has been read stand for D^1/2, and the result is
// corrected by how wrong they were.
class Probe {
 public:
  explicit Probe(const Gradients& G)
      : T_(G.tasks),
        count_(T_ > kMaxNarrowTasks ? kWideProbes : kNarrowProbes),
        stride_(probe_stride(T_)),
        z_(size_t(count_ * stride_)),
        norms_(guessed_norms(G)) {
    for (int64_t p = 0; p < count_; ++p) {
      for (int64_t t = 0; t < T_; ++t) {
        z_[size_t(p * stride_ + t)] = probe_entry(t, p) / norms_[size_t(t)];
      }
    }
  }

  const double* vectors() const { // z [count, probe_stride(T)]
    return z_.data();
  }
  int64_t size() const { // numbers in y
    return int64_t(z_.size());
  }

  // What ‖Δ‖ is believed to be at most, from M and y = G (Gᵀ z); NaN where they are not finite.
  double bound(const double* M, const double* y) const {
    double largest = 0.0, correction = 0.0;
    for (int64_t t = 0; t < T_; ++t) {
      correction = std::max(correction, norms_[size_t(t)] / std::sqrt(M[t * T_ + t]));
    }
    for (int64_t p = 0; p < count_; ++p) {
      const double *z = z_.data() + p * stride_, *measured = y + p * stride_;
      double squares = 0.0;
      for (int64_t i = 0; i < T_; ++i) {
        double along = 0.0;
        for (int64_t j = 0; j < T_; ++j) {
          along += M[i * T_ + j] * z[j];
        }
        squares += (along - measured[i]) * (along - measured[i]) / M[i * T_ + i];
      }
      largest = squares <= largest ? largest : squares; // NaN stays
    }
    return probe_safety(count_) * std::sqrt(largest) * correction;
  }

 private:
  // Norms of the rows up to a common factor, from a few runs of columns spread evenly over G.
  static std::vector<double> guessed_norms(const Gradients& G) {
    constexpr int64_t kRuns = 16, kRun = 32;
    const int64_t T = G.tasks, P = columns(G);
    std::vector<const void*> rows(size_t(kRuns * T));
    std::vector<Segment> runs;
    int64_t k = 0, offset = 0; // the segment, and its first column
    for (int64_t run = 0; run < kRuns; ++run) {
      const int64_t column = P / kRuns * run + P % kRuns * run / kRuns;
      while (offset + G.segments[k].length <= column) {
        offset += G.segments[k++].length;
      }
      const Segment& segment = G.segments[k];
      const void** row = rows.data() + run * T;
      for (int64_t t = 0; t < T; ++t) {
        const char* all = static_cast<const char*>(segment.rows[t]);
        row[t] = all ? all + (column - offset) * element_size(segment.dtype) : nullptr;
      }
      runs.push_back({row, nullptr, std::min(kRun, segment.length - (column - offset)), segment.dtype});
    }
    std::vector<double> norms(static_cast<size_t>(T));
    double sum = 0.0;
    for (int64_t t = 0; t < T; ++t) {
      double square = 0.0;
      gram_serial({runs.data(), kRuns, 1}, &square);
      norms[size_t(t)] = std::sqrt(square);
      sum += norms[size_t(t)];
      for (Segment& run : runs) {
        ++run.rows;
      }
    }
    for (double& norm : norms) { // a row that is zero in all runs counts as an average one
      norm = norm > 0.0 ? norm : sum > 0.0 ? sum / double(T) : 1.0;
    }
    return norms;
  }

  int64_t T_, count_, stride_;
  std::vector<double> z_, norms_;
};

// M += the products of columns [begin, end), upper triangle: exact, or in float32 and then y += G (Gᵀ z).
void gram_wide(
    const Gradients& G,
    const Probe* probe, // null: exact
    int64_t begin,
    int64_t end,
    double* M,
    double* y) {
  const bool exact = !probe;
  const int64_t T = G.tasks, height = kernels().wide_panel(exact), panels = (T + height - 1) / height,
                pairs = (panels + 1) / 2;
  const int64_t blocks = (end - begin + kBlockColumns - 1) / kBlockColumns,
                widest = std::min(kBlockColumns, end - begin);
  const std::unique_ptr<double[]> memory(new double[size_t(panels * height * widest / (exact ? 1 : 2) + 8)]);
  double* packed = aligned(memory.get());
  std::vector<double> u(static_cast<size_t>(probe ? kWideProbes * widest : 0));
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = begin + (end - begin) * b / blocks, to = begin + (end - begin) * (b + 1) / blocks;
    parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) {
        kernels().wide_pack(G, from, to, panel, exact, packed);
      }
    });
    parallel_for(0, pairs * (pairs + 1), 4, [&](int64_t first, int64_t last) {
      kernels().wide_gram(packed, to - from, T, exact, first, last, M);
    });
    if (probe) {
      const float* narrow = reinterpret_cast<const float*>(packed);
      parallel_for(0, to - from, 256, [&](int64_t first, int64_t last) {
        kernels().wide_project(narrow, to - from, T, probe->vectors(), first, last, u.data());
      });
      parallel_for(0, panels, 4, [&](int64_t first, int64_t last) {
        kernels().wide_reflect(narrow, to - from, T, u.data(), first, last, y);
      });
    }
  }
}

// Whether λ_min(C) > least, C the row-normalised M.
bool well_conditioned(const double* M, int64_t T, double least) {
  std::vector<double> C(static_cast<size_t>(T * T));
  normalize_rows(M, T, 0.0, C.data());
  return is_positive_definite(C.data(), T, least);
}

// Whether float32 products may have lost bits as subnormal numbers: where a row's entries are below 1e-15 or so.
bool may_have_underflowed(const double* M, int64_t T) {
  for (int64_t i = 0; i < T; ++i) {
    if (!(M[i * T + i] >= kFloat32Square)) {
      return true;
    }
  }
  return false;
}

// The Gram from float32 blocks, if its first chunks let one expect that they are good enough; else false, with nothing
// of use in M. They are good enough where λ_min(C) is above `least`.
bool gram_from_blocks(const Gradients& G, double* M, double* least) {
  const int64_t T = G.tasks, P = columns(G);
  if (T <= kMaxExactTasks || P < 4 * T || has_float64(G)) {
    return false;
  }
  const Probe probe(G);
  std::vector<double> y(size_t(probe.size()));
  if (T > kMaxNarrowTasks) {
    const int64_t few = std::min(T, kJudgedTasks), judged = std::min(P, 4 * few);
    std::fill(M, M + T * T, 0.0);
    gram_wide(G, &probe, 0, judged, M, y.data());
    std::vector<double> leading(static_cast<size_t>(few * few));
    for (int64_t i = 0; i < few; ++i) {
      std::copy_n(M + i * T + i, few - i, &leading[size_t(i * few + i)]);
    }
    mirror(leading.data(), few);
    if (!well_conditioned(leading.data(), few, kBlocksExpectedEigenvalue)) {
      return false;
    }
    gram_wide(G, &probe, judged, P, M, y.data());
    mirror(M, T);
  } else {
    const std::vector<int64_t> bounds = chunk_bounds(T, P);
    const int64_t chunks = int64_t(bounds.size()) - 1, judged = std::min<int64_t>(2, chunks);
    const std::unique_ptr<double[]> partial(new double[size_t(chunks * T * T)]);
    std::vector<double> parts(size_t(chunks * probe.size()));
    const auto from = [&](int64_t first, int64_t last) {
      share_chunks(first, last, T * T, partial.get(), [&](int64_t begin, int64_t end) {
        kernels().gram_blocks(G, bounds.data(), begin, end, probe.vectors(), partial.get(), parts.data());
      });
      sum_chunks(partial.get(), last, T, M);
    };
    from(0, judged);
    if (bounds[size_t(judged)] >= 4 * T && !well_conditioned(M, T, kBlocksExpectedEigenvalue)) {
      return false; // fewer columns say nothing of the whole
    }
    from(judged, chunks);
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t i = 0; i < probe.size(); ++i) {
        y[size_t(i)] += parts[size_t(c * probe.size() + i)];
      }
    }
  }
  *least = probe.bound(M, y.data()) / promised_error(T);
  return !may_have_underflowed(M, T) && *least < 1.0;
}

// Gram of G scaled by the power of two that brings its largest float64 entry near one; returns that factor.
double gram_rescaled(const Gradients& G, double* M) {
  constexpr int64_t kColumns = 4096;
  const int64_t T = G.tasks;
  std::vector<Segment> wide, others;
  for (int64_t k = 0; k < G.count; ++k) {
    (G.segments[k].dtype == Dtype::f64 ? wide : others).push_back(G.segments[k]);
  }
  double largest = 0.0;
  for (const Segment& segment : wide) {
    for (int64_t t = 0; t < T; ++t) {
      const double* row = static_cast<const double*>(segment.rows[t]);
      for (int64_t i = 0; row && i < segment.length; ++i) {
        const double x = std::fabs(row[i]);
        largest = x > largest || std::isnan(x) ? x : largest;
      }
    }
  }
  double half, rest;
  if (!rescale(largest, half, rest)) {
    return 1.0;
  }
  // Beside entries this large nothing of another type counts, and beside entries this small nothing of another type is
  // there, or M would have been in range. But what is not finite does count.
  const Gradients narrow{others.data(), int64_t(others.size()), T};
  gram_serial(narrow, M);
  for (int64_t i = 0; i < T * T; ++i) {
    M[i] *= 0.0;
  }
  std::vector<double> block(static_cast<size_t>(T * kColumns));
  std::vector<const void*> rows(static_cast<size_t>(T));
  for (const Segment& segment : wide) {
    for (int64_t begin = 0; begin < segment.length; begin += kColumns) {
      const int64_t n = std::min(kColumns, segment.length - begin);
      for (int64_t t = 0; t < T; ++t) {
        const double* row = static_cast<const double*>(segment.rows[t]);
        rows[size_t(t)] = row ? block.data() + t * kColumns : nullptr;
        for (int64_t i = 0; row && i < n; ++i) {
          block[size_t(t * kColumns + i)] = row[begin + i] * half * rest;
        }
      }
      const Segment scaled{rows.data(), nullptr, n, Dtype::f64};
      const int64_t bounds[2] = {0, n};
      kernels().gram_exact({&scaled, 1, T}, bounds, 0, 1, M);
    }
  }
  mirror(M, T);
  return half * rest;
}

// Whether float64 entries may have over- or underflowed when they were squared.
bool out_of_range(const Gradients& G, const double* M) {
  if (!has_float64(G)) {
    return false;
  }
  double largest = 0.0;
  for (int64_t i = 0; i < G.tasks; ++i) {
    const double d = M[i * G.tasks + i];
    largest = d > largest || std::isnan(d) ? d : largest;
  }
  return !(largest > kLeastSquare && largest < kMostSquare);
}

double largest_diagonal(const double* M, int64_t T) {
  double largest = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    largest = std::max(largest, M[i * T + i]);
  }
  return largest;
}

void poison(int64_t T, double* alpha, double* eigenvalues, int64_t* rank) {
  std::fill(alpha, alpha + T, kNan);
  std::fill(eigenvalues, eigenvalues + T, kNan);
  *rank = 0;
}

// Jacobi workspace for T tasks: vectors, then 2 T scratch.
int64_t psd_workspace(int64_t T) {
  return T * psd_stride(T) + 2 * T;
}

// Rank of M whose eigenvalues (descending) are known.
int64_t decide_rank(const double* M, const double* eigenvalues, int64_t T, const Policy& policy) {
  if (policy.rank_rule == RankRule::gram) {
    return kept(eigenvalues, T, policy.rtol);
  }
  if (proves_full_rank(eigenvalues[T - 1], largest_diagonal(M, T), T, policy.rtol)) {
    return T;
  }
  Buffer<double, 1024> memory(T * T + T + psd_workspace(T) + 8);
  double *C = memory.get(), *judged = C + T * T, *X = aligned(judged + T);
  normalize_rows(M, T, policy.zero, C);
  const bool large = T > kJacobiTasks;
  if (large && is_positive_definite(C, T, row_norm(C, T, false) * policy.rtol * policy.rtol)) {
    std::fill_n(judged, T, 1.0);                                  // all are kept
  } else if (!large || !Tridiagonal(C, T).solve(judged, false)) { // the diagonal of C is even
    kernels().psd_eigh(C, T, judged, X, X + T * psd_stride(T));
  }
  int64_t positive = 0; // of M's own, Cholesky may have found fewer
  while (positive < T && eigenvalues[positive] > 0.0) {
    ++positive;
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

// Whether no row is much longer than another: then a tridiagonalisation is as accurate as M is.
bool even_rows(const double* M, int64_t T) {
  double largest = 0.0, smallest = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < T; ++i) {
    largest = std::max(largest, M[i * T + i]);
    smallest = M[i * T + i] > 0.0 ? std::min(smallest, M[i * T + i]) : smallest;
  }
  return largest <= kEvenRows * smallest;
}

// One Gram matrix, by the most accurate solver that its size affords.
void balance_one(const double* M, int64_t T, const Policy& policy, double* alpha, double* eigenvalues, int64_t* rank) {
  if (!all_finite(Serial{}, M, T * T)) {
    poison(T, alpha, eigenvalues, rank);
    return;
  }
  if (T > kJacobiTasks && even_rows(M, T)) {
    Tridiagonal solver(M, T);
    if (solver.solve(eigenvalues, true)) {
      for (int64_t j = 0; j < T; ++j) {
        eigenvalues[j] = std::max(eigenvalues[j], 0.0);
      }
      *rank = decide_rank(M, eigenvalues, T, policy);
      task_weights(solver, eigenvalues, *rank, T, policy, alpha);
      return;
    }
  } else if (T > kJacobiTasks) {
    Spectral solver(T);
    if (solver.solve(M, eigenvalues)) {
      *rank = decide_rank(M, eigenvalues, T, policy);
      if (solver.weights(eigenvalues, *rank, policy, alpha)) {
        return;
      }
    }
  }
  Buffer<double, 1024> memory(psd_workspace(T) + 8);
  double* X = aligned(memory.get());
  kernels().psd_eigh(M, T, eigenvalues, X, X + T * psd_stride(T));
  *rank = decide_rank(M, eigenvalues, T, policy);
  task_weights({eigenvalues, X, psd_stride(T), 1}, *rank, T, policy, alpha);
}

// The same, with eigenvalues for nobody, and the rank where it is asked for.
void weigh(const double* M, int64_t T, const Policy& policy, double* alpha, int64_t* rank) {
  Buffer<double, 64> eigenvalues(T);
  int64_t unused;
  balance_one(M, T, policy, alpha, eigenvalues.get(), rank ? rank : &unused);
}

// Whether the weights alone could be had for less: then of full rank, and with a lower bound of λ_min(M).
bool definite(const double* M, int64_t T, const Policy& policy, double* alpha, int64_t* rank, double* smallest) {
  const bool solved =
      T > kKrylovTasks && all_finite(Serial{}, M, T * T) && definite_weights(M, T, policy, alpha, smallest);
  if (solved && rank) {
    *rank = T;
  }
  return solved;
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

// Up to `lanes` small Gram matrices at once.
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
    rank[b] = decide_rank(M + b * T * T, lam, T, policy);
    task_weights({lam, vectors + b * T * T + T - 1, -1, T}, rank[b], T, policy, alpha + b * T);
  }
}

bool worth_lanes(int64_t B, int64_t T) {
  return T <= kMaxLanesTasks && 2 * B >= kernels().lanes;
}

void combine_serial(const Gradients& G, const double* alpha) {
  kernels().combine(G, alpha, 0, columns(G), false);
}

// Calls f(begin, end, stream) for ranges of columns that make up all of G, on several threads where it is large.
template <class F>
void share_columns(const Gradients& G, F&& f) {
  constexpr int64_t kUnit = 1024; // columns
  const int64_t P = columns(G), units = (P + kUnit - 1) / kUnit;
  int64_t bytes = 0;
  for (int64_t k = 0; k < G.count; ++k) {
    bytes += G.tasks * G.segments[k].length * element_size(G.segments[k].dtype);
  }
  if (bytes < (1 << 18)) {
    f(0, P, false);
    return;
  }
  parallel_for(0, units, 4, [&](int64_t begin, int64_t end) {
    f(begin * kUnit, std::min(end * kUnit, P), bytes > kStreamBytes);
  });
}

// Calls f(b) for every matrix of a batch: on one thread each where they are many or small, else on all threads one
// after the other. Either way what f does is split in the same way.
template <class F>
void share_matrices(int64_t B, bool small, F&& f) {
  const auto each = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      f(b);
    }
  };
  if (B > 1 && (small || B >= 4 * int64_t(torch::stable::get_num_threads()))) {
    parallel_for(0, B, 1, each);
  } else {
    each(0, B);
  }
}

bool is_small(const Gradients& G) {
  return columns(G) * G.tasks <= kAloneElements;
}

// Few tasks on few columns: the matrices of a thread in one walk.
bool share_out(const Gradients* G, int64_t B) {
  return B >= 4 && G[0].tasks <= kJacobiTasks && columns(G[0]) * G[0].tasks <= kCachedElements;
}

} // namespace

void gram(const Gradients& G, double* M) {
  const int64_t T = G.tasks, P = columns(G);
  if (T > kMaxNarrowTasks) {
    std::fill(M, M + T * T, 0.0);
    gram_wide(G, nullptr, 0, P, M, nullptr);
    mirror(M, T);
    // Panels have zeros in the place of missing rows, whose product with infinity is none.
    if (!has_missing(G) || all_finite(Serial{}, M, T * T)) {
      return;
    }
  }
  if (P <= kMinChunk) {
    gram_serial(G, M);
    return;
  }
  const std::vector<int64_t> bounds = chunk_bounds(T, P);
  const int64_t chunks = int64_t(bounds.size()) - 1;
  const std::unique_ptr<double[]> partial(new double[size_t(chunks * T * T)]);
  share_chunks(0, chunks, T * T, partial.get(), [&](int64_t begin, int64_t end) {
    kernels().gram_exact(G, bounds.data(), begin, end, partial.get());
  });
  sum_chunks(partial.get(), chunks, T, M);
}

void gram_batch(const Gradients* G, int64_t B, double* M) {
  const int64_t TT = B ? G[0].tasks * G[0].tasks : 0;
  if (B && share_out(G, B)) {
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      if (begin < end) {
        gram_serial(G + begin, end - begin, M + begin * TT);
      }
    });
    return;
  }
  share_matrices(B, B && is_small(G[0]), [&](int64_t b) { gram(G[b], M + b * TT); });
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
  if (T <= kJacobiTasks) {
    Buffer<double, 64> eigenvalues(B * T);
    balance(M, B, T, policy, alpha, eigenvalues.get(), rank);
    return;
  }
  share_matrices(B, T <= kAloneTasks, [&](int64_t b) {
    double smallest;
    if (!definite(M + b * T * T, T, policy, alpha + b * T, rank + b, &smallest)) {
      weigh(M + b * T * T, T, policy, alpha + b * T, rank + b);
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

void combine(const Gradients& G, const double* alpha) {
  share_columns(G, [&](int64_t begin, int64_t end, bool stream) { kernels().combine(G, alpha, begin, end, stream); });
}

void combine_batch(const Gradients* G, int64_t B, const double* alpha) {
  const int64_t T = B ? G[0].tasks : 0;
  if (B && share_out(G, B)) {
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        combine_serial(G[b], alpha + b * T);
      }
    });
    return;
  }
  share_matrices(B, B && is_small(G[0]), [&](int64_t b) { combine(G[b], alpha + b * T); });
}

void sign_drop(const Gradients* G, int64_t B, uint64_t seed, const double* leak) {
  const int64_t P = B ? columns(G[0]) : 0;
  if (B && share_out(G, B)) {
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        kernels().sign_drop(G[b], seed, b * P, leak, 0, P, false);
      }
    });
    return;
  }
  share_matrices(B, B && is_small(G[0]), [&](int64_t b) {
    share_columns(G[b], [&](int64_t begin, int64_t end, bool stream) {
      kernels().sign_drop(G[b], seed, b * P, leak, begin, end, stream);
    });
  });
}

void align(const Gradients& G, const Policy& policy, double* M, double* alpha, int64_t* rank) {
  const int64_t T = G.tasks;
  double smallest = 0.0, least = 0.0;
  if (gram_from_blocks(G, M, &least)) {
    // λ_min(C) >= λ_min(M) / max D: what finds the weights often says that the Gram is good enough for them. But a
    // tridiagonalisation is too dear to be done in vain.
    const bool solved = definite(M, T, policy, alpha, rank, &smallest);
    if (smallest > least * largest_diagonal(M, T) || well_conditioned(M, T, least)) {
      if (!solved) {
        weigh(M, T, policy, alpha, rank);
      }
      combine(G, alpha);
      return;
    }
  }
  gram(G, M);
  const double* judged = M;
  std::vector<double> scaled;
  if (out_of_range(G, M)) {
    scaled.resize(size_t(T * T));
    judged = gram_rescaled(G, scaled.data()) == 1.0 ? M : scaled.data();
  }
  if (!definite(judged, T, policy, alpha, rank, &smallest)) {
    weigh(judged, T, policy, alpha, rank);
  }
  combine(G, alpha);
}

void align_batch(const Gradients* G, int64_t B, const Policy& policy) {
  if (B == 0) {
    return;
  }
  const int64_t T = G[0].tasks;
  if (!share_out(G, B)) {
    share_matrices(B, is_small(G[0]), [&](int64_t b) {
      Buffer<double, 512> memory(T * T + T);
      align(G[b], policy, memory.get(), memory.get() + T * T, nullptr);
    });
    return;
  }
  // Gram, eigenproblem and recombination of a group of entries while they are in the cache: G is read from memory once.
  const int64_t group = kernels().lanes;
  parallel_for(0, (B + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> memory(static_cast<size_t>(group * (T * T + 2 * T)));
    std::vector<int64_t> rank(static_cast<size_t>(group));
    double *M = memory.data(), *alpha = M + group * T * T, *eigenvalues = alpha + group * T;
    for (int64_t b = begin * group; b < std::min(B, end * group); b += group) {
      const int64_t count = std::min(group, B - b);
      gram_serial(G + b, count, M);
      if (worth_lanes(B, T)) {
        balance_lanes(M, count, T, policy, alpha, eigenvalues, rank.data());
      }
      for (int64_t i = 0; i < count; ++i) {
        if (out_of_range(G[b + i], M + i * T * T)) {
          gram_rescaled(G[b + i], M + i * T * T);
          balance_one(M + i * T * T, T, policy, alpha + i * T, eigenvalues + i * T, rank.data());
        } else if (!worth_lanes(B, T)) {
          balance_one(M + i * T * T, T, policy, alpha + i * T, eigenvalues + i * T, rank.data());
        }
        combine_serial(G[b + i], alpha + i * T);
      }
    }
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
