// The CPU kernels and the solvers, without PyTorch, on buffers that end where they should: for a sanitizer to watch.
// Every result is compared with plain float64 loops, and has the same bits with one, two and eight threads.
//
//     driver name                the instruction set, which FASTMTL_CPU chooses
//     driver quick | full        all cases, or few of them
//     driver defect NAME         a mistake of the caller's that a sanitizer has to report
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cpu/definite.h"
#include "cpu/gram.h"
#include "cpu/pipeline.h"
#include "cpu/solve.h"
#include "cpu/tridiagonal.h"
#include "cpu/weights.h"
#include "math/probe.h"

#include "memory.h"
#include "plain.h"
#include "torch/csrc/stable/ops.h"

using fastmtl::Cagrad;
using fastmtl::Dtype;
using fastmtl::DualCone;
using fastmtl::Gradients;
using fastmtl::Gradvac;
using fastmtl::Mgda;
using fastmtl::Nash;
using fastmtl::Pcgrad;
using fastmtl::Policy;
using fastmtl::RankRule;
using fastmtl::Scale;
using fastmtl::Segment;
namespace cpu = fastmtl::cpu;

// --- what csrc/cpu expects of others

namespace fastmtl::cpu {

// What csrc/cpu/dispatch.cpp compiles its thread_scratch and trim_thread_scratch as.
double* growing_scratch(int slot, int64_t doubles);
void trim_growing_scratch();

namespace {
bool share_scratch = false; // a defect
thread_local int64_t most_scratch[2] = {};
} // namespace

// The same memory, as if it were exactly as large as was asked for this time, without what was left in it.
double* thread_scratch(int slot, int64_t doubles) {
  static double shared[4096];
  if (share_scratch) {
    return shared;
  }
  double* memory = growing_scratch(slot, doubles);
  int64_t& most = most_scratch[slot];
  most = std::max(most, doubles);
  FASTMTL_UNPOISON(memory, size_t(most) * sizeof(double));
  std::memset(memory, 0xff, size_t(doubles) * sizeof(double));
  FASTMTL_POISON(memory + doubles, size_t(most - doubles) * sizeof(double));
  return memory;
}

void trim_thread_scratch() {
  for (int64_t& most : most_scratch) {
    most = most > kKeptScratch ? 0 : most;
  }
  trim_growing_scratch();
}

} // namespace fastmtl::cpu

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16};

std::mt19937_64 engine(1);
int64_t cases = 0;

int64_t below(int64_t n) {
  return std::uniform_int_distribution<int64_t>(0, n - 1)(engine);
}

// From a table, in another order each time around: to draw them would be most of the work.
double normal() {
  static std::vector<double> drawn(1 << 16);
  static size_t next = 0;
  if (next == 0) {
    std::normal_distribution<double> distribution;
    std::generate(drawn.begin(), drawn.end(), [&] { return distribution(engine); });
  }
  const double x = drawn[next];
  next = next + 1 == drawn.size() ? size_t(1 + below(1 << 15)) : next + 1;
  return x;
}

template <class... Parts>
void begin_case(const char* format, Parts... parts) {
  char text[200];
  std::snprintf(text, sizeof text, format, parts...);
  current_case = text;
  ++cases;
}

// Calls f for one, two and eight threads.
template <class F>
void with_threads(F f) {
  for (const int64_t n : {1, 2, 8}) {
    torch::stable::worker_count = n;
    f(n);
  }
  torch::stable::worker_count = 1;
}

// Equal, NaN to NaN; finite numbers up to a bound.
void check_near(double got, double wanted, double bound, const char* what) {
  const bool good = std::isnan(wanted)   ? std::isnan(got)
                    : std::isinf(wanted) ? got == wanted
                                         : std::fabs(got - wanted) <= bound;
  if (!good) {
    char text[200];
    std::snprintf(text, sizeof text, "%s: expected %.17g within %.3g, got %.17g", what, wanted, bound, got);
    fail(text);
  }
}

// --- gradients

enum class Kind { normal, special, subnormal, huge, tiny };

double value(Kind kind, Dtype dtype) {
  switch (kind) {
    case Kind::normal:
      return normal();
    case Kind::subnormal:
      return double(below(9) - 4) * plain::smallest(dtype);
    case Kind::huge:
      return normal() * (dtype == Dtype::f64 ? 1e200 : 1.0);
    case Kind::tiny:
      return normal() * (dtype == Dtype::f64 ? 1e-250 : 0.0);
    case Kind::special:
      break;
  }
  const double large = dtype == Dtype::f64 ? 1e150 : plain::largest(dtype); // its square is finite
  const double values[] = {kNan, kInf, -kInf, 0.0, -0.0, plain::smallest(dtype), -large};
  const int64_t chosen = below(60);
  return chosen < 7 ? values[chosen] : normal();
}

struct Piece {
  int64_t length;
  Dtype dtype;
  int64_t missing; // every so many tasks have no gradient: 1 for all, 0 for none
};

// B gradient matrices of the same pieces, every row and result an exact buffer, and their values as float64.
class Matrices {
 public:
  Matrices(int64_t B, int64_t T, std::vector<Piece> pieces, int64_t offset, Kind kind)
      : B(B), T(T), pieces(std::move(pieces)), offset_(offset) {
    K = int64_t(this->pieces.size());
    rows_.reserve(size_t(B * K * T));
    for (int64_t b = 0; b < B; ++b) {
      for (const Piece& piece : this->pieces) {
        for (int64_t t = 0; t < T; ++t) {
          add_row(piece, t, kind);
        }
      }
    }
    for (const Piece& piece : this->pieces) {
      P += piece.length;
    }
    segments_.resize(size_t(B * K));
    for (int64_t s = 0; s < B * K; ++s) {
      const Piece& piece = this->pieces[size_t(s % K)];
      segments_[size_t(s)] = {pointers_.data() + s * T, nullptr, piece.length, piece.dtype};
    }
    for (int64_t b = 0; b < B; ++b) {
      gradients_.push_back({segments_.data() + b * K, K, T});
    }
    fresh_results();
  }

  // Results that nothing has been written to.
  void fresh_results() {
    results_.clear();
    results_.reserve(size_t(B * K));
    for (int64_t s = 0; s < B * K; ++s) {
      const Piece& piece = pieces[size_t(s % K)];
      const int64_t element = fastmtl::element_size(piece.dtype);
      results_.emplace_back(piece.length * element, offset_ * element);
      segments_[size_t(s)].out = results_.back().get();
    }
  }

