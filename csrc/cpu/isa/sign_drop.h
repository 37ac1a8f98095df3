// GradDrop (Chen et al., NeurIPS 2020, Algorithm 1) of ragged rows: in every column only the entries of one sign are
// summed, the others at most in part.
//
//     p = Σ_t max(g_t, 0)        q = Σ_t min(g_t, 0)        u: 32 random bits, the column's own
//     positive where u (-q) < (2^32 - u) p, that is with probability p / (p - q)
//     out = p + Σ_t leak_t min(g_t, 0)    or    q + Σ_t leak_t max(g_t, 0)
//
// With the integer u on both sides no product of two numbers that are not zero underflows: where all signs agree there
// is no other choice. Column n draws word n % 4 of Philox4x32-10 with the seed as key and n / 4 as counter, whatever
// the thread, vector or tensor that it is in.
//
// Reads T P sizeof(element) bytes and writes P sizeof(element): one pass at the speed of memory. As in combine.h a
// stretch of columns is summed a few rows at a time, in order and in float64, into sums that stay in the first-level
// cache; then the signs are drawn.
#pragma once

namespace fastmtl::cpu {
namespace {

typedef uint64_t Vl __attribute__((vector_size(kWidth * 8)));

constexpr int64_t kDropStretch = 512; // columns

// The low halves of a times m, of every lane.
FASTMTL_INLINE Vl product32(Vl a, uint32_t m) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vl)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif FASTMTL_VECTOR_BYTES == 32
  return (Vl)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * uint64_t(m);
#endif
}

// The upper halves of all lanes in the lower ones, and anything above: a shuffle, which leaves the multiplier's port
// free.
FASTMTL_INLINE Vl upper_half(Vl a) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vl)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_CDAB);
#elif FASTMTL_VECTOR_BYTES == 32
  return (Vl)_mm256_shuffle_epi32((__m256i)a, 0xb1);
#else
  return a >> 32;
#endif
}

// max(g, 0) and min(g, 0), which is where NaN goes.
FASTMTL_INLINE Vd above_zero(Vd g) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vd)_mm512_max_pd((__m512d)g, _mm512_setzero_pd());
#elif FASTMTL_VECTOR_BYTES == 32
  return (Vd)_mm256_max_pd((__m256d)g, _mm256_setzero_pd());
#else
  return g > 0.0 ? g : Vd{};
#endif
}
FASTMTL_INLINE Vd below_zero(Vd g) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vd)_mm512_min_pd(_mm512_setzero_pd(), (__m512d)g);
#elif FASTMTL_VECTOR_BYTES == 32
  return (Vd)_mm256_min_pd(_mm256_setzero_pd(), (__m256d)g);
#else
  return g > 0.0 ? Vd{} : g;
#endif
}

// a[0], b[0], a[1], b[1], ...
FASTMTL_INLINE void write_in_turn(uint64_t* out, Vl a, Vl b) {
#if FASTMTL_VECTOR_BYTES == 64
  const __m512i low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), high = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64((__m512i)a, low, (__m512i)b));
  _mm512_storeu_si512(out + 8, _mm512_permutex2var_epi64((__m512i)a, high, (__m512i)b));
#elif FASTMTL_VECTOR_BYTES == 32
  const __m256i even = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i*)(out + 4), _mm256_permute2x128_si256(even, odd, 0x31));
#else
  for (int64_t l = 0; l < kWidth; ++l) {
    out[2 * l] = a[l];
    out[2 * l + 1] = b[l];
  }
#endif
}

// kWidth words as doubles.
FASTMTL_INLINE Vd widen_words(const uint32_t* p) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vd)_mm512_cvtepu32_pd((__m256i)read<HalfVu>(p));
#else
#if FASTMTL_VECTOR_BYTES == 32
  const Vl wide = (Vl)_mm256_cvtepu32_epi64((__m128i)read<HalfVu>(p));
#else
  const Vl wide = __builtin_convertvector(read<HalfVu>(p), Vl);
