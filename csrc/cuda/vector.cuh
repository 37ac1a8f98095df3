// 16 bytes at a time: loads, and conversions between the gradients' types and those that are computed in.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "platform.h"

namespace fastmtl::cuda {

using bfloat16 = c10::BFloat16;
using float16 = c10::Half;

template <class scalar>
constexpr int kVec = 16 / int(sizeof(scalar));

// 16 bytes of gradients as they came.
template <class scalar>
struct Vector {
  uint4 bits;

  __device__ scalar operator[](int i) const {
    scalar x;
    memcpy(&x, reinterpret_cast<const char*>(&bits) + i * sizeof(scalar), sizeof(scalar));
    return x;
  }
  __device__ void set(int i, scalar x) {
    memcpy(reinterpret_cast<char*>(&bits) + i * sizeof(scalar), &x, sizeof(scalar));
  }
};

template <class scalar>
__device__ Vector<scalar> zeros() {
  return {uint4{0, 0, 0, 0}};
}

// The vector that begins at a column, zeros where there is no row.
template <class scalar>
__device__ __forceinline__ Vector<scalar> vector_at(const scalar* row, int64_t column) {
  Vector<scalar> v = zeros<scalar>();
  if (row) {
    v.bits = __ldg(reinterpret_cast<const uint4*>(row + column));
  }
  return v;
}

// The emulation counts what lanes read together.
template <class scalar>
__device__ scalar load(const scalar* address) {
#ifdef FASTMTL_EMULATE
  host_cuda::watch(address);
#endif
  return *address;
}

// How many elements of a row are worth their registers where they are read one by one.
template <class scalar>
constexpr int kFew = kVec<scalar> < 4 ? kVec<scalar> : 4;

// kCount elements at, at + kStep, ... of a row that has no whole vectors there, zeros from `end` on and where there is
// no row. kStep neighbouring lanes that begin at neighbouring elements read neighbours at the same time.
template <int kStep, int kCount, class scalar>
__device__ Vector<scalar> read(const scalar* row, int at, int end) {
  Vector<scalar> v = zeros<scalar>();
  const int left = row ? end - at : 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i * kStep < left) {
      v.set(i, load(row + at + i * kStep));
    }
  }
  return v;
}

// float32, bfloat16 or float16 from float64, rounded once: to odd on the way, so that the second rounding sees what the
// first one cut off (Boldo and Melquiond 2008).
template <class scalar>
__device__ scalar narrow(double x) {
  if constexpr (sizeof(scalar) >= 4) {
    return scalar(x);
  } else {
    float f = float(x);
    if (double(f) != x && x == x) {
      uint32_t bits;
      memcpy(&bits, &f, 4);
      const bool away = (x < 0.0 ? -double(f) : double(f)) > (x < 0.0 ? -x : x);
      bits = (bits - (away ? 1 : 0)) | 1;
      memcpy(&f, &bits, 4);
    }
    return scalar(f);
  }
}

template <class to, class scalar>
__device__ to widen(scalar x) {
  if constexpr (sizeof(scalar) == 2) {
    return to(float(x));
  } else {
    return to(x);
  }
}

} // namespace fastmtl::cuda
