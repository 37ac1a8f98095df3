// What the numerics are decided by: every such number, and why it is that number. docs/numerics.md has the same table.
#pragma once

#include <cstdint>

namespace fastmtl {

// One line each, `constexpr type name = value; // reason`, in groups.

// Range
constexpr double kRounding = 0x1p-52;    // of float64: the distance from 1 to the next number
constexpr double kTinyEntry = 0x1p-500;  // of a matrix whose largest is one: the square of a smaller one is subnormal
constexpr double kTinySquare = 0x1p-930; // sums of smaller squares have lost terms to underflow
constexpr double kSafeSquare = 0x1p-900; // from here on the root of a sum of squares needs no hypot
constexpr double kFloat32Square = 1e-20; // a row of smaller squared norm has float32 products that are subnormal
constexpr double kLeastSquare = 1e-200;  // a Gram whose largest entry is smaller may have lost products to underflow
constexpr double kMostSquare = 1e200;    // and of a larger one some may have overflowed
constexpr double kLeastEntry = 1e-100;   // G is scaled where its largest entry is smaller: its square is kLeastSquare
constexpr double kMostEntry = 1e100;     // likewise where it is larger: its square is kMostSquare

// Float32 blocks
constexpr int64_t kMaxExactTasks = 40;            // above, float32 sums are enough faster to be tried first
constexpr double kFewTasksError = 2e-6;           // promised of the result up to kMaxExactTasks
constexpr double kManyTasksError = 1e-4;          // promised of the result above
constexpr double kBlocksExpectedEigenvalue = 0.1; // λ_min(C) of the first columns: with less, blocks fail too often
constexpr double kFewProbesSafety = 20.0;         // two vectors all see less than 1/20 of an error once in 590 times
constexpr double kManyProbesSafety = 5.0;         // four vectors all see less than 1/5 of it as rarely

// Spectrum of many tasks
constexpr int64_t kJacobiTasks = 8;             // above, tridiagonalisation is faster than Jacobi
constexpr int64_t kUnevenJacobiTasks = 16;      // the same where rows are uneven: Jacobi has less to rotate
constexpr double kEvenRows = 1e2;               // of squared norms: the Gram itself has an error of eps λ_max
constexpr double kJacobiRows = 1e12;            // of squared norms: beyond, Jacobi's vectors lose too much at long rows
constexpr double kSpectralMaxRatio = 0x1p100;   // of squared norms: their products stay in range
constexpr double kMaxGrowth = 3e2;              // eps growth² is the error of a tridiagonalisation: 1e-11
constexpr double kMaxGrowthTruncated = 3e3;     // of what is kept: rows that are far below the cut do not count
constexpr double kPivotNoise = 4.0 * kRounding; // times sqrt(T), of a row: what elimination leaves of a dependent one
constexpr double kLift = 16.0 * kRounding;      // times T, of a dependent row: its pivot then is no noise
constexpr double kFormError = 1e-7;             // relative, of αᵀ M α: κ(C) = 1e8 has half of the digits of rounding
constexpr double kSmallestWidth = 1e-13;        // relative, of the interval in which λ_min is found
constexpr double kFractionsError = 1e-14;       // relative, of x^-1/2 as partial fractions: fifty times rounding
constexpr double kDirectError = 1e-9;           // the same where every term is a factorisation of M
constexpr double kLeastEigenvalue = 1e-8;       // of λ_max: with less, a GPU's weights come from L of M = L Lᵀ
constexpr double kReductionError = 8.0 * kRounding; // times T λ_max: what tridiagonalisation may do to an eigenvalue
constexpr double kLeastReflected = 0x1p-400;        // squared, beside entries near one: less is not worth a reflection
constexpr double kLeastCoupling = 0x1p-120; // squared, relative to what it couples: a zero would end a Sturm sequence
constexpr double kMeansEqual = 1e-9;        // relative: the mean of the two means has twice the digits
constexpr double kRowError = 1e-10;         // of (A + t) x = y, in units of each row: a hundred times growth's

// Krylov spaces
constexpr int64_t kKrylovTasks = 640; // above, weights of a well-conditioned M cost less than a tridiagonalisation
constexpr double kKrylovMaxDiagonalRatio = 1e2; // squared norms further apart take more steps than are worth it
constexpr int64_t kKrylovMaxSteps = 96;         // beyond, a tridiagonalisation is not dearer
constexpr double kKrylovEnd = 1e-14;            // what is left of a new direction, relative: the space is complete
constexpr double kKrylovChange = 1e-24;         // squared, of M^(-1/2) w over four steps: it has converged
constexpr double kCertified = 1e-6;             // relative, how far below its estimate λ_min is proved not to lie
constexpr double kQlEnd = 1e-16; // beside the diagonal, relative to it: half a rounding, nothing is coupled
constexpr double kScatter = 0.1; // of a unit vector: random, so that no eigenvector is orthogonal to a start

// Solvers
constexpr double kProximal = 64.0 * kRounding; // times T, added to C: one step is nearly as good as C is known
constexpr double kSolved = 4.0 * kRounding;    // slopes of this, times sqrt(T) and the size of the terms, are zero
constexpr int64_t kExchanges = 4;              // of the support that may fail to get nearer, in a row
constexpr double kEnter = 0.2;                 // of a support's size may enter at once, beyond 64 tasks
constexpr int64_t kEnterLeast = 4;             // but so many in any case
constexpr int64_t kPatience = 8;               // exchanges that may fail to get nearer before one enters at a time
constexpr int64_t kMaxRounds = 60;             // of exchanges; ten are usual
constexpr double kSolutionError = 1e-10;       // a residual above, and the solver of few tasks has a try
constexpr int64_t kMaxPoints = 8;              // proximal points; two to four are usual
constexpr int64_t kMaxNewtonSteps = 100;       // of CAGrad; few are usual
constexpr double kNashCancelled = 0x1p-22; // a sum that has cancelled to this counts as this much: α has no more digits
constexpr double kNashNear = 0.2;          // a relative step below this converges quadratically without a line search
constexpr double kNashFarthest = 1e8;      // a step this long ends where there is no solution
constexpr double kNashShrink = 0.999;      // of γ at most a step takes away: it stays positive
constexpr double kNashSlope = 0.1;         // of the slope at the start: so near its root a line search ends
constexpr double kCosineRounding = 16.0 * kRounding; // times T: GradVac's cosines within this of one are one
constexpr double kLeastSine = 1e-8;                  // of GradVac's target: sqrt(eps), below which 1 - cos² is rounding

} // namespace fastmtl
