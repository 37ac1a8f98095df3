// Projections on the dual cone for many tasks: what csrc/math/dual_cone.h computes, for UPGrad all T of them at once.
//
// They share C. Their solutions are sparse (a tenth of the tasks for T = 1024 gradients of examples), and those of
// similar gradients nearly equal, so the cost is that of the wrong supports on the way:
//
// 1. Tasks are solved in batches [0, 1), [1, 2), [2, 4), [4, 8), ... Each starts from the support of that task of
//    earlier batches whose gradient is nearest in direction. Those of a batch are independent, so the bits do not
//    depend on the number of threads.
// 2. Exchanges are lopsided: all with x <= 0 leave, but only those with the most negative slopes enter. To let all
//    enter, as block pivoting does, factors supports several times too large.
// 3. A support is a list, the largest x first, newcomers last. The factor's columns before the first to leave are kept.
//
// Proximal points, tolerances and the raising of an indefinite C are those of csrc/math/nonnegative.h, whose solver
// takes over if a support is not found or its conditions are not met.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

constexpr int64_t kMinProjections = 65; // tasks; fewer are solved one by one, starting from signs

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
