#include "tridiagonal.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../common.h"
#include "../math/elliptic.h"
#include "kernels.h"
#include "threads.h"

namespace fastmtl::cpu {

namespace {

// A part of the triangle that is worth a thread: fewer bytes are read before a second thread wakes up.
constexpr int64_t kPartTiles = 2048;
constexpr int64_t kMaxParts = 16;
constexpr int64_t kSweeps = 30; // for an eigenvalue; two suffice on average

int64_t blocks_of(int64_t n) {
  return (n + kSide - 1) / kSide;
}

int64_t parts_of(int64_t blocks) {
  return std::clamp<int64_t>(tile_offset(blocks, 0) / (kSide * kSide) / kPartTiles, 1, kMaxParts);
}

// First row of tiles of a part: the parts of a triangle are even.
int64_t part_begin(int64_t part, int64_t parts, int64_t blocks) {
  return part == parts ? blocks : int64_t(double(blocks) * std::sqrt(double(part) / double(parts)));
}

// Entries of v of H_1 ... H_{n-1}, each in whole blocks.
int64_t vectors_before(int64_t n) {
  const int64_t q = (n - 1) / kSide, r = (n - 1) % kSide;
  return (kSide * q * (q + 1) / 2 + r * (q + 1)) * kSide;
}

} // namespace

PartialFractions inverse_root_fractions(double low, double high, double error) {
  constexpr double kPi = 3.14159265358979323846;
  high = std::max(low, high);
  double a[kMaxMeans], b[kMaxMeans];
  const int means = elliptic_means(low, high, a, b);
  const auto N = int64_t(std::ceil(std::log(4.0 / error) * std::log(16.0 * (high / low)) / (2.0 * kPi * kPi)));
  PartialFractions f{std::vector<double>(size_t(N)), std::vector<double>(size_t(N))};
  for (int64_t j = 0; j < N; ++j) {
    const PartialFraction term = inverse_root_fraction(low, high, a, b, means, j, N);
    f.t[size_t(j)] = term.t;
    f.c[size_t(j)] = term.c;
  }
  return f;
}

Tridiagonal::Tridiagonal(const double* M, int64_t T)
    : T_(T),
      memory_(new double[size_t(vectors_before(T) + 8)]),
      vectors_(aligned(memory_.get())),
      tau_(static_cast<size_t>(T)),
      diagonal_(static_cast<size_t>(T)),
      off_(static_cast<size_t>(T + 1)),
      rows_(static_cast<size_t>(T)),
      order_(static_cast<size_t>(T)),
      left_(kSweeps * T) {
  double largest = 0.0;
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      largest = std::max(largest, std::fabs(M[i * T + j]));
    }
  }
  std::frexp(largest, &exponent_);
  // Two factors: one alone could not be represented for subnormal entries.
  const double half = std::ldexp(1.0, -exponent_ / 2), rest = std::ldexp(1.0, -exponent_ + exponent_ / 2);
  const int64_t blocks = blocks_of(T);
  const std::unique_ptr<double[]> memory(new double[size_t(tile_offset(blocks, 0) + 8)]);
  double* const tiles = aligned(memory.get());
  std::fill_n(tiles + tile_offset(blocks - 1, 0), blocks * kSide * kSide, 0.0); // T may end within
  std::iota(rows_.begin(), rows_.end(), int64_t(0));
  std::stable_sort(rows_.begin(), rows_.end(), [&](int64_t a, int64_t b) { return M[a * T + a] < M[b * T + b]; });
  for (int64_t i = 0; i < T; ++i) {
    const double* const row = M + rows_[size_t(i)] * T;
    const int64_t q = i / kSide, columns = std::min(T, (q + 1) * kSide);
    for (int64_t j = 0; j < columns; ++j) {
      const double entry = row[rows_[size_t(j)]];
      tiles[tile_offset(q, j / kSide) + i % kSide * kSide + j % kSide] = entry * half * rest;
    }
  }
  reduce(tiles);
}

double* Tridiagonal::keep(int64_t rotations) {
  constexpr int64_t kPiece = int64_t(1) << 17; // a mebibyte
  if (used_ + 2 * rotations > capacity_) {
    capacity_ = std::max(kPiece, 2 * rotations);
    rotations_.emplace_back(new double[size_t(capacity_)]);
    used_ = 0;
  }
  double* const memory = rotations_.back().get() + used_;
  used_ += 2 * rotations;
  return memory;
}

