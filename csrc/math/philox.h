// Counter-based random numbers (Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
// and permutations drawn from them: what is drawn depends on the seed and on what it is for, never on threads.
#pragma once

#include <cstdint>

#include "team.h"

namespace fastmtl {
namespace {

struct Random4 {
  uint32_t words[4];
};

// Four uniform words for a key and a counter of 128 bits; ten rounds, about 40 multiplications.
FASTMTL_HOST_DEVICE inline Random4 philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t(0xD2511F53u) * c0, right = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(right >> 32) ^ c1 ^ k0;
    c1 = uint32_t(right);
    c2 = uint32_t(left >> 32) ^ c3 ^ k1;
    c3 = uint32_t(left);
    k0 += 0x9E3779B9u; // the golden ratio and sqrt(3) - 1, as everywhere
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A uniform permutation of T tasks (Fisher-Yates), for task `task` of matrix `matrix`: swap T - 1 - d of the tasks that
// are left is word d % 4 of counter (d / 4, task, matrix), brought below their number by a multiplication (the bias is
// T / 2³²). Indices are held as doubles, as all scratch is.
template <class Team>
FASTMTL_HOST_DEVICE void permutation(
    const Team& team,
    uint64_t seed,
    int64_t matrix,
    int64_t task,
    int64_t T,
    double* order,   // [T]
    double* swaps) { // [T + 3]
  team.each((T + 2) / 4, [=](int64_t block) {
    const Random4 drawn =
        philox(seed, uint32_t(block), uint32_t(task), uint32_t(matrix), uint32_t(uint64_t(matrix) >> 32));
    for (int64_t word = 0; word < 4; ++word) {
      const int64_t left = T - 4 * block - word; // at most 3 below 1, in the last block: not used
      swaps[4 * block + word] = double((uint64_t(drawn.words[word]) * uint64_t(left > 0 ? left : 0)) >> 32);
    }
  });
  team.each(T, [=](int64_t t) { order[t] = double(t); });
  team.once([=] {
    for (int64_t d = 0; d < T - 1; ++d) {
      const int64_t last = T - 1 - d, chosen = int64_t(swaps[d]);
      const double kept = order[chosen];
      order[chosen] = order[last];
      order[last] = kept;
    }
  });
}

} // namespace
} // namespace fastmtl
