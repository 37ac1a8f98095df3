// The Gram matrix M = G Gᵀ of ragged rows.
//
// M_ij = Σ_k g_ik g_jk for j >= i: T (T + 1) / 2 multiply-adds a column, half of a GEMM's. G is read once from memory:
// T P sizeof(element) bytes, and nothing is written but T² sums.
//
// Up to kTile + 1 rows the products of a block of columns fit the registers, and the rows are read where they lie. More
// rows are packed first: a block of columns (short enough for the second-level cache) is converted to the accumulation
// type, once, into panels of at most kTile rows, vector by vector, so that a tile of kTile x kTile products streams two
// panels; the panel of the tile's columns stays in the first-level cache. While a block is multiplied the next one is
// prefetched, a few lines with every step of a tile. Missing rows are left out of the panels, so they cost nothing.
//
// In float32 every packed block is probed before it leaves the cache: see probe.h.
#pragma once

namespace fastmtl::cpu {
namespace {

#if FASTMTL_VECTOR_BYTES == 64
constexpr int kTile = 5; // 25 accumulators, 5 + 1 operands of 32 registers
#else
constexpr int kTile = 3; // 9 accumulators, 3 + 1 operands of 16 registers
#endif
constexpr int kMaxDirect = kTile + 1;    // rows whose triangle of products fits the registers
constexpr int64_t kDirectColumns = 4096; // of one block read in place
// Columns of one packed block: the two panels of a tile stay in the first-level cache. Float32 sums over a block go to
// float64 after it: 64 terms a lane, whatever the width of a vector.
template <class A>
constexpr int64_t kPackedColumns = sizeof(A) == 8 ? 256 : 64 * kWidth32;
// Up to here the vectors of sums fit the second-level cache and are carried from block to block.
constexpr int64_t kMaxCarried = 128;
constexpr int64_t kWideColumns = 32 * kWidth32; // beyond: the packed block alone fills that cache
constexpr int64_t kLine = 64;                   // bytes in a cache line

template <class A>
struct VectorOf;
template <>
struct VectorOf<double> {
  using type = Vd;
};
template <>
struct VectorOf<float> {
  using type = Vf;
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int64_t kLanes = int64_t(sizeof(Vec<A>) / sizeof(A));

// Sums of the R (R + 1) / 2 products of R rows read in place; U independent sets of sums hide the latency of few rows.
template <class E, int R, int U>
void direct_triangle(const E* const* rows, int64_t n, double* M, const int32_t* index, int64_t T) {
  Vd sums[U][R * (R + 1) / 2];
  for (int u = 0; u < U; ++u) {
    for (int i = 0; i < R * (R + 1) / 2; ++i) {
      sums[u][i] = Vd{};
    }
  }
  const auto step = [&](const E* const* at, int64_t k, Vd* into) __attribute__((always_inline)) {
    Vd x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      x[r] = load(at[r] + k, double{});
    }
    int i = 0;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = r; c < R; ++c, ++i) {
        into[i] += x[r] * x[c];
      }
    }
  };
  int64_t k = 0;
  for (; k + U * kWidth <= n; k += U * kWidth) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      step(rows, k + u * kWidth, sums[u]);
    }
  }
  for (; k + kWidth <= n; k += kWidth) {
    step(rows, k, sums[0]);
  }
  if (k < n) { // the last, partial vector: through a buffer of zeros
    E tail[R][kWidth];
    const E* at[R];
    __builtin_memset(tail, 0, sizeof(tail));
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(tail[r], rows[r] + k, size_t(n - k) * sizeof(E));
      at[r] = tail[r];
    }
    step(at, 0, sums[0]);
  }
  int i = 0;
  for (int r = 0; r < R; ++r) {
    for (int c = r; c < R; ++c, ++i) {
      Vd total = sums[0][i];
      for (int u = 1; u < U; ++u) {
        total += sums[u][i];
      }
      M[index[r] * T + index[c]] += sum(total);
    }
  }
}

// `rows` present rows (at most kMaxDirect) of n columns.
template <class E>
void direct(const E* const* rows, int count, int64_t n, double* M, const int32_t* index, int64_t T) {
  switch (count) {
    case 1:
      return direct_triangle<E, 1, 8>(rows, n, M, index, T);
    case 2:
      return direct_triangle<E, 2, 4>(rows, n, M, index, T);
    case 3:
      return direct_triangle<E, 3, 2>(rows, n, M, index, T);
    case 4:
      return direct_triangle<E, 4, 1>(rows, n, M, index, T);
#if FASTMTL_VECTOR_BYTES == 64
    case 5:
      return direct_triangle<E, 5, 1>(rows, n, M, index, T);
    case 6:
      return direct_triangle<E, 6, 1>(rows, n, M, index, T);
#endif
    default:
      return;
  }
}

