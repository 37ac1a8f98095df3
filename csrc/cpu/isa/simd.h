// Vectors of one instruction set. Included once by each the other files of this folder after it has defined FASTMTL_ISA
// (a namespace) and FASTMTL_VECTOR_BYTES, inside the region compiled for that set; everything has internal linkage, so
// that no inline function compiled for a newer machine can be picked by the linker for an older one.
#pragma once

#define FASTMTL_INLINE inline __attribute__((always_inline))

namespace fastmtl::cpu {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int64_t kWidth = FASTMTL_VECTOR_BYTES / 8;   // doubles in a vector
constexpr int64_t kWidth32 = FASTMTL_VECTOR_BYTES / 4; // floats in a vector

typedef double Vd __attribute__((vector_size(kWidth * 8)));
typedef int64_t Vi __attribute__((vector_size(kWidth * 8)));
typedef float Vf __attribute__((vector_size(kWidth32 * 4)));
typedef uint32_t Vu __attribute__((vector_size(kWidth32 * 4)));
typedef uint16_t Vh __attribute__((vector_size(kWidth32 * 2)));
// The float32, and 16-bit, neighbours of a vector of doubles.
typedef float HalfVf __attribute__((vector_size(kWidth * 4)));
typedef uint32_t HalfVu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfVh __attribute__((vector_size(kWidth * 2)));

template <class V>
FASTMTL_INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
FASTMTL_INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

FASTMTL_INLINE Vd splat(double x) {
  return x - Vd{};
}

// __builtin_convertvector, which GCC splits into halves at full width.
FASTMTL_INLINE Vd widen(HalfVf f) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vd)_mm512_cvtps_pd((__m256)f);
#elif FASTMTL_VECTOR_BYTES == 32
  return (Vd)_mm256_cvtps_pd((__m128)f);
#else
  return __builtin_convertvector(f, Vd);
#endif
}
FASTMTL_INLINE HalfVf narrow(Vd v) {
#if FASTMTL_VECTOR_BYTES == 64
  return (HalfVf)_mm512_cvtpd_ps((__m512d)v);
#elif FASTMTL_VECTOR_BYTES == 32
  return (HalfVf)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, HalfVf);
#endif
}
FASTMTL_INLINE HalfVu widen(HalfVh h) {
#if FASTMTL_VECTOR_BYTES == 64
  return (HalfVu)_mm256_cvtepu16_epi32((__m128i)h);
#elif FASTMTL_VECTOR_BYTES == 32
  return (HalfVu)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)&h));
#else
  return __builtin_convertvector(h, HalfVu);
#endif
}
FASTMTL_INLINE Vu widen(Vh h) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif FASTMTL_VECTOR_BYTES == 32
  return (Vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Vu);
#endif
}

FASTMTL_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  uint32_t bits;
  float f;
  if (exponent == 0) { // zero and subnormals
    f = float(mantissa) * 0x1p-24f;
    __builtin_memcpy(&bits, &f, 4);
    bits |= sign;
  } else if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  }
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

FASTMTL_INLINE uint16_t float_to_half(float f) { // round to nearest even
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    return uint16_t(sign | 0x7e00u);
  }
  if (bits >= 0x477ff000u) { // 65520 and above round to infinity
    return uint16_t(sign | 0x7c00u);
  }
  if (bits < 0x38800000u) { // subnormal result: let the adder round at bit 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13));
}