#endif
  return (Vd)(wide | 0x4330000000000000u) - 0x1p52; // the bits of 2^52 + word
#endif
}

// `philox` (csrc/math/philox.h) of `count` counters from `counter` on, one in every lane, the upper halves of which
// hold anything on the way. `words` has room for whole vectors of counters.
void random_words(uint64_t seed, uint64_t counter, int64_t count, uint32_t* words) { // words [count, 4]
  Vl lanes{};
  for (int64_t l = 0; l < kWidth; ++l) {
    lanes[l] = uint64_t(l);
  }
  for (int64_t c = 0; c < count; c += kWidth) {
    const Vl n = lanes + (counter + uint64_t(c));
    Vl x0 = n, x1 = n >> 32, x2{}, x3{};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Vl a = product32(x0, 0xD2511F53u), b = product32(x2, 0xCD9E8D57u);
      x0 = upper_half(b) ^ x1 ^ uint64_t(k0);
      x2 = upper_half(a) ^ x3 ^ uint64_t(k1);
      x1 = b;
      x3 = a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint64_t* out = reinterpret_cast<uint64_t*>(words + 4 * c); // little-endian
    write_in_turn(out, (x0 & 0xffffffffu) | (x1 << 32), (x2 & 0xffffffffu) | (x3 << 32));
  }
}

// The sums of a stretch, in whole vectors.
struct SignSums {
  alignas(64) double positive[kDropStretch + kWidth];
  alignas(64) double negative[kDropStretch + kWidth];
  alignas(64) double leaked_positive[kDropStretch + kWidth]; // each entry times its task's leak
  alignas(64) double leaked_negative[kDropStretch + kWidth];
};

// Adds R rows to the sums, or starts them.
template <class E, int R, bool kLeak, bool is_first>
void add_signs(const E* const* rows, const double* leak, int64_t n, SignSums& sums) { // rows [R] -> [n], leak [R]
  const auto step = [&](const E* const* at, int64_t from, int64_t k) __attribute__((always_inline)) {
    Vd p = is_first ? Vd{} : read<Vd>(sums.positive + k), q = is_first ? Vd{} : read<Vd>(sums.negative + k);
    Vd leaked_p{}, leaked_q{};
    if constexpr (kLeak && !is_first) {
      leaked_p = read<Vd>(sums.leaked_positive + k);
      leaked_q = read<Vd>(sums.leaked_negative + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vd g = load(at[r] + from, double{});
      const Vd above = above_zero(g), below = below_zero(g);
      p += above;
      q += below;
      if constexpr (kLeak) {
        leaked_p += leak[r] * above;
        leaked_q += leak[r] * below;
      }
    }
    write(sums.positive + k, p);
    write(sums.negative + k, q);
    if constexpr (kLeak) {
      write(sums.leaked_positive + k, leaked_p);
      write(sums.leaked_negative + k, leaked_q);
    }
  };
  int64_t k = 0;
  for (; k + kWidth <= n; k += kWidth) {
    step(rows, k, k);
  }
  if (k < n) { // the rest, through a buffer of zeros
    E tail[R][kWidth];
    const E* at[R];
    __builtin_memset(tail, 0, sizeof(tail));
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(tail[r], rows[r] + k, size_t(n - k) * sizeof(E));
      at[r] = tail[r];
    }
    step(at, 0, k);
  }
}

template <class E, bool kLeak, bool is_first>
void add_signs(int64_t R, const E* const* rows, const double* leak, int64_t n, SignSums& sums) {
  switch (R) {
    case 1:
      return add_signs<E, 1, kLeak, is_first>(rows, leak, n, sums);
    case 2:
      return add_signs<E, 2, kLeak, is_first>(rows, leak, n, sums);
    case 3:
      return add_signs<E, 3, kLeak, is_first>(rows, leak, n, sums);
    case 4:
      return add_signs<E, 4, kLeak, is_first>(rows, leak, n, sums);
    default:
      return add_signs<E, 5, kLeak, is_first>(rows, leak, n, sums);
  }
}