// The rows present in a block, dealt to panels of even height.
struct Panels {
  const void** rows; // [count] -> first element of the block
  int32_t* index;    // [count] -> row of M
  int32_t* first;    // [panels + 1] -> first row of a panel
  int64_t count = 0;
  int64_t panels = 0;

  void collect(const Block& block, int64_t T) {
    count = 0;
    const int64_t offset = block.begin * element_size(block.segment->dtype);
    for (int64_t t = 0; t < T; ++t) {
      if (const void* p = block.segment->rows[t]) {
        rows[count] = static_cast<const char*>(p) + offset;
        index[count++] = int32_t(t);
      }
    }
    panels = (count + kTile - 1) / kTile;
    for (int64_t p = 0; p <= panels && panels; ++p) {
      first[p] = int32_t(count * p / panels);
    }
  }
  bool same_rows(const Panels& other) const {
    return count == other.count && __builtin_memcmp(index, other.index, size_t(count) * sizeof(int32_t)) == 0;
  }
};

// Rows of the next block of which a tile fetches its share, a line of each with every few steps.
struct Prefetch {
  const void* const* rows;
  int64_t count;

  FASTMTL_INLINE void at(int64_t byte) const {
    if (byte % kLine == 0) { // steps divide a line or are whole lines, so every line is met
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(static_cast<const char*>(rows[i]) + byte, 0, 2);
      }
    }
  }
};

// Deals the rows of the next block evenly to the tiles of this one.
class Shares {
 public:
  Shares(const Panels& next, int64_t tiles) : rows_(next.rows), count_(next.count), tiles_(tiles) {}

  Prefetch next() {
    int64_t take = 0;
    for (due_ += count_; due_ >= tiles_; due_ -= tiles_) {
      ++take;
    }
    const Prefetch share{rows_, take};
    rows_ += take;
    return share;
  }

 private:
  const void* const* rows_;
  int64_t count_, tiles_, due_ = 0;
};

// The products of one panel with itself, read where the rows lie; on the way the panel is written to `packed`,
// converted and zero-padded to a whole number of vectors, for the tiles that come.
template <class A, class E, int R>
void diagonal_tile(
    const void* const* rows, // [R] -> [n] of E
    int64_t n,
    A* packed,    // [n / lanes rounded up, R, lanes]
    Vec<A>* sums, // [R (R + 1) / 2] vectors
    bool fresh,   // whether they start from zero
    const Prefetch& prefetch,
    int64_t prefetch_step) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const E* at[R];
  V s[R * (R + 1) / 2];
#pragma GCC unroll 32
  for (int i = 0; i < R * (R + 1) / 2; ++i) {
    s[i] = fresh ? V{} : sums[i];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    at[r] = static_cast<const E*>(rows[r]);
  }
  const auto step = [&](const E* const* from, int64_t k) __attribute__((always_inline)) {
    V x[R];
    int i = 0;
#pragma GCC unroll 8
    for (int c = 0; c < R; ++c) {
      x[c] = load(from[c] + k, A{});
      write(packed + c * L, x[c]);
#pragma GCC unroll 8
      for (int r = 0; r <= c; ++r, ++i) {
        s[i] += x[r] * x[c];
      }
    }
    packed += R * L;
  };
  int64_t k = 0, fetched = 0;
  for (; k + L <= n; k += L) {
    step(at, k);
    prefetch.at(fetched);
    fetched += prefetch_step;
  }
  if (k < n) { // the last, partial vector: through a buffer of zeros
    E tail[R][L];
    const E* from[R];
    __builtin_memset(tail, 0, sizeof(tail));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(tail[r], at[r] + k, size_t(n - k) * sizeof(E));
      from[r] = tail[r];
    }
    step(from, 0);
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * (R + 1) / 2; ++i) {
    sums[i] = s[i];
  }
}

