#include "gram.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../common.h"
#include "../math/balance.h"
#include "../math/probe.h"
#include "../math/scaling.h"
#include "definite.h"
#include "share.h"

namespace fastmtl::cpu {

namespace {

// This many columns are not worth another partial sum.
constexpr int64_t kMinChunk = 2048;

// The Gram of more tasks than this is computed from panels that all threads share (wide.h), in blocks of this many
// columns.
constexpr int64_t kMaxNarrowTasks = 128;
constexpr int64_t kBlockColumns = 2048;
// The first block judges by this many leading tasks, which must be as independent as all tasks must be.
constexpr int64_t kJudgedTasks = 256;

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
  // A small G is shared by a few threads; with float32 blocks two chunks, which may be all, are judged on their own.
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

// What float32 sums cost the Gram of these very gradients: Δ = D^-1/2 (M - G Gᵀ) D^-1/2, D the diagonal of M,
// multiplied by random vectors. Until G has been read, guessed norms stand in for D^1/2; the result is corrected by how
// wrong they were.
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

  // A likely bound of ‖Δ‖, from M and y = G (Gᵀ z); NaN if they are not finite.
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

// M += the products of columns [begin, end), upper triangle: exactly, or in float32, and then also y += G (Gᵀ z).
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

// Whether float32 products may have lost bits as subnormal numbers, that is, a row's entries are below 1e-15 or so.
bool may_have_underflowed(const double* M, int64_t T) {
  for (int64_t i = 0; i < T; ++i) {
    if (!(M[i * T + i] >= kFloat32Square)) {
      return true;
    }
  }
  return false;
}

} // namespace

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

bool well_conditioned(const double* M, int64_t T, double least) {
  std::vector<double> C(static_cast<size_t>(T * T));
  normalize_rows(M, T, 0.0, C.data());
  return is_positive_definite(C.data(), T, least);
}

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
      return false; // fewer columns say nothing about the whole
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

} // namespace fastmtl::cpu