  const Gradients* all() const {
    return gradients_.data();
  }
  const Gradients& one(int64_t b = 0) const {
    return gradients_[size_t(b)];
  }
  bool has(Dtype dtype) const {
    return std::any_of(pieces.begin(), pieces.end(), [&](const Piece& piece) { return piece.dtype == dtype; });
  }
  // Row t of piece k of matrix b as float64, null where there is none.
  const double* row(int64_t b, int64_t k, int64_t t) const {
    const size_t at = size_t((b * K + k) * T + t);
    return pointers_[at] ? wide_[at].data() : nullptr;
  }

  // G Gᵀ and |G| |G|ᵀ of matrix b.
  void gram(int64_t b, std::vector<double>& M, std::vector<double>& S) const {
    M.assign(size_t(T * T), 0.0);
    S.assign(size_t(T * T), 0.0);
    std::vector<const double*> rows(static_cast<size_t>(T));
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t t = 0; t < T; ++t) {
        rows[size_t(t)] = row(b, k, t);
      }
      plain::gram(rows.data(), T, pieces[size_t(k)].length, M.data(), S.data());
    }
  }

  // That the results of matrix b are f(k, column, size) up to rounding to their type, and, of sums, up to that of
  // float64 relative to `size`, which f sets. Columns outside of [begin, end) are NaN still.
  template <class F>
  void check_results(int64_t b, const char* what, F f, int64_t begin = 0, int64_t end = int64_t(1) << 60) const {
    int64_t column = 0;
    for (int64_t k = 0; k < K; ++k) {
      const Piece& piece = pieces[size_t(k)];
      const void* out = results_[size_t(b * K + k)].get();
      for (int64_t i = 0; i < piece.length; ++i, ++column) {
        double size = 0.0, wanted = kNan;
        if (column >= begin && column < end) {
          wanted = f(k, i, column, size);
          const bool over = std::fabs(wanted) > plain::largest(piece.dtype) && piece.dtype != Dtype::f64;
          wanted = over ? std::copysign(kInf, wanted) : wanted;
        }
        const double got = plain::read(out, piece.dtype, i);
        if (std::isinf(wanted) && std::fabs(got) >= plain::largest(piece.dtype)) {
          continue; // at the edge of the range
        }
        const double bound = plain::epsilon(piece.dtype) * std::fabs(wanted) + plain::smallest(piece.dtype) +
                             double(T + 4) * 0x1p-52 * size;
        check_near(got, wanted, bound, what);
      }
    }
  }

  void check_combined(int64_t b, const double* alpha, int64_t begin = 0, int64_t end = int64_t(1) << 60) const {
    const bool good = std::all_of(alpha, alpha + T, [](double x) { return std::isfinite(x); });
    check_results(
        b,
        "combine",
        [&](int64_t k, int64_t i, int64_t, double& size) {
          double sum = good ? 0.0 : kNan;
          bool overflow = false;
          for (int64_t t = 0; t < T && good; ++t) {
            if (const double* g = row(b, k, t)) {
              sum += alpha[t] * g[i];
              size += std::fabs(alpha[t] * g[i]);
              overflow = overflow || std::isinf(size);
            }
          }
          return sum;
        },
        begin,
        end);
  }

  std::vector<Block> take_results() {
    std::vector<Block> taken = std::move(results_);
    fresh_results();
    return taken;
  }

  const int64_t B, T;
  int64_t K = 0, P = 0;
  const std::vector<Piece> pieces;

 private:
  void add_row(const Piece& piece, int64_t t, Kind kind) {
    const int64_t element = fastmtl::element_size(piece.dtype);
    wide_.emplace_back();
    if (piece.missing && t % piece.missing == 0) {
      pointers_.push_back(nullptr);
      return;
    }
    // Rows that do not start where vectors do, each elsewhere.
    rows_.emplace_back(piece.length * element, (offset_ ? offset_ + t % 3 : 0) * element);
    void* to = rows_.back().get();
    pointers_.push_back(to);
    wide_.back().resize(size_t(piece.length));
    for (int64_t i = 0; i < piece.length; ++i) {
      plain::write(to, piece.dtype, i, value(kind, piece.dtype));
      wide_.back()[size_t(i)] = plain::read(to, piece.dtype, i);
    }
  }

  int64_t offset_;
  std::vector<Block> rows_, results_;
  std::vector<const void*> pointers_;
  std::vector<std::vector<double>> wide_;
  std::vector<Segment> segments_;
  std::vector<Gradients> gradients_;
};

bool same_bits(const std::vector<Block>& a, const std::vector<Block>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(a[i].get(), b[i].get(), a[i].bytes()) != 0) {
      return false;
    }
  }
  return a.size() == b.size();
}

// P columns over several pieces of all types: missing rows, a piece without columns, one that nobody has.
std::vector<Piece> ragged(int64_t P, Dtype first, bool narrow = false) {
  const int64_t third = P / 3, one = P > 4 ? 1 : 0, few = P > 40 ? 17 : 0;
  const Dtype other = narrow ? Dtype::f32 : Dtype::f64;
  return {
      {third, first, 0},
      {one, other, 3},
      {0, Dtype::f32, 2},
      {few, Dtype::bf16, 1},
      {third, Dtype::f16, 2},
      {P - 2 * third - one - few, first, 4}};
}

void check_gram(
    const double* M,
    const std::vector<double>& wanted,
    const std::vector<double>& size,
    int64_t T,
    double rounding,
    bool upper = false) {
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = upper ? i : 0; j < T; ++j) {
      const size_t at = size_t(i * T + j);
      const double scale =
          rounding > 1e-10 ? std::sqrt(wanted[size_t(i * T + i)] * wanted[size_t(j * T + j)]) : size[at];
      if (!std::isfinite(size[at])) {
        check(!std::isfinite(M[at]), "gram: what is not finite must not vanish");
      } else {
        check_near(M[at], wanted[at], rounding * scale, "gram");
      }
    }
  }
}

double exact_rounding(int64_t P) {
  return 0x1p-52 * double(P + 8);
}

