// The kernels for AVX512. Everything after the pragma is compiled for it, so standard headers come before.
#include "../kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FASTMTL_VECTOR_BYTES 64
#define FASTMTL_NAME "avx512"
#define FASTMTL_TABLE avx512_kernels
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif
#include "table.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const fastmtl::cpu::Kernels* fastmtl::cpu::avx512_kernels() {
  return nullptr;
}
#endif
