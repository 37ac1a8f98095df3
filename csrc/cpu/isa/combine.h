// The recombination out = αᵀ G of ragged rows, in float64.
//
// Reads T P sizeof(element) bytes and writes P sizeof(element): one pass at the speed of memory. More than about eight
// concurrent streams slow the memory down, so a stretch of kStretch columns is summed kGroup rows at a time into
// float64 sums that stay in the first-level cache; up to kGroup rows need no such buffer. Each element's sum runs over
// the rows in order, so the result does not depend on where threads split the columns.
#pragma once

namespace fastmtl::cpu {
namespace {

constexpr int64_t kStretch = 1024; // columns
constexpr int kGroup = 5;          // rows read at once

// Adds R rows to `sums`; the first group starts from zero, the last writes the result instead.
template <class E, int R, bool is_first, bool is_last>
void combine_group(
    const E* const* rows, // [R] -> [n]
    const double* alpha,  // [R]
    int64_t n,
    double* sums, // [n rounded up to two vectors]
    E* out,       // [n]
    bool past_cache,
    int64_t ahead) { // bytes to the stretch that is read after this one
  Vd weight[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    weight[r] = splat(alpha[r]);
  }
  const auto step = [&](const E* const* at, int64_t from, int64_t k) __attribute__((always_inline)) {
    Pair total = is_first ? Pair{} : Pair{read<Vd>(sums + k), read<Vd>(sums + k + kWidth)};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Pair g = load_pair(at[r] + from);
      total.a += weight[r] * g.a;
      total.b += weight[r] * g.b;
    }
    if constexpr (!is_last) {
      write(sums + k, total.a);
      write(sums + k + kWidth, total.b);
    }
    return total;
  };
  int64_t k = 0;
  for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if constexpr (2 * kWidth * sizeof(E) > 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows[r] + k) + ahead + 64, 0, 3);
      }
      __builtin_prefetch(reinterpret_cast<const char*>(rows[r] + k) + ahead, 0, 3);
    }
    const Pair total = step(rows, k, k);
    if constexpr (is_last) {
      if (std::is_same_v<E, float> && past_cache) {
        stream(reinterpret_cast<float*>(out + k), total.a, total.b);
      } else {
        store_pair(out + k, total);
      }
    }
  }
  if (k < n) { // the rest, through a buffer of zeros
    const size_t left = size_t(n - k) * sizeof(E);
    E tail[R][2 * kWidth];
    const E* at[R];
    __builtin_memset(tail, 0, sizeof(tail));
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(tail[r], rows[r] + k, left);
      at[r] = tail[r];
    }
    const Pair total = step(at, 0, k);
    if constexpr (is_last) {
      E result[2 * kWidth];
      store_pair(result, total);
      __builtin_memcpy(out + k, result, left);
    }
  }
}

template <class E, bool is_first, bool is_last>
void combine_rows(
    int R,
    const E* const* rows,
    const double* alpha,
    int64_t n,
    double* sums,
    E* out,
    bool past_cache,
    int64_t ahead) {
  switch (R) {
    case 1:
      return combine_group<E, 1, is_first, is_last>(rows, alpha, n, sums, out, past_cache, ahead);
    case 2:
      return combine_group<E, 2, is_first, is_last>(rows, alpha, n, sums, out, past_cache, ahead);
    case 3:
      return combine_group<E, 3, is_first, is_last>(rows, alpha, n, sums, out, past_cache, ahead);
    case 4:
      return combine_group<E, 4, is_first, is_last>(rows, alpha, n, sums, out, past_cache, ahead);
    case 5:
      return combine_group<E, 5, is_first, is_last>(rows, alpha, n, sums, out, past_cache, ahead);
    default:
      return;
  }
}

// One stretch of one segment: `count` rows present, n <= kStretch columns.
template <class E>
void combine_stretch(
    const E** rows,
    const double* alpha,
    int64_t count,
    int64_t n,
    E* out,
    bool past_cache,
    int64_t ahead) {
  alignas(64) double sums[kStretch + 2 * kWidth];
  const int64_t groups = (count + kGroup - 1) / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t r0 = count * g / groups;
    const int R = int(count * (g + 1) / groups - r0);
    if (groups == 1) {
      combine_rows<E, true, true>(R, rows + r0, alpha + r0, n, sums, out, past_cache, ahead);
    } else if (g == 0) {
      combine_rows<E, true, false>(R, rows + r0, alpha + r0, n, sums, out, past_cache, ahead);
    } else if (g < groups - 1) {
      combine_rows<E, false, false>(R, rows + r0, alpha + r0, n, sums, out, past_cache, ahead);
    } else {
      combine_rows<E, false, true>(R, rows + r0, alpha + r0, n, sums, out, past_cache, ahead);
    }
  }
}

template <class E>
void combine_segment(
    const Segment& segment,
    int64_t T,
    const double* alpha,
    double empty,
    int64_t begin,
    int64_t end,
    bool past_cache) {
  double* scratch = thread_scratch(1, 2 * T);
  const E** rows = reinterpret_cast<const E**>(scratch);
  double* weights = scratch + T;
  int64_t count = 0;
  for (int64_t t = 0; t < T; ++t) {
    if (segment.rows[t]) {
      weights[count] = alpha[t];
      rows[count++] = static_cast<const E*>(segment.rows[t]);
    }
  }
  E* out = static_cast<E*>(segment.out);
  // Streaming stores need whole vectors of floats at aligned places.
  past_cache = past_cache && reinterpret_cast<uintptr_t>(out + begin) % FASTMTL_VECTOR_BYTES == 0;
  if (count == 0 || (count < T && empty != 0.0)) { // a missing gradient is zero, times a non-finite α
    for (int64_t k = begin; k < end; ++k) {
      E result[kWidth];
      store(result, splat(empty));
      out[k] = result[0];
    }
    return;
  }
  // Rows are advanced in place, from the last stretch back to the first.
  const int64_t stretches = (end - begin + kStretch - 1) / kStretch;
  for (int64_t t = 0; t < count; ++t) {
    rows[t] += begin + (stretches - 1) * kStretch;
  }
  for (int64_t s = stretches - 1; s >= 0; --s) {
    const int64_t at = begin + s * kStretch, n = end - at < kStretch ? end - at : kStretch;
    combine_stretch<E>(rows, weights, count, n, out + at, past_cache, -kStretch * int64_t(sizeof(E)));
    for (int64_t t = 0; t < count; ++t) {
      rows[t] -= kStretch;
    }
  }
}

void combine(const Gradients& G, const double* alpha, int64_t begin, int64_t end, bool stream) {
  double empty = 0.0; // what a missing gradient adds: zero, or NaN with a non-finite α
  for (int64_t t = 0; t < G.tasks; ++t) {
    empty += 0.0 * alpha[t];
  }
  int64_t total = 0;
  for (int64_t k = 0; k < G.count; ++k) {
    total += G.segments[k].length;
  }
  for (int64_t k = G.count - 1; k >= 0; --k) {
    const Segment& segment = G.segments[k];
    total -= segment.length; // where this segment starts
    const int64_t b = begin > total ? begin - total : 0;
    const int64_t e = end - total < segment.length ? end - total : segment.length;
    if (b < e) {
      with_type(segment.dtype, [&](auto* type) __attribute__((always_inline)) {
        using E = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        combine_segment<E>(segment, G.tasks, alpha, empty, b, e, stream);
      });
    }
  }
  if (stream) {
    stream_fence();
  }
}

} // namespace
} // namespace fastmtl::cpu