// Kernels of the table themselves, on ranges that the pipeline does not choose.
void kernel_ranges(Matrices& G) {
  const int64_t T = G.T, P = G.P;
  const std::vector<int64_t> bounds = {0, P / 3, P / 3, P / 2 + (P > 1), P};
  const int64_t chunks = int64_t(bounds.size()) - 1;
  Exact<int64_t> limits(chunks + 1);
  std::copy(bounds.begin(), bounds.end(), limits + 0);
  std::vector<double> wanted, size;
  G.gram(0, wanted, size);
  for (const bool blocks : {false, true}) {
    if (blocks && G.has(Dtype::f64)) {
      continue;
    }
    Exact<double> partial(chunks * T * T), M(T * T);
    std::fill_n(partial + 0, chunks * T * T, 0.0);
    const int64_t stride = cpu::probe_stride(T), probes = cpu::kNarrowProbes * stride;
    Exact<double> z(probes), y(chunks * probes);
    std::generate_n(z + 0, probes, normal);
    std::fill_n(y + 0, chunks * probes, 0.0);
    for (const auto [first, last] : {std::pair<int64_t, int64_t>{0, 2}, {2, chunks}}) {
      if (blocks) {
        cpu::kernels().gram_blocks(G.one(), limits, first, last, z, partial, y);
      } else {
        cpu::kernels().gram_exact(G.one(), limits, first, last, partial);
      }
    }
    for (int64_t i = 0; i < T * T; ++i) {
      M[i] = 0.0;
      for (int64_t c = 0; c < chunks; ++c) {
        M[i] += partial[c * T * T + i];
      }
    }
    check_gram(M, wanted, size, T, blocks ? 1e-5 : exact_rounding(P), true);
    for (int64_t i = 0; blocks && i < cpu::kNarrowProbes * T; ++i) {
      const int64_t p = i / T, t = i % T;
      double measured = 0.0, along = 0.0, scale = 0.0;
      for (int64_t c = 0; c < chunks; ++c) {
        measured += y[c * probes + p * stride + t];
      }
      for (int64_t j = 0; j < T; ++j) {
        const int64_t at = std::min(t, j) * T + std::max(t, j);
        along += wanted[size_t(at)] * z[p * stride + j];
        scale += size[size_t(at)] * std::fabs(z[p * stride + j]);
      }
      if (std::isfinite(scale)) {
        check_near(measured, along, exact_rounding(P + T) * scale, "probe");
      } else {
        check(!std::isfinite(measured), "probe: what is not finite must not vanish");
      }
    }
  }
  Exact<double> alpha(T);
  std::generate_n(alpha + 0, T, normal);
  for (const bool stream : {false, true}) {
    G.fresh_results();
    const int64_t begin = stream ? 0 : P / 5, end = stream ? P : P - P / 7;
    cpu::kernels().combine(G.one(), alpha, begin, end, stream);
    G.check_combined(0, alpha, begin, end);
  }
}

// Column n of GradDrop as its definition has it.
void check_sign_drop(const Matrices& G, int64_t b, uint64_t seed, const double* leak) {
  const int64_t T = G.T;
  G.check_results(b, "sign_drop", [&](int64_t k, int64_t i, int64_t column, double& size) {
    const uint64_t n = uint64_t(b * G.P + column);
    const uint32_t u = fastmtl::philox(seed, uint32_t(n / 4), uint32_t(n / 4 >> 32), 0, 0).words[n % 4];
    double p = 0.0, q = 0.0, leaked_p = 0.0, leaked_q = 0.0;
    for (int64_t t = 0; t < T; ++t) {
      if (const double* g = G.row(b, k, t)) {
        const double up = g[i] > 0.0 ? g[i] : 0.0, down = g[i] > 0.0 ? 0.0 : g[i];
        p += up;
        q += down;
        leaked_p += leak ? leak[t] * up : 0.0;
        leaked_q += leak ? leak[t] * down : 0.0;
      }
    }
    size = p - q;
    const double positive = p + 0.0 * q + leaked_q, negative = q + 0.0 * p + leaked_p;
    return double(u) * -q < (0x1p32 - double(u)) * p ? positive : negative;
  });
}

Policy policy_for(int64_t T, Scale scale, RankRule rule, const double* weights) {
  return {weights, scale, rule, 1e-7 * std::sqrt(double(T)), 0x1p-40};
}

// α = sqrt(s) Σ λ^-1/2 v (vᵀw) of a matrix of full rank.
std::vector<double> plain_weights(const double* M, int64_t T, const Policy& policy) {
  std::vector<double> lam(static_cast<size_t>(T)), V(static_cast<size_t>(T * T)), alpha(static_cast<size_t>(T));
  plain::eigh(M, T, lam.data(), V.data());
  const double mean = std::accumulate(lam.begin(), lam.end(), 0.0) / double(T);
  const double s = policy.scale == Scale::min      ? lam[0]
                   : policy.scale == Scale::median ? lam[size_t(T - 1 - T / 2)]
                                                   : mean;
  for (int64_t j = 0; j < T; ++j) {
    const double* v = V.data() + j * T;
    double along = 0.0;
    for (int64_t i = 0; i < T; ++i) {
      along += v[i] * (policy.weights ? policy.weights[i] : 1.0 / double(T));
    }
    for (int64_t i = 0; i < T; ++i) {
      alpha[size_t(i)] += std::sqrt(s / lam[size_t(j)]) * along * v[i];
    }
  }
  return alpha;
}

void check_weights(const double* alpha, const double* M, int64_t T, const Policy& policy, double bound) {
  const std::vector<double> wanted = plain_weights(M, T, policy);
  const double size = std::fabs(
      *std::max_element(wanted.begin(), wanted.end(), [](double a, double b) { return std::fabs(a) < std::fabs(b); }));
  for (int64_t t = 0; t < T; ++t) {
    check_near(alpha[t], wanted[size_t(t)], bound * size, "alpha");
  }
}