// --- loads: kWidth elements as doubles, or kWidth32 as floats
FASTMTL_INLINE Vd load(const double* p, double) {
  return read<Vd>(p);
}
FASTMTL_INLINE Vd load(const float* p, double) {
  return widen(read<HalfVf>(p));
}
FASTMTL_INLINE Vd load(const bf16* p, double) {
  return widen((HalfVf)(widen(read<HalfVh>(p)) << 16));
}
FASTMTL_INLINE Vf load(const float* p, float) {
  return read<Vf>(p);
}
FASTMTL_INLINE Vf load(const bf16* p, float) {
  return (Vf)(widen(read<Vh>(p)) << 16);
}
#if FASTMTL_VECTOR_BYTES == 64
FASTMTL_INLINE Vd load(const f16* p, double) {
  return (Vd)_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
FASTMTL_INLINE Vf load(const f16* p, float) {
  return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
#elif FASTMTL_VECTOR_BYTES == 32
FASTMTL_INLINE Vd load(const f16* p, double) {
  return (Vd)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
}
FASTMTL_INLINE Vf load(const f16* p, float) {
  return (Vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
#else
FASTMTL_INLINE Vd load(const f16* p, double) {
  Vd v{};
  for (int64_t i = 0; i < kWidth; ++i) {
    v[i] = half_to_float(p[i].bits);
  }
  return v;
}
FASTMTL_INLINE Vf load(const f16* p, float) {
  Vf v{};
  for (int64_t i = 0; i < kWidth32; ++i) {
    v[i] = half_to_float(p[i].bits);
  }
  return v;
}
#endif

// --- stores of kWidth doubles, rounded once to the element type

// Two more significant bits than the kBits of the result, the last of which also says whether there was anything below
// it: rounded to odd, which the rounding that follows cannot tell from the number itself (Boldo and Melquiond 2008).
// So few bits are exact in float32, also those of what is subnormal there and in bfloat16.
template <int kBits>
FASTMTL_INLINE Vd to_odd(Vd v) {
  constexpr int64_t kBelow = (int64_t(1) << (51 - kBits)) - 1;
  const Vi carry = ((Vi)v & kBelow) + kBelow;
  return (Vd)(((Vi)v | carry) & ~kBelow);
}

FASTMTL_INLINE void store(double* p, Vd v) {
  write(p, v);
}
FASTMTL_INLINE void store(float* p, Vd v) {
  write(p, narrow(v));
}
FASTMTL_INLINE HalfVu bf16_bits(Vd v) { // in the upper halves, and anything below
  const HalfVf f = narrow(to_odd<8>(v));
  const HalfVu bits = (HalfVu)f, nan = (HalfVu)(f != f);
  return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (nan & 0x7fc00000u);
}
FASTMTL_INLINE void store(bf16* p, Vd v) {
  write(p, __builtin_convertvector(bf16_bits(v) >> 16, HalfVh));
}
FASTMTL_INLINE void store(f16* p, Vd v) {
  const HalfVf f = narrow(to_odd<11>(v));
#if FASTMTL_VECTOR_BYTES == 64
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT));
#elif FASTMTL_VECTOR_BYTES == 32
  _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)f, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kWidth; ++i) {
    p[i].bits = float_to_half(f[i]);
  }
#endif
}

// --- 2 kWidth neighbours as doubles, and back: in order, but for bfloat16, whose even elements come first
struct Pair {
  Vd a, b;
};

template <class E>
FASTMTL_INLINE Pair load_pair(const E* p) {
  return {load(p, double{}), load(p + kWidth, double{})};
}
template <class E>
FASTMTL_INLINE void store_pair(E* p, Pair v) {
  store(p, v.a);
  store(p + kWidth, v.b);
}
FASTMTL_INLINE Pair load_pair(const bf16* p) {
  const HalfVu both = read<HalfVu>(p);
  return {widen((HalfVf)(both << 16)), widen((HalfVf)(both & 0xffff0000u))};
}
FASTMTL_INLINE void store_pair(bf16* p, Pair v) {
  write(p, (bf16_bits(v.a) >> 16) | (bf16_bits(v.b) & 0xffff0000u));
}

// Two neighbouring vectors of doubles as floats, past the cache. `p` must be aligned to the vector.
FASTMTL_INLINE void stream(float* p, Vd a, Vd b) {
#if FASTMTL_VECTOR_BYTES == 64
  const __m256 lo = _mm512_cvtpd_ps((__m512d)a), hi = _mm512_cvtpd_ps((__m512d)b);
  _mm512_stream_ps(p, _mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1));
#elif FASTMTL_VECTOR_BYTES == 32
  _mm256_stream_ps(p, _mm256_set_m128(_mm256_cvtpd_ps((__m256d)b), _mm256_cvtpd_ps((__m256d)a)));
#else
  store(p, a);
  store(p + kWidth, b);
#endif
}

