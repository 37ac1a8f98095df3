// Projections on the dual cone for many tasks: what csrc/math/dual_cone.h computes, for UPGrad all T of them at once.
//
// They share C. Their solutions are sparse (a tenth of the tasks, where T = 1024 gradients are those of examples), and
// those of similar gradients nearly the same, so that the cost is that of wrong supports on the way:
//
// 1. Tasks are solved in batches [0, 1), [1, 2), [2, 4), [4, 8), ... Each starts from the support of the task of an
// earlier
//    batch whose gradient is nearest in direction. Those of a batch are independent: the same bits for any number of
//    threads.
// 2. Exchanges are lopsided. Whoever has x <= 0 leaves, but only some enter, those with the most negative slopes; to
// let
//    everyone enter, as block pivoting does, factors supports several times too large.
// 3. A support is a list, the largest x first, newcomers last. The factor's columns before the first that leaves stay.
//
// Proximal points, tolerances and the raising of an indefinite C are those of csrc/math/nonnegative.h, whose own
// solver takes over where a support is not found or its conditions are not met.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

constexpr int64_t kMinProjections = 65; // tasks: fewer are solved one by one, from signs

// v for u = weights (null for 1/T), or with `each` the sum of those for u = weights_i e_i; NaN where M is not finite.
void projections(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const double* weights, // [T]
    bool each,
    double* alpha,     // [B, T]
    double* residual); // [B], the worst of a matrix

} // namespace fastmtl::cpu