// One matrix through the pipeline, with any number of threads.
void one_matrix(Matrices& G, Kind kind, bool aligning) {
  const int64_t T = G.T;
  std::vector<double> wanted, size;
  G.gram(0, wanted, size);
  Exact<double> first(T * T), alpha(T), leak(T);
  std::generate_n(alpha + 0, T, normal);
  std::generate_n(leak + 0, T, [] { return double(below(5)) / 4.0; });
  const uint64_t seed = engine();
  const double* leaks = below(2) ? leak + 0 : nullptr;
  std::vector<Block> combined, dropped;
  with_threads([&](int64_t n) {
    Exact<double> M(T * T);
    cpu::gram(G.one(), M);
    G.fresh_results();
    cpu::combine(G.one(), alpha);
    if (n == 1) {
      check_gram(M, wanted, size, T, exact_rounding(G.P));
      std::copy_n(M + 0, T * T, first + 0);
      if (kind != Kind::huge) {
        G.check_combined(0, alpha);
      }
      combined = G.take_results();
    } else {
      check(first.same_bits(M), "gram depends on the number of threads");
      check(same_bits(combined, G.take_results()), "combine depends on the number of threads");
    }
    cpu::sign_drop(G.all(), 1, seed, leaks);
    if (n == 1) {
      if (kind != Kind::special) {
        check_sign_drop(G, 0, seed, leaks);
      }
      dropped = G.take_results();
    } else {
      check(same_bits(dropped, G.take_results()), "sign_drop depends on the number of threads");
    }
  });
  if (!aligning) {
    return;
  }
  const bool finite = std::all_of(size.begin(), size.end(), [](double x) { return std::isfinite(x); });
  const bool regular = kind == Kind::normal && G.K == 1 && G.P >= 3 * T;
  const Policy policy = policy_for(T, Scale(G.P % 3), RankRule(G.P % 2), nullptr);
  std::vector<Block> aligned;
  with_threads([&](int64_t n) {
    Exact<double> M(T * T), weights(T);
    Exact<int64_t> rank(1);
    cpu::align(G.one(), policy, M, weights, rank);
    if (n > 1) {
      check(same_bits(aligned, G.take_results()), "align depends on the number of threads");
      return;
    }
    check(*rank >= 0 && *rank <= T, "rank");
    if (kind == Kind::normal || kind == Kind::special || !finite) {
      const bool exact = kind != Kind::normal || T <= fastmtl::kMaxExactTasks;
      check_gram(M, wanted, size, T, exact ? exact_rounding(G.P) : 1e-5);
    }
    if (regular) {
      check(*rank == T, "full rank");
      check_weights(weights, M, T, policy, 1e-8);
    }
    if (kind == Kind::normal || kind == Kind::tiny || kind == Kind::subnormal) {
      check(std::all_of(weights + 0, weights + T, [](double x) { return std::isfinite(x); }), "finite alpha");
      G.check_combined(0, weights);
    }
    aligned = G.take_results();
  });
}

void batches(int64_t B, int64_t T, int64_t P, Dtype dtype, int64_t offset, Kind kind) {
  begin_case("batch B=%ld T=%ld P=%ld dtype=%d offset=%ld kind=%d", B, T, P, int(dtype), offset, int(kind));
  Matrices G(B, T, {{P, dtype, 0}}, offset, kind);
  Exact<double> first(B * T * T), alpha(B * T), leak(T);
  std::generate_n(alpha + 0, B * T, normal);
  std::generate_n(leak + 0, T, [] { return double(below(5)) / 4.0; });
  const Policy policy = policy_for(T, Scale::min, RankRule::normalized, nullptr);
  std::vector<Block> combined, dropped, aligned;
  with_threads([&](int64_t n) {
    Exact<double> M(B * T * T);
    cpu::gram_batch(G.all(), B, M);
    G.fresh_results();
    cpu::combine_batch(G.all(), B, alpha);
    if (n == 1) {
      std::vector<double> wanted, size;
      for (int64_t b = 0; b < B; ++b) {
        G.gram(b, wanted, size);
        check_gram(M + b * T * T, wanted, size, T, exact_rounding(P));
        if (kind != Kind::huge) {
          G.check_combined(b, alpha + b * T);
        }
      }
      std::copy_n(M + 0, B * T * T, first + 0);
      combined = G.take_results();
    } else {
      check(first.same_bits(M), "gram_batch depends on the number of threads");
      check(same_bits(combined, G.take_results()), "combine_batch depends on the number of threads");
    }
    cpu::sign_drop(G.all(), B, 7, leak);
    if (n == 1) {
      for (int64_t b = 0; b < B && kind != Kind::special; ++b) {
        check_sign_drop(G, b, 7, leak);
      }
      dropped = G.take_results();
    } else {
      check(same_bits(dropped, G.take_results()), "sign_drop depends on the number of threads");
    }
    cpu::align_batch(G.all(), B, policy);
    if (n == 1) {
      for (int64_t b = 0; b < B && kind == Kind::normal && P >= 3 * T; ++b) {
        std::vector<double> gram, size;
        G.gram(b, gram, size);
        const std::vector<double> weights = plain_weights(gram.data(), T, policy);
        G.check_results(b, "align", [&](int64_t k, int64_t i, int64_t, double& bound) {
          double sum = 0.0;
          for (int64_t t = 0; t < T; ++t) {
            sum += weights[size_t(t)] * G.row(b, k, t)[i];
            bound += 1e8 * std::fabs(weights[size_t(t)] * G.row(b, k, t)[i]); // alpha has some 8 digits of 16 for sure
          }
          return sum;
        });
      }
      aligned = G.take_results();
    } else {
      check(same_bits(aligned, G.take_results()), "align_batch depends on the number of threads");
    }
  });
}

// --- from Gram matrices on

enum class Spectrum { regular, deficient, zero_rows, opposed, huge, tiny, poisoned };
constexpr Spectrum kSpectra[] = {
    Spectrum::regular,
    Spectrum::deficient,
    Spectrum::zero_rows,
    Spectrum::opposed,
    Spectrum::huge,
    Spectrum::tiny,
    Spectrum::poisoned};

void fill_gram(double* M, int64_t T, Spectrum spectrum) {
  const int64_t P = spectrum == Spectrum::deficient ? T / 2 + 1 : 3 * T + 1;
  const double scale = spectrum == Spectrum::huge ? 1e140 : spectrum == Spectrum::tiny ? 1e-140 : 1.0;
  std::vector<std::vector<double>> rows(static_cast<size_t>(T));
  std::vector<const double*> pointers;
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double>& row = rows[size_t(t)];
    row.resize(size_t(P));
    const bool opposed = spectrum == Spectrum::opposed && t % 2, zero = spectrum == Spectrum::zero_rows && t % 3 == 1;
    std::generate(row.begin(), row.end(), [&] { return zero ? 0.0 : scale * (normal() + 0.1); });
    if (opposed) {
      std::transform(rows[size_t(t - 1)].begin(), rows[size_t(t - 1)].end(), row.begin(), std::negate<>());
    }
    pointers.push_back(row.data());
  }
  std::vector<double> size(static_cast<size_t>(T * T));
  std::fill_n(M, T * T, 0.0);
  plain::gram(pointers.data(), T, P, M, size.data());
  if (spectrum == Spectrum::poisoned) {
    const int64_t i = below(T), j = below(T);
    M[i * T + j] = M[j * T + i] = below(2) ? kNan : kInf;
  }
}