void Tridiagonal::reduce(double* tiles) {
  const int64_t blocks = blocks_of(T_), stride = blocks * kSide, most = parts_of(blocks);
  std::vector<double> memory(static_cast<size_t>(blocks * kPanelBlock + (most + 1) * stride + 8));
  double *const panel = aligned(memory.data()), *const row = panel + blocks * kPanelBlock, *const y = row + stride;
  const Kernels& kernel = kernels();
  int64_t n = T_ - 1; // row
  while (n > 0) {
    const int64_t end = n / kPanel * kPanel; // rows below are updated when the panel is full
    const int64_t width = blocks_of(n + 1);
    for (int64_t c = 0; c < width; ++c) {
      std::copy_n(tiles + tile_offset(n / kSide, c) + n % kSide * kSide, kSide, row + c * kSide);
    }
    int64_t k = 0;
    for (; n >= std::max<int64_t>(end, 1); --n, ++k) {
      diagonal_[size_t(n)] = row[n];
      double* const v = vectors_ + vectors_before(n);
      const double tau = kernel.reflector(row, n, v, &off_[size_t(n)], panel, k);
      tau_[size_t(n)] = tau;
      const int64_t used = blocks_of(n), parts = parts_of(used);
      parallel_for(0, parts, 1, [&](int64_t begin, int64_t until) {
        const bool back = n % 2;
        for (int64_t walked = begin; walked < until; ++walked) {
          const int64_t p = back ? begin + until - 1 - walked : walked, last = part_begin(p + 1, parts, used);
          std::fill_n(y + p * stride, last * kSide, 0.0);
          kernel.symmetric_multiply(tiles, part_begin(p, parts, used), last, back, v, y + p * stride);
        }
      });
      // Only the last part has all of the rows.
      double* const sum = y + (parts - 1) * stride;
      for (int64_t p = 0; p < parts - 1; ++p) {
        const int64_t rows = part_begin(p + 1, parts, used) * kSide;
        for (int64_t i = 0; i < rows; ++i) {
          sum[i] += y[p * stride + i];
        }
      }
      const bool more = n > std::max<int64_t>(end, 1);
      if (more) {
        for (int64_t c = 0; c < used; ++c) {
          std::copy_n(tiles + tile_offset((n - 1) / kSide, c) + (n - 1) % kSide * kSide, kSide, row + c * kSide);
        }
      }
      kernel.panel_column(panel, k, n, v, tau, sum, more ? row : nullptr);
    }
    const int64_t used = blocks_of(std::max<int64_t>(end, 1)), parts = parts_of(used);
    parallel_for(0, parts, 1, [&](int64_t begin, int64_t until) {
      kernel.symmetric_update(tiles, part_begin(begin, parts, used), part_begin(until, parts, used), panel, k);
    });
  }
  diagonal_[0] = tiles[0];
}

bool Tridiagonal::falls(int64_t i) {
  constexpr double kEps = kRounding / 2.0;
  const double square = off_[size_t(i + 1)] * off_[size_t(i + 1)];
  const bool small = square <= kEps * kEps * std::fabs(diagonal_[size_t(i)] * diagonal_[size_t(i + 1)]) + kTinySquare;
  if (small) {
    off_[size_t(i + 1)] = 0.0;
  }
  return small;
}

bool Tridiagonal::solve_block(int64_t first, int64_t last, bool rotations) {
  // QL should end up at the larger end, so it starts from the other one.
  const int64_t step = std::fabs(diagonal_[size_t(last)]) < std::fabs(diagonal_[size_t(first)]) ? -1 : 1;
  const int64_t size = last - first;
  const int64_t start = step > 0 ? first : last;
  const auto edge = [&](int64_t i) { return step > 0 ? start + i : start - i - 1; }; // of off-diagonal entry i
  for (int64_t l = 0; l < size;) {
    int64_t m = l;
    while (m < size && !falls(edge(m))) {
      ++m;
    }
    if (m == l) {
      ++l;
      continue;
    }
    if (left_-- == 0) {
      return false;
    }
    const int64_t row = start + l * step, count = m - l;
    double* to = nullptr;
    if (rotations) {
      to = keep(count);
      sweeps_.push_back({row, step, count, to});
    }
    kernels().ql_sweep(diagonal_.data() + row, off_.data() + edge(l) + 1, step, count, to);
  }
  return true;
}

bool Tridiagonal::solve(double* eigenvalues, bool rotations) {
  bool good = true;
  for (int64_t first = 0; first < T_ && good;) {
    int64_t last = first;
    while (last < T_ - 1 && !falls(last)) {
      ++last;
    }
    good = solve_block(first, last, rotations);
    first = last + 1;
  }
  std::iota(order_.begin(), order_.end(), int64_t(0));
  if (!good) {
    std::fill_n(eigenvalues, T_, std::numeric_limits<double>::quiet_NaN());
    return false;
  }
  std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
    const double x = diagonal_[size_t(a)], y = diagonal_[size_t(b)];
    return x > y || (x == y && a < b);
  });
  for (int64_t j = 0; j < T_; ++j) {
    eigenvalues[j] = std::ldexp(diagonal_[size_t(order_[size_t(j)])], exponent_);
  }
  return true;
}

