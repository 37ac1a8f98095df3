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
#pragma once

namespace fastmtl::cpu {
namespace {

#if FASTMTL_VECTOR_BYTES == 64
constexpr int kTile = 5; // 25 accumulators, 5 + 1 operands of 32 registers
#else
constexpr int kTile = 3; // 9 accumulators, 3 + 1 operands of 16 registers
#endif
constexpr int kMaxDirect = kTile + 1; // rows whose triangle of products fits the registers
constexpr int64_t kDirectColumns = 4096; // of one block read in place
constexpr int64_t kPackedBytes = 512; // columns x sizeof(accumulator) / 8 of one packed block: two panels in L1
constexpr int64_t kLine = 64; // bytes in a cache line

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

// Source rows whose next block is fetched while a tile works on this one.
struct Prefetch {
  static constexpr int kMax = 8;
  const char* rows[kMax];
  int count = 0;
};

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

// One tile: products of panel a (R rows) with panel b (C rows) over n columns; of a panel with itself, the triangle.
template <class A, int R, int C, bool diagonal>
void tile(
    const A* a, // [n / lanes, R, lanes]
    const A* b, // [n / lanes, C, lanes]
    int64_t n,
    double* M, // [T, T]
    const int32_t* index_a, // [R] -> row of M
    const int32_t* index_b, // [C] -> column of M
    int64_t T,
    const Prefetch& prefetch,
    int64_t prefetch_step) { // bytes of a source row for one vector of columns
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  V sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      sums[r][c] = V{};
    }
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
      const V y = diagonal ? x[c] : read<V>(b + c * L);
#pragma GCC unroll 8
      for (int r = 0; r < (diagonal ? c + 1 : R); ++r) {
        sums[r][c] += x[r] * y;
      }
    }
    if ((fetched & (kLine - 1)) == 0) { // vectors of a line are powers of two, so every line is met once
      for (int i = 0; i < prefetch.count; ++i) {
        __builtin_prefetch(prefetch.rows[i] + fetched, 0, 2);
      }
    }
    fetched += prefetch_step;
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < (diagonal ? c + 1 : R); ++r) {
      M[index_a[r] * T + index_b[c]] += sum(sums[r][c]);
    }
  }
}

template <class A>
using TileFn =
    void (*)(const A*, const A*, int64_t, double*, const int32_t*, const int32_t*, int64_t, const Prefetch&, int64_t);

template <class A, int R>
TileFn<A> tile_of_rows(int C, bool diagonal) {
  switch (C) {
    case 1:
      return diagonal ? tile<A, R, R, true> : tile<A, R, 1, false>;
    case 2:
      return diagonal ? tile<A, R, R, true> : tile<A, R, 2, false>;
    case 3:
      return diagonal ? tile<A, R, R, true> : tile<A, R, 3, false>;
#if FASTMTL_VECTOR_BYTES == 64
    case 4:
      return diagonal ? tile<A, R, R, true> : tile<A, R, 4, false>;
    case 5:
      return diagonal ? tile<A, R, R, true> : tile<A, R, 5, false>;
#endif
    default:
      return nullptr;
  }
}

template <class A>
TileFn<A> tile_for(int R, int C, bool diagonal) {
  switch (R) {
    case 1:
      return tile_of_rows<A, 1>(C, diagonal);
    case 2:
      return tile_of_rows<A, 2>(C, diagonal);
    case 3:
      return tile_of_rows<A, 3>(C, diagonal);
#if FASTMTL_VECTOR_BYTES == 64
    case 4:
      return tile_of_rows<A, 4>(C, diagonal);
    case 5:
      return tile_of_rows<A, 5>(C, diagonal);
#endif
    default:
      return nullptr;
  }
}

// One source row into its place in a panel of R rows, zero-padded to a whole number of vectors.
template <class A, class E>
void pack_row(const E* source, int64_t n, A* panel, int64_t R) {
  constexpr int64_t L = kLanes<A>;
  int64_t k = 0;
  for (; k + L <= n; k += L, panel += R * L) {
    write(panel, load(source + k, A{}));
  }
  if (k < n) {
    E tail[L];
    __builtin_memset(tail, 0, sizeof(tail));
    __builtin_memcpy(tail, source + k, size_t(n - k) * sizeof(E));
    write(panel, load(tail, A{}));
  }
}