// The chosen sums, rounded. What is not finite stays so, whichever sign is drawn.
template <class E, bool kLeak>
void choose_signs(const SignSums& sums, const uint32_t* words, int64_t n, E* out, bool past_cache) { // words, out [n]
  const auto chosen = [&](const uint32_t* word, int64_t k) __attribute__((always_inline)) {
    const Vd u = widen_words(word), p = read<Vd>(sums.positive + k), q = read<Vd>(sums.negative + k);
    Vd up = p + 0.0 * q, down = q + 0.0 * p;
    if constexpr (kLeak) {
      up += read<Vd>(sums.leaked_negative + k);
      down += read<Vd>(sums.leaked_positive + k);
    }
    return u * -q < (0x1p32 - u) * p ? up : down;
  };
  int64_t k = 0;
  for (; k + 2 * kWidth <= n; k += 2 * kWidth) {
    const Vd a = chosen(words + k, k), b = chosen(words + k + kWidth, k + kWidth);
    if (std::is_same_v<E, float> && past_cache) {
      stream(reinterpret_cast<float*>(out + k), a, b);
    } else {
      store(out + k, a);
      store(out + k + kWidth, b);
    }
  }
  for (; k < n; k += kWidth) {
    const int64_t left = n - k < kWidth ? n - k : kWidth;
    uint32_t word[kWidth] = {};
    E result[kWidth];
    __builtin_memcpy(word, words + k, size_t(left) * sizeof(uint32_t));
    store(result, chosen(word, k));
    __builtin_memcpy(out + k, result, size_t(left) * sizeof(E));
  }
}

template <class E, bool kLeak>
void drop_block(
    const Block& block,
    int64_t T,
    const double* leak, // [T], or null where nothing leaks
    const uint32_t* words,
    SignSums& sums,
    bool past_cache) {
  const E* rows[kGroup];
  double leaks[kGroup];
  int64_t R = 0;
  bool first = true;
  const auto flush = [&] {
    first ? add_signs<E, kLeak, true>(R, rows, leaks, block.length, sums)
          : add_signs<E, kLeak, false>(R, rows, leaks, block.length, sums);
    first = false;
    R = 0;
  };
  for (int64_t t = 0; t < T; ++t) {
    if (const E* at = row<E>(block, t)) {
      rows[R] = at;
      leaks[R] = kLeak ? leak[t] : 0.0;
      if (++R == kGroup) {
        flush();
      }
    }
  }
  if (R > 0) {
    flush();
  }
  E* out = static_cast<E*>(block.segment->out) + block.begin;
  if (first) { // no task has a gradient here
    __builtin_memset(out, 0, size_t(block.length) * sizeof(E));
    return;
  }
  // Streaming stores need whole vectors of floats at aligned places.
  past_cache = past_cache && reinterpret_cast<uintptr_t>(out) % FASTMTL_VECTOR_BYTES == 0;
  choose_signs<E, kLeak>(sums, words, block.length, out, past_cache);
}

void sign_drop(
    const Gradients& G,
    uint64_t seed,
    int64_t first,
    const double* leak,
    int64_t begin,
    int64_t end,
    bool stream) {
  alignas(64) uint32_t words[kDropStretch + 4 * kWidth + 4];
  SignSums sums;
  const int64_t bounds[2] = {begin, end};
  BlockCursor cursor(G, bounds, 0, 1, kDropStretch);
  Block block;
  uint64_t n = uint64_t(first + begin);
  while (cursor.next(block)) {
    const int64_t skipped = int64_t(n % 4);
    random_words(seed, n / 4, (skipped + block.length + 3) / 4, words);
    with_type(block.segment->dtype, [&](auto* type) __attribute__((always_inline)) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      leak ? drop_block<E, true>(block, G.tasks, leak, words + skipped, sums, stream)
           : drop_block<E, false>(block, G.tasks, leak, words + skipped, sums, stream);
    });
    n += uint64_t(block.length);
  }
  if (stream) {
    stream_fence();
  }
}

} // namespace
} // namespace fastmtl::cpu