double Tridiagonal::growth(const double* lengths, double floor) const {
  std::vector<double> length(static_cast<size_t>(T_)), inverse(static_cast<size_t>(T_));
  for (int64_t i = 0; i < T_; ++i) {
    length[size_t(i)] = std::max(floor, lengths[rows_[size_t(i)]]);
    inverse[size_t(i)] = 1.0 / length[size_t(i)];
  }
  double most = 1.0;
  for (int64_t n = T_ - 1; n > 0; --n) {
    if (tau_[size_t(n)] == 0.0) {
      continue;
    }
    const double* const v = vectors_ + vectors_before(n);
    double from = 0.0, to = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double size = std::fabs(v[i]);
      from = std::max(from, size * length[size_t(i)]);
      to = std::max(to, size * inverse[size_t(i)]);
    }
    most = std::max(most, from * to);
  }
  return most;
}

void Tridiagonal::to_basis(const double* w, double* x) const {
  for (int64_t i = 0; i < T_; ++i) {
    x[i] = w[rows_[size_t(i)]];
  }
  for (int64_t n = T_ - 1; n > 0; --n) {
    kernels().reflect(vectors_ + vectors_before(n), n, tau_[size_t(n)], x);
  }
}

void Tridiagonal::from_basis(double* x, double* y) const {
  for (int64_t n = 1; n < T_; ++n) {
    kernels().reflect(vectors_ + vectors_before(n), n, tau_[size_t(n)], x);
  }
  for (int64_t i = 0; i < T_; ++i) {
    y[rows_[size_t(i)]] = x[i];
  }
}

void Tridiagonal::apply(const double* f, const double* w, double* y) const {
  std::vector<double> memory(static_cast<size_t>(blocks_of(T_) * kSide + 8));
  double* const x = aligned(memory.data());
  to_basis(w, x);
  const Kernels& kernel = kernels();
  for (const Sweep& sweep : sweeps_) {
    kernel.rotate(sweep.rotations, sweep.step, sweep.count, false, x + sweep.first);
  }
  for (int64_t j = 0; j < T_; ++j) {
    x[order_[size_t(j)]] *= f[j];
  }
  for (auto sweep = sweeps_.rbegin(); sweep != sweeps_.rend(); ++sweep) {
    kernel.rotate(sweep->rotations, sweep->step, sweep->count, true, x + sweep->first);
  }
  from_basis(x, y);
}

double Tridiagonal::largest() const {
  double most = 0.0; // Gershgorin's
  for (int64_t i = 0; i < T_; ++i) {
    most = std::max(most, diagonal_[size_t(i)] + std::fabs(off_[size_t(i)]) + std::fabs(off_[size_t(i + 1)]));
  }
  return std::ldexp(most, exponent_);
}

bool Tridiagonal::smallest(double* below, double* above) const {
  const Kernels& kernel = kernels();
  double high = *std::min_element(diagonal_.begin(), diagonal_.end()), low = 0.0;
  double shifts[kMaxShifts];
  while (high > 0.0 && high - low > kSmallestWidth * high) {
    // Evenly, or by factors where nobody knows its size.
    const double from = low > 0.0 ? low : kRounding * high, pieces = double(kernel.shifts);
    const double factor = std::pow(high / from, 1.0 / pieces);
    for (int64_t j = 0; j < kernel.shifts; ++j) {
      shifts[j] = from < 0.5 * high ? from * std::pow(factor, double(j)) : from + (high - from) * double(j) / pieces;
    }
    const int64_t first = kernel.definite_shifts(diagonal_.data(), off_.data() + 1, T_, shifts);
    if (first == 0) {
      return false;
    }
    low = shifts[first - 1];
    high = first < kernel.shifts ? shifts[first] : high;
  }
  *below = std::ldexp(low, exponent_);
  *above = std::ldexp(high, exponent_);
  return low > 0.0;
}

void Tridiagonal::shifted(const PartialFractions& f, const double* w, double* y) const {
  const int64_t rows = blocks_of(T_) * kSide;
  std::vector<double> memory(static_cast<size_t>(2 * rows + shifted_scratch(T_) + 8));
  double *const scratch = aligned(memory.data()), *const x = scratch + shifted_scratch(T_), *const z = x + rows;
  to_basis(w, x);
  kernels().shifted_solves(
      diagonal_.data(), off_.data() + 1, T_, x, f.t.data(), f.c.data(), int64_t(f.t.size()), z, scratch);
  from_basis(z, y);
}

void Tridiagonal::resolvent(double t, const double* w, double* y) const {
  shifted({{std::ldexp(t, -exponent_)}, {std::ldexp(1.0, -exponent_)}}, w, y);
}

void Tridiagonal::inverse_root(double smallest, const double* w, double* y) const {
  PartialFractions f =
      inverse_root_fractions(std::ldexp(smallest, -exponent_), std::ldexp(largest(), -exponent_), kFractionsError);
  const int half = exponent_ >> 1; // of M = 2^exponent Q S Qᵀ
  for (double& c : f.c) {
    c = std::ldexp(exponent_ & 1 ? std::sqrt(0.5) * c : c, -half);
  }
  shifted(f, w, y);
}

} // namespace fastmtl::cpu