double form(const double* M, int64_t T, const std::vector<double>& x) {
  const std::vector<double> y = plain::product(M, T, x.data());
  return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
}

// v of PCGrad for task i, from M v computed anew for every task that is visited.
std::vector<double> plain_pcgrad(const double* M, int64_t T, uint64_t seed, int64_t b, int64_t i, bool per_task) {
  std::vector<double> v(static_cast<size_t>(T)), order(static_cast<size_t>(T)), swaps(static_cast<size_t>(T + 3));
  fastmtl::permutation(fastmtl::Serial{}, seed, b, per_task ? i : 0, T, order.data(), swaps.data());
  v[size_t(i)] = 1.0;
  for (const double next : order) {
    const int64_t j = int64_t(next);
    const double along = plain::product(M, T, v.data())[size_t(j)];
    if (j != i && along < 0.0) {
      v[size_t(j)] -= along / M[j * T + j];
    }
  }
  return v;
}

// Wanted for one matrix: f(alpha, M), where the matrix is finite and as good as random; NaN where it is not finite, and
// zero for absent tasks.
template <class F>
void check_each(const double* alpha, const double* M, int64_t B, int64_t T, Spectrum spectrum, F f) {
  for (int64_t b = 0; b < B; ++b) {
    if (spectrum == Spectrum::poisoned) {
      check(std::all_of(alpha + b * T, alpha + (b + 1) * T, [](double x) { return std::isnan(x); }), "NaN for NaN");
    } else if (spectrum == Spectrum::regular) {
      f(b, M + b * T * T, std::vector<double>(alpha + b * T, alpha + (b + 1) * T));
    }
    for (int64_t t = 0; t < T && spectrum == Spectrum::zero_rows; ++t) {
      check(M[(b * T + t) * T + t] > 0.0 || alpha[b * T + t] == 0.0, "a weight of an absent task");
    }
  }
}

// The same bits with any number of threads; `check` looks at the first.
template <class Solve, class Check>
void weigh(int64_t B, int64_t T, const char* name, Solve solve, Check look) {
  Exact<double> first(B * T), residuals(B);
  with_threads([&](int64_t n) {
    Exact<double> alpha(B * T), residual(B);
    solve(alpha + 0, residual + 0);
    if (n == 1) {
      std::copy_n(alpha + 0, B * T, first + 0);
      std::copy_n(residual + 0, B, residuals + 0);
      look(alpha + 0);
    } else if (!first.same_bits(alpha) || !residuals.same_bits(residual)) {
      fail(std::string(name) + " depends on the number of threads");
    }
  });
}

