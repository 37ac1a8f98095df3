// The kernels for AVX2. Everything after the pragma is compiled for it, so standard headers come before.
#include "../kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FASTMTL_VECTOR_BYTES 32
#define FASTMTL_NAME "avx2"
#define FASTMTL_TABLE avx2_kernels
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "table.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
const fastmtl::cpu::Kernels* fastmtl::cpu::avx2_kernels() {
  return nullptr;
}
#endif