// One tile: products of panel a (R rows) with panel b (C rows) over n columns.
template <class A, int R, int C>
void tile(
    const A* a, // [n / lanes, R, lanes]
    const A* b, // [n / lanes, C, lanes]
    int64_t n,
    Vec<A>* sums, // [R, C] vectors
    bool fresh,   // whether they start from zero
    const Prefetch& prefetch,
    int64_t prefetch_step) { // bytes of a source row for one vector of columns
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  V s[R * C];
#pragma GCC unroll 32
  for (int i = 0; i < R * C; ++i) {
    s[i] = fresh ? V{} : sums[i];
  }
  int64_t fetched = 0;
  for (int64_t k = 0; k < n; k += L, a += R * L, b += C * L) {
    V x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      x[r] = read<V>(a + r * L);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const V y = read<V>(b + c * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        s[r * C + c] += x[r] * y;
      }
    }
    prefetch.at(fetched);
    fetched += prefetch_step;
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * C; ++i) {
    sums[i] = s[i];
  }
}

// Calls f with std::integral_constant<int, R>, R <= kTile.
template <class F>
FASTMTL_INLINE void with_height(int64_t R, F&& f) {
  switch (R) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
#if FASTMTL_VECTOR_BYTES == 64
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
#endif
    default:
      return;
  }
}

// The products of packed rows. Every tile has its vectors of sums; those are carried from block to block while they fit
// the cache, then each is summed over its lanes into a float64 total. Totals stand in the order of the tiles.
template <class A>
class PackedGram {
 public:
  static constexpr int64_t scratch(int64_t T, int64_t columns) { // in doubles, a multiple of a cache line
    return (T * columns * int64_t(sizeof(A)) + carried(T) * FASTMTL_VECTOR_BYTES) / 8 + (products(T) + 7) / 8 * 8;
  }

  PackedGram(double* memory, int64_t T)
      : T_(T),
        sums_(reinterpret_cast<Vec<A>*>(memory)),
        totals_(memory + carried(T) * FASTMTL_VECTOR_BYTES / 8),
        packed_(reinterpret_cast<A*>(totals_ + (products(T) + 7) / 8 * 8)) {
    __builtin_memset(totals_, 0, size_t(products(T)) * sizeof(double));
  }

