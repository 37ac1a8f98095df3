// Scaling by powers of two, which changes no bits.
#pragma once

#include <cstring>

#include "team.h"

namespace fastmtl {
namespace {

// Powers of two that bring the largest entry of a matrix near one and back. Ones where it is subnormal or not finite.
FASTMTL_HOST_DEVICE inline void power_of_two(double largest, double& down, double& up) {
  uint64_t bits;
  memcpy(&bits, &largest, 8);
  bits &= 0x7ff0000000000000u;
  const bool scalable = bits != 0 && bits < 0x7fd0000000000000u;
  const uint64_t one = 0x3ff0000000000000u, other = 0x7fe0000000000000u - bits;
  memcpy(&up, scalable ? &bits : &one, 8);
  memcpy(&down, scalable ? &other : &one, 8);
}

// Two factors whose product brings the largest entry of float64 gradients near one: one alone could not be represented
// for subnormal entries. False, and ones, where it need not or cannot be.
FASTMTL_HOST_DEVICE inline bool rescale(double largest, double& half, double& rest) {
  half = rest = 1.0;
  if (!(largest > 0.0) || !(largest * 0.0 == 0.0) || (largest < kMostEntry && largest > kLeastEntry)) {
    return false;
  }
  int exponent;
  std::frexp(largest, &exponent);
  half = std::ldexp(1.0, -exponent / 2);
  rest = std::ldexp(1.0, -exponent + exponent / 2);
  return true;
}

} // namespace
} // namespace fastmtl