void solvers(int64_t B, int64_t T, Spectrum spectrum) {
  begin_case("solvers B=%ld T=%ld spectrum=%d", B, T, int(spectrum));
  Exact<double> M(B * T * T), u(T);
  for (int64_t b = 0; b < B; ++b) {
    fill_gram(M + b * T * T, T, spectrum);
  }
  std::generate_n(u + 0, T, [] { return 0.1 + std::fabs(normal()); });
  const auto each = [&](const double* alpha, auto f) { check_each(alpha, M, B, T, spectrum, f); };
  double longest = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    longest = std::max(longest, M[t * T + t]);
  }
  const double bound = 1e-9 * double(T) * longest;

  weigh(
      B,
      T,
      "mgda",
      [&](double* alpha, double* residual) { cpu::solve(Mgda{}, M, B, T, alpha, residual); },
      [&](const double* alpha) {
        each(alpha, [&](int64_t, const double* one, const std::vector<double>& x) {
          check_near(std::accumulate(x.begin(), x.end(), 0.0), 1.0, 1e-12, "mgda: sum");
          const std::vector<double> y = plain::product(one, T, x.data());
          check(*std::min_element(x.begin(), x.end()) >= 0.0, "mgda: negative weight");
          check(*std::min_element(y.begin(), y.end()) >= form(one, T, x) - bound, "mgda: not the shortest");
        });
      });
  const auto in_cone = [&](const double* one, const std::vector<double>& v, const std::vector<double>& from) {
    const std::vector<double> y = plain::product(one, T, v.data());
    for (size_t t = 0; t < size_t(T); ++t) {
      check(v[t] >= from[t] && y[t] >= -bound, "dual_cone: outside");
      check(std::fabs(y[t] * (v[t] - from[t])) <= bound, "dual_cone: not the nearest");
    }
  };
  const std::vector<double> wanted(u + 0, u + T);
  weigh(
      B,
      T,
      "dual_cone",
      [&](double* alpha, double* residual) { cpu::solve(DualCone{{}, u, false}, M, B, T, alpha, residual); },
      [&](const double* alpha) {
        each(alpha, [&](int64_t, const double* one, const std::vector<double>& v) { in_cone(one, v, wanted); });
      });
  weigh(
      B,
      T,
      "dual_cone of each",
      [&](double* alpha, double* residual) { cpu::solve(DualCone{{}, nullptr, true}, M, B, T, alpha, residual); },
      [&](const double* alpha) {
        each(alpha, [&](int64_t b, const double* one, const std::vector<double>& v) {
          if (b || T > 33) {
            return;
          }
          std::vector<double> sum(static_cast<size_t>(T));
          for (int64_t i = 0; i < T; ++i) {
            Exact<double> e(T), x(T), residual(1);
            std::fill_n(e + 0, T, 0.0);
            e[i] = 1.0 / double(T);
            cpu::solve(DualCone{{}, e, false}, one, 1, T, x, residual);
            in_cone(one, std::vector<double>(x + 0, x + T), std::vector<double>(e + 0, e + T));
            std::transform(sum.begin(), sum.end(), x + 0, sum.begin(), std::plus<>());
          }
          for (size_t t = 0; t < size_t(T); ++t) {
            check_near(v[t], sum[t], 1e-12, "dual_cone of each");
          }
        });
      });
  weigh(
      B,
      T,
      "cagrad",
      [&](double* alpha, double* residual) { cpu::solve(Cagrad{{}, 0.5}, M, B, T, alpha, residual); },
      [&](const double* alpha) {
        each(alpha, [&](int64_t, const double* one, std::vector<double> x) {
          const std::vector<double> mean(size_t(T), 1.0 / double(T));
          const std::vector<double> slopes = plain::product(one, T, x.data()),
                                    before = plain::product(one, T, mean.data());
          for (double& weight : x) {
            weight -= 1.0 / double(T);
          }
          check(std::sqrt(form(one, T, x)) <= 0.5 * std::sqrt(form(one, T, mean)) * (1.0 + 1e-7), "cagrad: too far");
          const double worst = *std::min_element(slopes.begin(), slopes.end());
          check(worst >= *std::min_element(before.begin(), before.end()) - bound, "cagrad: worse than the mean");
        });
      });
  for (const double power : {1.0, 0.5, 2.0}) {
    weigh(
        B,
        T,
        "nash",
        [&](double* alpha, double* residual) { cpu::solve(Nash{{}, power}, M, B, T, alpha, residual); },
        [&](const double* alpha) {
          each(alpha, [&](int64_t, const double* one, const std::vector<double>& x) {
            const std::vector<double> y = plain::product(one, T, x.data());
            for (size_t t = 0; t < size_t(T); ++t) {
              check_near(y[t] * std::pow(x[t], power), 1.0, 1e-6, "nash");
            }
          });
        });
  }
  weigh(
      B,
      T,
      "constant",
      [&](double* alpha, double* residual) {
        cpu::constant(M, B, T, u, 0, alpha);
        std::fill_n(residual, B, 0.0);
      },
      [&](const double* alpha) {
        if (spectrum != Spectrum::poisoned) { // its diagonal may be finite
          each(alpha, [&](int64_t, const double*, const std::vector<double>& x) {
            check(std::equal(u + 0, u + T, x.begin()), "constant");
          });
        }
      });
  weigh(
      B,
      T,
      "unit_solve",
      [&](double* alpha, double* residual) {
        Exact<double> cosines(B * T);
        cpu::unit_solve(M, B, T, u, 1e-8, alpha, cosines);
        std::copy_n(cosines + 0, B, residual);
      },
      [&](const double* alpha) {
        each(alpha, [&](int64_t, const double* one, const std::vector<double>& x) {
          const std::vector<double> y = plain::product(one, T, x.data());
          for (int64_t t = 0; t < T; ++t) {
            check_near(y[size_t(t)] / std::sqrt(one[t * T + t]), u[t], 1e-9, "unit_solve");
          }
        });
      });
  const int64_t seed = 11;
  for (const bool per_task : {false, true}) {
    weigh(
        B,
        T,
        "pcgrad",
        [&](double* alpha, double* residual) {
          cpu::solve(Pcgrad{{}, &seed, per_task}, M, B, T, alpha, nullptr);
          std::fill_n(residual, B, 0.0);
        },
        [&](const double* alpha) {
          each(alpha, [&](int64_t b, const double* one, const std::vector<double>& x) {
            std::vector<double> sum(static_cast<size_t>(T));
            for (int64_t i = 0; i < T && T <= 33; ++i) {
              const std::vector<double> v = plain_pcgrad(one, T, 11, b, i, per_task);
              std::transform(sum.begin(), sum.end(), v.begin(), sum.begin(), std::plus<>());
            }
            for (size_t t = 0; t < size_t(T) && T <= 33; ++t) {
              check_near(x[t], sum[t], 1e-9, "pcgrad");
            }
          });
        });
  }
  Exact<double> targets_before(B * T * T), targets_after(B * T * T);
  std::generate_n(targets_before + 0, B * T * T, [] { return double(below(5)) / 4.0 - 0.5; });
  int runs = 0;
  weigh(
      B,
      T,
      "gradvac",
      [&](double* alpha, double* residual) {
        Exact<double> targets(B * T * T);
        std::copy_n(targets_before + 0, B * T * T, targets + 0);
        cpu::solve(Gradvac{{}, &seed, 0.5, targets}, M, B, T, alpha, nullptr);
        std::fill_n(residual, B, 0.0);
        if (runs++ == 0) {
          std::copy_n(targets + 0, B * T * T, targets_after + 0);
        }
        check(targets.same_bits(targets_after), "gradvac: targets depend on the number of threads");
      },
      [&](const double* alpha) {
        each(alpha, [&](int64_t b, const double*, const std::vector<double>& x) {
          // Every weight is 1 and what others add; a target is moved towards a cosine or left alone.
          check(std::all_of(x.begin(), x.end(), [](double w) { return std::isfinite(w); }), "gradvac");
          for (int64_t i = 0; i < T * T; ++i) {
            const double moved = 2.0 * targets_after[b * T * T + i] - targets_before[b * T * T + i];
            check(std::fabs(moved) <= 1.0 + 1e-9, "gradvac: target");
          }
        });
      });
}

void balancing(int64_t B, int64_t T, Spectrum spectrum) {
  begin_case("balance B=%ld T=%ld spectrum=%d", B, T, int(spectrum));
  Exact<double> M(B * T * T), w(T), first(B * T);
  for (int64_t b = 0; b < B; ++b) {
    fill_gram(M + b * T * T, T, spectrum);
  }
  std::generate_n(w + 0, T, normal);
  const Policy policy = policy_for(T, Scale((B + T) % 3), RankRule(T % 2), B % 2 ? w + 0 : nullptr);
  with_threads([&](int64_t n) {
    Exact<double> alpha(B * T), eigenvalues(B * T);
    Exact<int64_t> rank(B);
    cpu::balance(M, B, T, policy, alpha, eigenvalues, rank);
    if (n > 1) {
      check(first.same_bits(alpha), "balance depends on the number of threads");
      return;
    }
    std::copy_n(alpha + 0, B * T, first + 0);
    check_each(alpha, M, B, T, spectrum, [&](int64_t b, const double* one, const std::vector<double>& x) {
      check(rank[b] == T, "full rank");
      check_weights(x.data(), one, T, policy, 1e-9);
    });
  });
}

// M V = V Λ, for vectors [T] at `vectors + j next` with components `step` apart.
void check_eigenpairs(
    const double* M,
    int64_t T,
    int64_t count,
    const double* eigenvalues,
    const double* vectors,
    int64_t next,
    int64_t step) {
  double size = 0.0;
  for (int64_t i = 0; i < T * T; ++i) {
    size = std::max(size, std::fabs(M[i]));
  }
  for (int64_t j = 0; j < count; ++j) {
    std::vector<double> v(static_cast<size_t>(T));
    for (int64_t i = 0; i < T; ++i) {
      v[size_t(i)] = vectors[j * next + i * step];
    }
    const double length = std::sqrt(std::inner_product(v.begin(), v.end(), v.begin(), 0.0));
    check(length > 0.0, "an eigenvector that is zero");
    std::transform(v.begin(), v.end(), v.begin(), [&](double x) { return x / length; });
    const std::vector<double> y = plain::product(M, T, v.data());
    for (size_t i = 0; i < size_t(T); ++i) {
      check_near(y[i], eigenvalues[j] * v[i], 1e-13 * double(T) * size, "eigenpair");
    }
  }
}

