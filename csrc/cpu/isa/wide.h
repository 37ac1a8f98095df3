// The Gram matrix M = G Gᵀ of many rows: a symmetric product, blocked as matrix products are.
//
// M_ij += Σ_k g_ik g_jk for j >= i: T (T + 1) / 2 multiply-adds a column. gram.h has its vectors along the columns of
// G, so that every tile ends in sums over lanes and in T² / 2 totals; beyond some hundred rows those, and panels that
// fall out of the second-level cache, cost more than the products. Here the vectors run along the rows: a block of
// columns is packed into panels [columns, 2 vectors of rows] in the accumulation type, and a tile of kWideRows rows
// times a panel keeps its sums in registers. Float32 sums go to float64 every kWideFlush columns. The packed block is
// shared by all threads, each of which has tiles of its own: no partial sums, and the same bits for any number of
// threads.
//
// Traffic: G is read once and its packed block written and read, 2 T elements a column; a tile streams 2 panels, of
// which the one stays in the second-level cache; M is read and written once a block, 8 T² bytes for kWideColumns
// columns.
#pragma once

namespace fastmtl::cpu {
namespace {

#if FASTMTL_VECTOR_BYTES == 64
constexpr int kWideRows = 8; // 16 accumulators
#else
constexpr int kWideRows = 4; // 8 accumulators of 16 registers
#endif
constexpr int64_t kWideFlush = 128; // columns
constexpr int64_t kWideGroup = 4;   // panels that two are multiplied with while these stay in the cache

// Rows of a panel.
template <class A>
constexpr int64_t kWidePanel = 2 * kLanes<A>;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTMTL_SHUFFLE 1
#endif
#endif

// Elements of a and b in turn, of their lower halves or of their upper ones.
template <int half, class V, size_t... I>
FASTMTL_INLINE V interleave(V a, V b, std::index_sequence<I...>) {
  constexpr size_t L = sizeof...(I);
#ifdef FASTMTL_SHUFFLE
  return __builtin_shufflevector(a, b, (I % 2 * L + I / 2 + half * (L / 2))...);
#else
  return V{(I % 2 ? b : a)[I / 2 + half * (L / 2)]...};
#endif
}

// v[k][r] <- v[r][k], in log2 L steps of shuffles.
template <class A>
FASTMTL_INLINE void transpose(Vec<A>* v) {
  constexpr int L = int(kLanes<A>);
  using Lanes = std::make_index_sequence<size_t(L)>;
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
    Vec<A> from[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      from[i] = v[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      v[2 * i] = interleave<0>(from[i], from[i + L / 2], Lanes{});
      v[2 * i + 1] = interleave<1>(from[i], from[i + L / 2], Lanes{});
    }
  }
}

// Columns of one segment into a panel, from its column `at` on; missing rows and those beyond the last are zeros.
template <class A, class E>
void pack_segment(
    const E* const* rows, // [kWidePanel] -> [n], or null
    int64_t n,
    A* packed) { // [n, kWidePanel]
  constexpr int64_t L = kLanes<A>;
  for (int64_t half = 0; half < 2; ++half) {
    const E* const* some = rows + half * L;
    A* to = packed + half * L;
    int64_t k = 0;
    for (; k + L <= n; k += L) {
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) {
        __builtin_prefetch(some[r] + k + 8 * L); // too many rows for the hardware to follow
        v[r] = some[r] ? load(some[r] + k, A{}) : Vec<A>{};
      }
      transpose<A>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        write(to + (k + i) * kWidePanel<A>, v[i]);
      }
    }
    for (; k < n; ++k) {
      for (int r = 0; r < L; ++r) {
        E one[L] = {};
        if (some[r]) {
          one[0] = some[r][k];
        }
        to[k * kWidePanel<A> + r] = load(one, A{})[0];
      }
    }
  }
}