  // Adds the products of one block; `next` are the rows of the block to come (none at the end), fetched meanwhile.
  // `last` says that the totals are wanted after this one.
  template <class E>
  void add(const Panels& panels, int64_t n, const Panels& next, int64_t next_element, bool last) {
    const int64_t padded = (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    const int64_t step = next_element * kLanes<A>;
    const bool fresh = columns_ == 0, carry = T_ <= kMaxCarried;
    columns_ += n;
    const bool total = last || !carry || sizeof(A) == 4;
    columns_ = total ? 0 : columns_;
    Vec<A>* sums = sums_;
    double* totals = totals_;
    const auto done = [&](int64_t products) __attribute__((always_inline)) {
      if (total) {
        add_sums(sums, products, totals);
      }
      sums += carry ? products : 0;
      totals += products;
    };
    Shares shares(next, panels.panels * (panels.panels + 1) / 2);
    for (int64_t j = 0; j < panels.panels; ++j) {
      const int64_t c0 = panels.first[j], width = panels.first[j + 1] - c0;
      A* const b = packed_ + c0 * padded;
      with_height(width, [&](auto C) __attribute__((always_inline)) {
        diagonal_tile<A, E, C>(panels.rows + c0, n, b, sums, fresh, shares.next(), step);
        done(C * (C + 1) / 2);
        for (int64_t i = 0; i < j; ++i) {
          const int64_t r0 = panels.first[i], height = panels.first[i + 1] - r0;
          with_height(height, [&](auto R) __attribute__((always_inline)) {
            tile<A, R, C>(packed_ + r0 * padded, b, padded, sums, fresh, shares.next(), step);
            done(R * C);
          });
        }
      });
    }
  }

  // y += G (Gᵀ z) of the block that was added last.
  void probe(const Panels& panels, int64_t n, const double* z, double* y) {
    const int64_t padded = (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>, stride = probe_stride(T_);
    double* u = thread_scratch(1, kNarrowProbes * padded);
    for (const bool back : {false, true}) {
      for (int64_t j = 0; j < panels.panels; ++j) {
        const int64_t first = panels.first[j], height = panels.first[j + 1] - first;
        double own[kNarrowProbes * kTile];
        const auto each = [&](auto&& f) {
          for (int64_t i = 0; i < kNarrowProbes * height; ++i) {
            f(own[i], i / height * stride + panels.index[first + i % height]);
          }
        };
        with_height(height, [&](auto R) __attribute__((always_inline)) {
          if (back) {
            reflect_back<R>(packed_ + first * padded, padded, u, own);
            each([&](double mine, int64_t at) { y[at] += mine; });
          } else {
            each([&](double& mine, int64_t at) { mine = z[at]; });
            project<R>(packed_ + first * padded, padded, own, j == 0, u);
          }
        });
      }
    }
  }

  // M += the totals, which start again from zero.
  void flush(const Panels& panels, double* M) {
    double* total = totals_;
    const auto take = [&](int64_t row, int64_t column) {
      M[panels.index[row] * T_ + panels.index[column]] += *total;
      *total++ = 0.0;
    };
    for (int64_t j = 0; j < panels.panels; ++j) {
      for (int64_t c = panels.first[j]; c < panels.first[j + 1]; ++c) {
        for (int64_t r = panels.first[j]; r <= c; ++r) {
          take(r, c);
        }
      }
      for (int64_t i = 0; i < j; ++i) {
        for (int64_t r = panels.first[i]; r < panels.first[i + 1]; ++r) {
          for (int64_t c = panels.first[j]; c < panels.first[j + 1]; ++c) {
            take(r, c);
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t products(int64_t T) {
    return T * (T + 1) / 2;
  }
  static constexpr int64_t carried(int64_t T) { // vectors
    return T <= kMaxCarried ? products(T) : kTile * kTile;
  }

  int64_t T_;
  Vec<A>* sums_;
  double* totals_;
  A* packed_;
  int64_t columns_ = 0; // in the sums
};

// The Gram of chunks [first, last), products in A; those in float32 are probed by z.
template <class A>
void gram(
    const Gradients& G,
    const int64_t* bounds,
    int64_t first,
    int64_t last,
    const double* z, // [kNarrowProbes, probe_stride(T)], or null
    double* M,       // [chunks, T, T]
    double* y) {     // [chunks, kNarrowProbes, probe_stride(T)], or null
  constexpr bool kExact = sizeof(A) == 8;
  const int64_t T = G.tasks;
  const bool small = kExact && T <= kMaxDirect;
  const int64_t limit = small ? kDirectColumns : T <= kMaxCarried ? kPackedColumns<A> : kWideColumns;
  // Two sets of row pointers (this block's and the next one's), then the packed block.
  const int64_t pointers = (2 * (2 * T + 1) + 7) / 8 * 8;
  double* scratch = thread_scratch(0, pointers + (small ? 0 : PackedGram<A>::scratch(T, limit)));
  Panels now, next;
  now.rows = reinterpret_cast<const void**>(scratch);
  next.rows = now.rows + T;
  now.index = reinterpret_cast<int32_t*>(next.rows + T);
  next.index = now.index + T;
  now.first = next.index + T;
  next.first = now.first + T + 1;
  PackedGram<A> packed(scratch + pointers, small ? 0 : T);

  BlockCursor cursor(G, bounds, first, last, limit);
  Block block, following;
  if (!cursor.next(block)) {
    return;
  }
  now.collect(block, T);
  for (bool more = true; more; block = following) {
    more = cursor.next(following);
    next.count = 0;
    if (more) {
      next.collect(following, T);
    }
    double* into = M + block.chunk * T * T;
    const bool direct_rows = kExact && now.count <= kMaxDirect;
    const bool last_of_rows = !more || following.chunk != block.chunk || !now.same_rows(next);
    with_type(block.segment->dtype, [&](auto* type) __attribute__((always_inline)) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if (direct_rows) {
        direct(reinterpret_cast<const E* const*>(now.rows), int(now.count), block.length, into, now.index, T);
      } else if constexpr (sizeof(E) <= sizeof(A)) { // float64 never comes here with float32 blocks: see gram_blocks
        packed.template add<E>(
            now, block.length, next, more ? element_size(following.segment->dtype) : 0, last_of_rows);
      }
    });
    if constexpr (!kExact) {
      packed.probe(now, block.length, z, y + block.chunk * kNarrowProbes * probe_stride(T));
    }
    if (!direct_rows && last_of_rows) {
      packed.flush(now, into);
    }
    std::swap(now, next);
  }
}

void gram_exact(const Gradients& G, const int64_t* bounds, int64_t first, int64_t last, double* M) {
  gram<double>(G, bounds, first, last, nullptr, M, nullptr);
}

// For segments of at most 32-bit elements only.
void gram_blocks(
    const Gradients& G,
    const int64_t* bounds,
    int64_t first,
    int64_t last,
    const double* z,
    double* M,
    double* y) {
  gram<float>(G, bounds, first, last, z, M, y);
}

} // namespace
} // namespace fastmtl::cpu
