// The order of a sweep of Jacobi rotations.
#pragma once

#include "team.h"

namespace fastmtl {
namespace {

// Pair k of a round of a round-robin tournament of `players` (even); p < q, and indices from T on are byes.
template <class Int>
FASTMTL_HOST_DEVICE inline void pairing(Int players, Int round, Int k, Int& p, Int& q) {
  const Int others = players - 1;
  const Int x = k == 0 ? others : round + k < others ? round + k : round + k - others;
  const Int y = round >= k ? round - k : round - k + others;
  p = x < y ? x : y;
  q = x < y ? y : x;
}

} // namespace
} // namespace fastmtl