// Columns [begin, end) of panel `panel` of the rows.
template <class A>
void pack_panel(const Gradients& G, int64_t begin, int64_t end, int64_t panel, A* packed) {
  int64_t offset = 0; // of a segment
  for (int64_t s = 0; s < G.count && offset < end; offset += G.segments[s++].length) {
    const Segment& segment = G.segments[s];
    const int64_t from = begin > offset ? begin - offset : 0;
    const int64_t to = end - offset < segment.length ? end - offset : segment.length;
    if (from >= to) {
      continue;
    }
    with_type(segment.dtype, [&](auto* type) __attribute__((always_inline)) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (sizeof(E) <= sizeof(A)) {
        const E* rows[kWidePanel<A>];
        for (int64_t r = 0; r < kWidePanel<A>; ++r) {
          const int64_t t = panel * kWidePanel<A> + r;
          const void* row = t < G.tasks ? segment.rows[t] : nullptr;
          rows[r] = row ? static_cast<const E*>(row) + from : nullptr;
        }
        pack_segment<A, E>(rows, to - from, packed + (offset + from - begin) * kWidePanel<A>);
      }
    });
  }
}

FASTMTL_INLINE void add_lanes(Vd v, double* to) {
  write(to, read<Vd>(to) + v);
}
FASTMTL_INLINE void add_lanes(Vf v, double* to) {
#if FASTMTL_VECTOR_BYTES == 64
  add_lanes(widen((HalfVf)_mm512_castps512_ps256((__m512)v)), to);
  add_lanes(widen((HalfVf)_mm512_extractf32x8_ps((__m512)v, 1)), to + kWidth);
#else
  for (int64_t l = 0; l < kWidth32; ++l) {
    to[l] += double(v[l]);
  }
#endif
}

// totals [kWideRows, kWidePanel] += the products of kWideRows rows of panel a with panel b.
template <class A, size_t... R>
FASTMTL_INLINE void wide_tile(const A* a, const A* b, int64_t n, double* totals, std::index_sequence<R...>) {
  constexpr int64_t L = kLanes<A>, W = kWidePanel<A>;
  Vec<A> s0[sizeof...(R)], s1[sizeof...(R)]; // loops over them would leave them in memory
  ((s0[R] = s1[R] = Vec<A>{}), ...);
  for (int64_t k = 0; k < n; ++k, a += W, b += W) {
    const Vec<A> y0 = read<Vec<A>>(b), y1 = read<Vec<A>>(b + L);
    ((s0[R] += a[R] * y0, s1[R] += a[R] * y1), ...);
  }
  ((add_lanes(s0[R], totals + R * W), add_lanes(s1[R], totals + R * W + L)), ...);
}

// Adds the products of units [first, last) to M, upper triangle; unit j (j + 1) + i is panel i <= 2 j + 1 with panels 2
// j and 2 j + 1: what is read of it serves both.
template <class A>
void wide_products(const A* packed, int64_t n, int64_t T, int64_t first, int64_t last, double* M) {
  constexpr int64_t W = kWidePanel<A>;
  const int64_t panels = (T + W - 1) / W;
  alignas(64) double totals[kWideGroup * W * 2 * W];
  int64_t j = 0;
  while ((j + 1) * (j + 2) <= first) {
    ++j;
  }
  for (int64_t i = first - j * (j + 1), unit = first; unit < last;) {
    int64_t group = 2 * j + 2 - i < last - unit ? 2 * j + 2 - i : last - unit;
    group = group < kWideGroup ? group : kWideGroup;
    const int64_t wide = panels - 2 * j < 2 ? 1 : 2, high = panels - i < group ? panels - i : group;
    __builtin_memset(totals, 0, sizeof(totals));
    for (int64_t k = 0; k < n;
         k += kWideFlush) { // a panel of the group stays in the first-level cache, these two nearly
      const int64_t some = n - k < kWideFlush ? n - k : kWideFlush;
      for (int64_t g = 0; g < high; ++g) {
        for (int64_t c = i + g > 2 * j ? 1 : 0; c < wide; ++c) {
          for (int64_t r = 0; r < W; r += kWideRows) {
            wide_tile<A>(
                packed + ((i + g) * n + k) * W + r,
                packed + ((2 * j + c) * n + k) * W,
                some,
                totals + ((g * 2 + c) * W + r) * W,
                std::make_index_sequence<size_t(kWideRows)>{});
          }
        }
      }
    }
    for (int64_t g = 0; g < high; ++g) {
      for (int64_t c = 0; c < wide; ++c) {
        const int64_t row = (i + g) * W, column = (2 * j + c) * W;
        const int64_t rows = T - row < W ? T - row : W, columns = T - column < W ? T - column : W;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t l = 0; l < columns; ++l) {
            M[(row + r) * T + column + l] += totals[((g * 2 + c) * W + r) * W + l];
          }
        }
      }
    }
    unit += group;
    i += group;
    if (i > 2 * j + 1) {
      i = 0;
      ++j;
    }
  }
}