FASTMTL_INLINE void stream_fence() {
#if FASTMTL_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

FASTMTL_INLINE double sum(Vd v) {
#if FASTMTL_VECTOR_BYTES == 64
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double s = 0.0;
  for (int64_t i = 0; i < kWidth; ++i) {
    s += v[i];
  }
  return s;
#endif
}

FASTMTL_INLINE double sum(Vf v) { // in float64
#if FASTMTL_VECTOR_BYTES == 64
  const __m256 lo = _mm512_castps512_ps256((__m512)v), hi = _mm512_extractf32x8_ps((__m512)v, 1);
  return sum((Vd)_mm512_add_pd(_mm512_cvtps_pd(lo), _mm512_cvtps_pd(hi)));
#elif FASTMTL_VECTOR_BYTES == 32
  const __m128 lo = _mm256_castps256_ps128((__m256)v), hi = _mm256_extractf128_ps((__m256)v, 1);
  return sum((Vd)_mm256_add_pd(_mm256_cvtps_pd(lo), _mm256_cvtps_pd(hi)));
#else
  double s = 0.0;
  for (int64_t i = 0; i < kWidth32; ++i) {
    s += double(v[i]);
  }
  return s;
#endif
}

// out[i] += the sum of the lanes of v[i]
FASTMTL_INLINE void add_sums(const Vd* v, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] += sum(v[i]);
  }
}

FASTMTL_INLINE void add_sums(const Vf* v, int64_t count, double* out) {
  int64_t i = 0;
#if FASTMTL_VECTOR_BYTES == 64
  const auto low = [](Vf a, Vf b) { return _mm512_unpacklo_ps((__m512)a, (__m512)b); };
  const auto high = [](Vf a, Vf b) { return _mm512_unpackhi_ps((__m512)a, (__m512)b); };
  for (; i + 16 <= count; i += 16) { // a transposition whose every step adds: 16 vectors become one
    __m512 pairs[8], quads[4];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      pairs[k] = _mm512_add_ps(low(v[i + 2 * k], v[i + 2 * k + 1]), high(v[i + 2 * k], v[i + 2 * k + 1]));
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512d a = _mm512_castps_pd(pairs[2 * k]), b = _mm512_castps_pd(pairs[2 * k + 1]);
      quads[k] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halve = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    const __m512 sums = halve(halve(quads[0], quads[1]), halve(quads[2], quads[3]));
    write(out + i, read<Vd>(out + i) + (Vd)_mm512_cvtps_pd(_mm512_castps512_ps256(sums)));
    write(out + i + 8, read<Vd>(out + i + 8) + (Vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps(sums, 1)));
  }
#endif
  for (; i < count; ++i) {
    out[i] += sum(v[i]);
  }
}

FASTMTL_INLINE Vd square_root(Vd v) {
#if FASTMTL_VECTOR_BYTES == 64
  return (Vd)_mm512_sqrt_pd((__m512d)v);
#elif FASTMTL_VECTOR_BYTES == 32
  return (Vd)_mm256_sqrt_pd((__m256d)v);
#else
  for (int64_t i = 0; i < kWidth; ++i) {
    v[i] = __builtin_sqrt(v[i]);
  }
  return v;
#endif
}

// 1 / sqrt(x) to full precision, x a normal number.
FASTMTL_INLINE Vd reciprocal_root(Vd x) {
#if FASTMTL_VECTOR_BYTES == 64
  Vd y = (Vd)_mm512_rsqrt14_pd((__m512d)x);
  Vd e = 1.0 - x * y * y; // 14 -> 42 -> 84 bits
  y += y * e * (0.5 + 0.375 * e);
  e = 1.0 - x * y * y;
  return y + 0.5 * y * e;
#else
  return 1.0 / square_root(x);
#endif
}

FASTMTL_INLINE Vd larger(Vd a, Vd b) {
  return a > b ? a : b;
}

// Elements p[0], p[step], p[2 step], ...
FASTMTL_INLINE Vd gather(const double* p, int64_t step) {
  Vd v{};
#pragma GCC unroll 8
  for (int64_t l = 0; l < kWidth; ++l) {
    v[l] = p[l * step];
  }
  return v;
}

FASTMTL_INLINE Vd magnitude(Vd v) {
  return (Vd)((Vi)v & int64_t(0x7fffffffffffffff));
}

FASTMTL_INLINE bool any(Vi mask) {
#if FASTMTL_VECTOR_BYTES == 64
  return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif FASTMTL_VECTOR_BYTES == 32
  return _mm256_movemask_pd((__m256d)mask) != 0;
#else
  int64_t found = 0;
  for (int64_t i = 0; i < kWidth; ++i) {
    found |= mask[i];
  }
  return found != 0;
#endif
}

} // namespace
} // namespace fastmtl::cpu