void eigenproblems(int64_t T, Spectrum spectrum) {
  begin_case("eigh T=%ld spectrum=%d", T, int(spectrum));
  const int64_t stride = cpu::psd_stride(T);
  for (const int64_t B : {1, 2, 3, 4, 5, 8, 9, 17}) {
    Exact<double> M(B * T * T), first(B * T);
    for (int64_t b = 0; b < B; ++b) {
      fill_gram(M + b * T * T, T, spectrum);
    }
    if (spectrum != Spectrum::poisoned) {
      Exact<double> lam(T), X(T * stride), scratch(2 * T);
      const int64_t rank = cpu::kernels().psd_eigh(M, T, lam, X, scratch);
      check(std::is_sorted(lam + 0, lam + T, std::greater<>()), "descending");
      check_eigenpairs(M, T, rank, lam, X, stride, 1);
    }
    if (T > cpu::kMaxLanesTasks || (T > 12 && B == 17)) {
      return;
    }
    if (B <= cpu::kernels().lanes) {
      for (const bool vectors : {false, true}) {
        Exact<double> lam(B * T), V(B * T * T), scratch(cpu::eigh_lanes_scratch(T));
        cpu::kernels().eigh_lanes(M, T, B, lam, vectors ? V + 0 : nullptr, scratch);
      }
    }
    with_threads([&](int64_t n) {
      Exact<double> lam(B * T), V(B * T * T);
      cpu::eigh(M, B, T, lam, V);
      if (n > 1) {
        check(first.same_bits(lam), "eigh depends on the number of threads");
        return;
      }
      std::copy_n(lam + 0, B * T, first + 0);
      for (int64_t b = 0; b < B && spectrum != Spectrum::poisoned; ++b) {
        check(std::is_sorted(lam + b * T, lam + (b + 1) * T), "ascending");
        check_eigenpairs(M + b * T * T, T, T, lam + b * T, V + b * T * T, 1, T);
      }
    });
  }
}

// --- what is run

void gradients(int64_t T, int64_t P, Dtype dtype, int64_t offset, Kind kind, bool is_ragged, bool aligning) {
  begin_case(
      "T=%ld P=%ld dtype=%d offset=%ld kind=%d %s",
      T,
      P,
      int(dtype),
      offset,
      int(kind),
      is_ragged ? "ragged" : "one tensor");
  Matrices G(1, T, is_ragged ? ragged(P, dtype, P % 2) : std::vector<Piece>{{P, dtype, 0}}, offset, kind);
  if (kind == Kind::normal) {
    kernel_ranges(G);
  }
  one_matrix(G, kind, aligning);
}

// Functions of M that take no eigenvectors to check: one, and λ itself.
void tridiagonal(int64_t T, Spectrum spectrum) {
  begin_case("tridiagonal T=%ld spectrum=%d", T, int(spectrum));
  Exact<double> M(T * T), w(T), ones(T);
  fill_gram(M, T, spectrum);
  std::generate_n(w + 0, T, normal);
  std::fill_n(ones + 0, T, 1.0);
  const double size = *std::max_element(M + 0, M + T * T) * double(T); // of a diagonal entry, so at least λ_max
  Exact<double> first(5 * T);
  const Policy policy{nullptr, Scale::min, RankRule::normalized, 1e-4, 1e-12};
  with_threads([&](int64_t n) {
    Exact<double> lam(T), alone(T), same(T), times(T), root(T), alpha(T), all(5 * T);
    cpu::Tridiagonal solver(M, T);
    std::fill_n(root + 0, T, 0.0);
    std::fill_n(alpha + 0, T, 0.0);
    double below = 0.0, above = 0.0, smallest;
    const bool definite = solver.smallest(&below, &above) && below > 1e-8 * solver.largest();
    if (definite) {
      solver.inverse_root(below, w, root);
      solver.inverse_root(below, root, root);
      if (!cpu::definite_weights(M, T, policy, alpha, &smallest)) {
        std::fill_n(alpha + 0, T, 0.0); // nothing of use
      }
    }
    solver.solve(lam, true);
    solver.apply(ones, w, same);
    solver.apply(lam, w, times);
    cpu::Tridiagonal(M, T).solve(alone, false);
    check(alone.same_bits(lam), "the eigenvalues depend on the rotations' being kept");
    for (int64_t i = 0; i < T; ++i) {
      all[i] = lam[i];
      all[T + i] = same[i];
      all[2 * T + i] = times[i];
      all[3 * T + i] = root[i];
      all[4 * T + i] = alpha[i];
    }
    if (n > 1) {
      check(first.same_bits(all), "tridiagonal depends on the number of threads");
      return;
    }
    std::copy_n(all + 0, 5 * T, first + 0);
    check(!definite || (below <= lam[T - 1] * (1.0 + 1e-9) && lam[T - 1] <= above * (1.0 + 1e-9)), "the smallest one");
    double trace = 0.0;
    for (int64_t i = 0; i < T; ++i) {
      double product = 0.0, back = 0.0;
      for (int64_t j = 0; j < T; ++j) {
        product += M[i * T + j] * w[j];
        back += M[i * T + j] * root[j];
      }
      check_near(definite ? back : w[i], w[i], 1e-6, "M M^-1/2 M^-1/2 w");
      check_near(same[i], w[i], 1e-12, "V Vᵀ w");
      check_near(times[i], product, 1e-12 * size, "V Λ Vᵀ w");
      check(i == 0 || lam[i - 1] >= lam[i], "eigenvalues descend");
      trace += M[i * T + i] - lam[i];
    }
    check_near(trace, 0.0, 1e-12 * size, "trace");
  });
}