int64_t wide_panel(bool exact) {
  return exact ? kWidePanel<double> : kWidePanel<float>;
}

void wide_pack(const Gradients& G, int64_t begin, int64_t end, int64_t panel, bool exact, void* packed) {
  const int64_t n = end - begin;
  if (exact) {
    pack_panel(G, begin, end, panel, static_cast<double*>(packed) + panel * n * kWidePanel<double>);
  } else {
    pack_panel(G, begin, end, panel, static_cast<float*>(packed) + panel * n * kWidePanel<float>);
  }
}

void wide_gram(const void* packed, int64_t n, int64_t T, bool exact, int64_t first, int64_t last, double* M) {
  if (exact) {
    wide_products(static_cast<const double*>(packed), n, T, first, last, M);
  } else {
    wide_products(static_cast<const float*>(packed), n, T, first, last, M);
  }
}

// Vectors of a packed row of a float32 panel, widened.
constexpr int kWideVectors = int(kWidePanel<float> / kWidth);

template <size_t... V>
FASTMTL_INLINE Vd wide_product(const float* a, const double* z, Vd sum, std::index_sequence<V...>) {
  ((sum += load(a + V * kWidth, double{}) * read<Vd>(z + V * kWidth)), ...);
  return sum;
}

void wide_project(
    const float* packed, // [panels, columns, kWidePanel]
    int64_t columns,
    int64_t T,
    const double* z, // [kWideProbes, probe_stride(T)]
    int64_t first,
    int64_t last,
    double* u) {                                           // [kWideProbes, columns]
  constexpr int64_t W = kWidePanel<float>, kTogether = 32; // columns whose sums stay in the first-level cache
  const int64_t panels = (T + W - 1) / W, stride = probe_stride(T);
  for (int64_t k = first; k < last; k += kTogether) {
    const int64_t n = last - k < kTogether ? last - k : kTogether;
    Vd sums[kTogether * kWideProbes];
    for (int64_t j = 0; j < panels; ++j) {
      const float* a = packed + (j * columns + k) * W;
      for (int64_t i = 0; i < n; ++i, a += W) {
        for (int64_t p = 0; p < kWideProbes; ++p) {
          Vd& sum = sums[i * kWideProbes + p];
          sum = wide_product(
              a, z + p * stride + j * W, j == 0 ? Vd{} : sum, std::make_index_sequence<size_t(kWideVectors)>{});
        }
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t p = 0; p < kWideProbes; ++p) {
        u[p * columns + k + i] = sum(sums[i * kWideProbes + p]);
      }
    }
  }
}

template <size_t... V>
FASTMTL_INLINE void wide_panel_back(const float* a, int64_t n, const double* u, double* y, std::index_sequence<V...>) {
  Vd sums[sizeof...(V)]; // a loop over them would leave them in memory
  ((sums[V] = Vd{}), ...);
  for (int64_t k = 0; k < n; ++k, a += kWidePanel<float>) {
    const Vd along = splat(u[k]);
    ((sums[V] += load(a + V * kWidth, double{}) * along), ...);
  }
  (write(y + V * kWidth, read<Vd>(y + V * kWidth) + sums[V]), ...);
}

void wide_reflect(
    const float* packed, // [panels, columns, kWidePanel]
    int64_t columns,
    int64_t T,
    const double* u, // [kWideProbes, columns]
    int64_t first,
    int64_t last,
    double* y) { // [kWideProbes, probe_stride(T)]
  constexpr int64_t W = kWidePanel<float>;
  for (int64_t j = first; j < last; ++j) {
    for (int64_t p = 0; p < kWideProbes; ++p) {
      wide_panel_back(
          packed + j * columns * W,
          columns,
          u + p * columns,
          y + p * probe_stride(T) + j * W,
          std::make_index_sequence<size_t(kWideVectors)>{});
    }
  }
}

} // namespace
} // namespace fastmtl::cpu
