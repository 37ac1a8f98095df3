// Grids and shared memory of the kernels that depend on the gradients' type; a gradients_*.cu instantiates them for
// one.
#pragma once

#include "kernels.h"
#include "sign_drop.cuh"
#include "align_small.cuh"

namespace fastmtl::cuda {

// f<kRows>() for the one of so many that `rows` is.
template <int... kRows, class F>
void with_rows(int rows, F f) {
  (void)((rows == kRows && (f.template operator()<kRows>(), true)) || ...);
}

template <class scalar>
void launch_gram(
    const Source& source,
    int64_t B,
    const GramPlan& plan,
    Pass pass,
    int64_t first,
    int64_t blocks,
    const Partials& partials,
    cudaStream_t stream) {
  const auto stream_rows = [&]<int kRows>() {
    constexpr int64_t kSlot = kStreamValues<kRows> + 1;
    FASTMTL_LAUNCH(
        (gram_stream<scalar, kRows>),
        dim3(unsigned(B * blocks)),
        dim3(kStreamThreads),
        kStreamShared<kRows>,
        stream,
        source,
        pass,
        blocks,
        partials.blocks * kSlot,
        partials.diagonal + first * kSlot);
  };
  const auto tiles = [&]<class accumulator, int kRows>(int64_t groups, double* partial) {
    using Shape = Tiling<accumulator, kRows>;
    constexpr int64_t kSlot = Shape::kValues + 1;
    FASTMTL_LAUNCH(
        (gram_tiles<scalar, accumulator, kRows>),
        dim3(unsigned(B * blocks), unsigned(groups)),
        dim3(Shape::kThreads),
        Shape::kShared,
        stream,
        source,
        pass,
        blocks,
        groups * partials.blocks * kSlot,
        partials.blocks * kSlot,
        partial + first * kSlot);
  };
  const auto groups = [&]<int kRows>() {
    using Shape = Groups<kRows>;
    constexpr int64_t kSlot = Shape::kValues + 1;
    FASTMTL_LAUNCH(
        (gram_groups<scalar, kRows>),
        dim3(unsigned(B * blocks), unsigned(plan.diagonal)),
        dim3(Shape::kThreads),
        Shape::kShared,
        stream,
        source,
        pass,
        blocks,
        plan.diagonal * partials.blocks * kSlot,
        partials.blocks * kSlot,
        partials.diagonal + first * kSlot);
  };
  if (plan.rows <= 8) {
    with_rows<2, 4, 8>(plan.rows, stream_rows);
  } else if (!plan.blocks) {
    with_rows<16, 24, 32, 40, 48, 64>(plan.rows, groups);
    if (plan.pairs() > 0) {
      tiles.template operator()<double, 128>(plan.pairs(), partials.pairs);
    }
  } else if constexpr (sizeof(scalar) < 8) { // float64 has no float32 pass
    with_rows<16, 32, 64>(
        plan.rows, [&]<int kRows>() { tiles.template operator()<float, kRows>(plan.diagonal, partials.diagonal); });
    if (plan.pairs() > 0) {
      tiles.template operator()<float, 128>(plan.pairs(), partials.pairs);
    }
  }
}

template <class scalar>
void launch_probe(
    const Source& source,
    int64_t B,
    const float* z,
    int64_t first,
    int64_t blocks,
    int64_t all,
    double* partial,
    cudaStream_t stream) {
  if constexpr (sizeof(scalar) < 8) { // float64 has no float32 pass
    const int64_t slot = source.tasks * kProbes;
    FASTMTL_LAUNCH(
        gram_probe<scalar>,
        dim3(unsigned(B * blocks)),
        dim3(kProbeThreads),
        kProbeShared,
        stream,
        source,
        blocks,
        all * slot,
        z,
        partial + first * slot);
  }
}

// Blocks for so many tiles, in which every thread has one vector of columns.
template <class scalar>
int64_t blocks_for_vectors(int64_t tiles, int threads) {
  const int64_t run = threads * kVec<scalar> / kTileColumns;
  return (tiles + run - 1) / run;
}

template <class scalar>
void launch_combine(const Source& source, int64_t B, const double* alpha, cudaStream_t stream) {
  const int64_t blocks = blocks_for_vectors<scalar>(source.tiles, kCombineThreads);
  FASTMTL_LAUNCH(combine<scalar>, dim3(unsigned(B * blocks)), dim3(kCombineThreads), 0, stream, source, blocks, alpha);
}

template <class scalar>
void launch_sign_drop(const Source& source, int64_t B, const int64_t* seed, const double* leak, cudaStream_t stream) {
  const int64_t blocks = blocks_for_vectors<scalar>(source.tiles, kSignDropThreads);
  const auto launch = [&]<bool kLeak>() {
    FASTMTL_LAUNCH(
        (sign_drop<scalar, kLeak>),
        dim3(unsigned(B * blocks)),
        dim3(kSignDropThreads),
        0,
        stream,
        source,
        blocks,
        seed,
        leak);
  };
  leak ? launch.template operator()<true>() : launch.template operator()<false>();
}

template <class scalar>
void launch_align_small(
    const Source& source,
    int64_t B,
    const Policy& policy,
    double* gram,
    const Weights& weights,
    cudaStream_t stream) {
  const auto launch = [&]<int kRows>() {
    using Shape = Small<kRows>;
    FASTMTL_LAUNCH(
        (align_small<scalar, kRows>),
        dim3(unsigned(B)),
        dim3(Shape::kThreads),
        Shape::shared(source.tasks),
        stream,
        source,
        policy,
        gram,
        weights.alpha,
        weights.rank);
  };
  with_rows<8, 16, 32>(source.tasks <= 8 ? 8 : source.tasks <= 16 ? 16 : 32, launch);
}

#define FASTMTL_INSTANTIATE(scalar)                                                                            \
  template void launch_gram<scalar>(                                                                           \
      const Source&, int64_t, const GramPlan&, Pass, int64_t, int64_t, const Partials&, cudaStream_t);         \
  template void launch_probe<scalar>(                                                                          \
      const Source&, int64_t, const float*, int64_t, int64_t, int64_t, double*, cudaStream_t);                 \
  template void launch_combine<scalar>(const Source&, int64_t, const double*, cudaStream_t);                   \
  template void launch_sign_drop<scalar>(const Source&, int64_t, const int64_t*, const double*, cudaStream_t); \
  template void launch_align_small<scalar>(                                                                    \
      const Source&, int64_t, const Policy&, double*, const Weights&, cudaStream_t);

} // namespace fastmtl::cuda