// The rows present in a block, dealt to panels of even height.
struct Panels {
  const char** rows; // [count] -> first element of the block
  int32_t* index; // [count] -> row of M
  int64_t count = 0;

  void collect(const Block& block, int64_t T) {
    count = 0;
    const int64_t offset = block.begin * element_size(block.segment->dtype);
    for (int64_t t = 0; t < T; ++t) {
      if (const void* p = block.segment->rows[t]) {
        rows[count] = static_cast<const char*>(p) + offset;
        index[count++] = int32_t(t);
      }
    }
  }
  int64_t panels() const {
    return (count + kTile - 1) / kTile;
  }
  int64_t first(int64_t panel) const { // first row of a panel
    return count * panel / panels();
  }
};

template <class A>
void multiply_packed(
    const Panels& panels,
    const A* packed,
    int64_t padded,
    double* M,
    int64_t T,
    const Panels& next, // rows to prefetch meanwhile (those of the next block), none at the end
    int64_t next_element) {
  const int64_t count = panels.panels(), tiles = count * (count + 1) / 2;
  int64_t done = 0;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t c0 = panels.first(j), C = panels.first(j + 1) - c0;
    for (int64_t i = 0; i <= j; ++i, ++done) {
      const int64_t r0 = panels.first(i), R = panels.first(i + 1) - r0;
      Prefetch prefetch;
      for (int64_t r = next.count * done / tiles; r < next.count * (done + 1) / tiles && prefetch.count < Prefetch::kMax;
           ++r) {
        prefetch.rows[prefetch.count++] = next.rows[r];
      }
      tile_for<A>(int(R), int(C), i == j)(
          packed + r0 * padded,
          packed + c0 * padded,
          padded,
          M,
          panels.index + r0,
          panels.index + c0,
          T,
          prefetch,
          next_element * kLanes<A>);
    }
  }
}

// The Gram of chunks [first, last), products in A.
template <class A>
void gram(const Gradients& G, const int64_t* bounds, int64_t first, int64_t last, double* M) {
  const int64_t T = G.tasks;
  constexpr int64_t kColumns = kPackedBytes * 8 / int64_t(sizeof(A));
  const bool small = T <= kMaxDirect;
  const int64_t limit = small ? kDirectColumns : kColumns;
  // Two sets of row pointers (this block's and the next one's), then the packed block.
  const int64_t pointers = (2 * (T + (T + 1) / 2) + 7) / 8 * 8;
  double* scratch = thread_scratch(0, pointers + (small ? 0 : (T * kColumns * int64_t(sizeof(A)) + 7) / 8));
  Panels now, next;
  now.rows = reinterpret_cast<const char**>(scratch);
  next.rows = now.rows + T;
  now.index = reinterpret_cast<int32_t*>(next.rows + T);
  next.index = now.index + T;
  A* packed = reinterpret_cast<A*>(scratch + pointers);

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
    with_type(block.segment->dtype, [&](auto* type) __attribute__((always_inline)) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if (now.count <= kMaxDirect) {
        direct(reinterpret_cast<const E* const*>(now.rows), int(now.count), block.length, into, now.index, T);
        return;
      }
      if constexpr (sizeof(E) <= sizeof(A)) { // float64 never comes here with float32 blocks: see gram_blocks
        const int64_t padded = (block.length + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
        for (int64_t p = 0; p < now.panels(); ++p) {
          const int64_t r0 = now.first(p), R = now.first(p + 1) - r0;
          for (int64_t r = 0; r < R; ++r) {
            pack_row<A, E>(
                reinterpret_cast<const E*>(now.rows[r0 + r]),
                block.length,
                packed + r0 * padded + r * kLanes<A>,
                R);
          }
        }
        const int64_t next_element = more ? element_size(following.segment->dtype) : 0;
        multiply_packed<A>(now, packed, padded, into, T, next, next_element);
      }
    });
    std::swap(now, next);
  }
}

void gram_exact(const Gradients& G, const int64_t* bounds, int64_t first, int64_t last, double* M) {
  gram<double>(G, bounds, first, last, M);
}

// For segments of at most 32-bit elements only.
void gram_blocks(const Gradients& G, const int64_t* bounds, int64_t first, int64_t last, double* M) {
  gram<float>(G, bounds, first, last, M);
}

} // namespace
} // namespace fastmtl::cpu