void run(bool full) {
  std::vector<int64_t> tasks = {1, 2, 3, 4, 5, 6, 7, 12, 17, 33};
  std::vector<int64_t> parameters = {0, 1, 3, 8, 17, 63, 1000};
  std::vector<int64_t> batch_sizes = {1, 9};
  if (full) {
    tasks = {31, 33, 63, 64, 65, 100, 130};
    for (int64_t T = 1; T <= 20; ++T) {
      tasks.push_back(T);
    }
    parameters = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 4097};
    batch_sizes = {1, 2, 3, 5, 8, 9, 17};
  }
  for (const int64_t T : tasks) {
    for (const int64_t P : parameters) {
      for (const Dtype dtype : kDtypes) {
        // More of the plain eigensolver would take all the time.
        const bool afford = T <= 20 || (T <= 33 && P % 2) || (P == 4097 && dtype == Dtype::f32);
        gradients(T, P, dtype, 0, Kind::normal, false, afford);
        gradients(T, P, dtype, 1, Kind::normal, true, afford && T <= 64);
        if (P <= 1000 && T <= 33) {
          const Kind kinds[] = {Kind::special, Kind::subnormal, Kind::huge, Kind::tiny};
          gradients(T, P, dtype, 1, kinds[(T + P) % 4], T % 2, true);
        }
      }
    }
    for (const Spectrum spectrum : kSpectra) {
      for (const int64_t B : {1, 2, 17}) {
        if (B == 1 || T <= 20 || (B == 2 && T <= 33)) {
          solvers(B, T, spectrum);
          balancing(B, T, spectrum);
        }
      }
      eigenproblems(T, spectrum);
    }
    for (const int64_t B : batch_sizes) {
      for (const int64_t P : {int64_t(1), int64_t(17), 3 * T + 2, int64_t(200)}) {
        if (T <= 20 || (T <= 65 && B <= 2)) {
          const Dtype dtype = kDtypes[(T + P) % 4];
          batches(B, T, P, dtype, B % 2, Kind::normal);
          batches(B, T, P, Dtype::f64, 1, Kind((T + B) % 5));
        }
      }
    }
  }
  std::vector<int64_t> sizes = {1, 2, 3, 7, 8, 9, 31, 32, 33, 41, 65};
  for (int64_t T = 10; full && T <= 100; ++T) {
    sizes.push_back(T);
  }
  for (const int64_t T : sizes) {
    for (const Spectrum spectrum : kSpectra) {
      if (spectrum != Spectrum::poisoned) {
        tridiagonal(T, spectrum);
      }
    }
  }
  if (full) {
    tridiagonal(744, Spectrum::regular); // in several parts
  }
  // Large enough for several threads, float32 blocks of full size and stores past the cache.
  const std::pair<int64_t, int64_t> large[] = {
      {1, 300007}, {2, 70001}, {5, 20011}, {17, 70001}, {33, 20011}, {65, 9001}};
  for (const auto& [T, P] : large) {
    if (full || T == 5 || T == 17) {
      for (const Dtype dtype : kDtypes) {
        if (dtype == Dtype::f32 || full) {
          gradients(T, P, dtype, 0, Kind::normal, false, true);
          gradients(T, P, dtype, 1, Kind::normal, true, T <= 33);
        }
      }
    }
  }
}

// --- mistakes of a caller

void defect(const std::string& name) {
  current_case = name;
  const auto short_by = [](int64_t T, int64_t rows_short, int64_t out_short, auto call) {
    constexpr int64_t P = 64;
    std::vector<Exact<float>> rows;
    std::vector<const void*> pointers;
    for (int64_t t = 0; t < T; ++t) {
      rows.emplace_back(P - rows_short);
      std::fill_n(rows.back() + 0, P - rows_short, 1.0f);
      pointers.push_back(rows.back() + 0);
    }
    Exact<float> out(P - out_short);
    const Segment segment{pointers.data(), out + 0, P, Dtype::f32};
    call(Gradients{&segment, 1, T}, P);
  };
  std::vector<double> ones(64, 1.0), M(64 * 64);
  if (name == "short row in gram" || name == "short row in packed gram") {
    short_by(name == "short row in gram" ? 3 : 12, 1, 0, [&](const Gradients& G, int64_t) { cpu::gram(G, M.data()); });
  } else if (name == "short row in sign_drop") {
    short_by(3, 1, 0, [&](const Gradients& G, int64_t P) { cpu::kernels().sign_drop(G, 1, 0, nullptr, 0, P, false); });
  } else if (name == "short result of combine" || name == "short result of combine past the cache") {
    const bool stream = name != "short result of combine";
    short_by(3, 0, 1, [&](const Gradients& G, int64_t P) { cpu::kernels().combine(G, ones.data(), 0, P, stream); });
  } else if (name == "short scratch") {
    const int64_t T = 5, size = cpu::psd_stride(T) * T;
    Exact<double> A(T * T), lam(T), X(size - 1), scratch(2 * T);
    fill_gram(A, T, Spectrum::regular);
    cpu::kernels().psd_eigh(A, T, lam, X, scratch);
  } else if (name == "misaligned scratch") {
    const int64_t T = 5;
    Exact<double> A(T * T), lam(T), V(T * T), scratch(cpu::eigh_lanes_scratch(T), 1);
    fill_gram(A, T, Spectrum::regular);
    cpu::kernels().eigh_lanes(A, T, 1, lam, V, scratch);
  } else if (name == "scratch of all threads") {
    cpu::share_scratch = true;
    torch::stable::worker_count = 2;
    Matrices G(8, 4, {{100, Dtype::f32, 0}}, 0, Kind::normal);
    cpu::gram_batch(G.all(), G.B, M.data());
  } else if (name == "one result for all threads") {
    Matrices G(1, 4, {{100, Dtype::f32, 0}}, 0, Kind::normal);
    torch::stable::worker_count = 2;
    torch::stable::parallel_for(
        0, 2, 1, [&](int64_t, int64_t) { cpu::kernels().combine(G.one(), ones.data(), 0, G.P, false); });
  } else if (name == "scratch within scratch") {
    double* outer = cpu::thread_scratch(0, 100);
    cpu::thread_scratch(0, 50);
    outer[60] = 1.0;
  } else {
    fail("no such defect");
  }
  std::printf("not found\n");
}

} // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "name") {
    std::printf("%s\n", cpu::kernels().name);
  } else if (what == "defect" && count > 2) {
    defect(arguments[2]);
  } else if (what == "quick" || what == "full") {
    run(what == "full");
    std::printf("%s: %ld cases hold\n", cpu::kernels().name, long(cases));
  } else {
    std::fprintf(stderr, "usage: driver name | quick | full | defect NAME\n");
    return 2;
  }
  return 0;
}
