// Grids and shared memory of the kernels that depend on the gradients' type; a kernels_*.cu instantiates them for one.
#pragma once

#include "kernels.h"
#include "small.cuh"

namespace fastmtl::cuda {

namespace {

template <class scalar, class accumulator, int kRows>
void launch_tiles(
    const Source& source,
    int64_t B,
    int64_t groups,
    Pass pass,
    int64_t first,
    int64_t blocks,
    int64_t all_blocks,
    double* partial,
    cudaStream_t stream) {
  using Shape = Tiling<accumulator, kRows>;
  const int64_t slot = Shape::kValues + 1, next_group = all_blocks * slot, next_partial = groups * next_group;
  FASTMTL_LAUNCH(
      (gram_tiles<scalar, accumulator, kRows>),
      dim3(unsigned(B * blocks), unsigned(groups)),
      dim3(Shape::kThreads),
      Shape::kShared,
      stream,
      source,
      pass,
      blocks,
      next_partial,
      next_group,
      partial + first * slot);
}

template <class scalar, class accumulator>
void launch_tiles(
    const Source& source,
    int64_t B,
    const GramPlan& plan,
    Pass pass,
    int64_t first,
    int64_t blocks,
    int64_t all_blocks,
    double* diagonal,
    double* pairs,
    cudaStream_t stream) {
  const auto launch = plan.rows == 16   ? launch_tiles<scalar, accumulator, 16>
                      : plan.rows == 32 ? launch_tiles<scalar, accumulator, 32>
                                        : launch_tiles<scalar, accumulator, 64>;
  launch(source, B, plan.diagonal, pass, first, blocks, all_blocks, diagonal, stream);
  if (plan.pairs() > 0) {
    launch_tiles<scalar, accumulator, 128>(source, B, plan.pairs(), pass, first, blocks, all_blocks, pairs, stream);
  }
}

template <class scalar, int kRows>
void launch_stream(
    const Source& source,
    int64_t B,
    Pass pass,
    int64_t first,
    int64_t blocks,
    int64_t all_blocks,
    double* partial,
    cudaStream_t stream) {
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
      all_blocks * kSlot,
      partial + first * kSlot);
}

template <class scalar, int kRows>
void launch_small(
    const Source& source,
    int64_t B,
    const Policy& policy,
    double* gram,
    double* alpha,
    double* eigenvalues,
    int64_t* rank,
    cudaStream_t stream) {
  using Shape = Small<scalar, kRows>;
  FASTMTL_LAUNCH(
      (align_small<scalar, kRows>),
      dim3(unsigned(B)),
      dim3(Shape::kThreads),
      Shape::shared(source.tasks),
      stream,
      source,
      policy,
      gram,
      alpha,
      eigenvalues,
      rank);
}

} // namespace

template <class scalar>
void launch_gram(
    const Source& source,
    int64_t B,
    const GramPlan& plan,
    Pass pass,
    int64_t first,
    int64_t blocks,
    int64_t all_blocks,
    double* diagonal,
    double* pairs,
    cudaStream_t stream) {
  if (plan.rows <= 8) {
    const auto launch = plan.rows == 2   ? launch_stream<scalar, 2>
                        : plan.rows == 4 ? launch_stream<scalar, 4>
                                         : launch_stream<scalar, 8>;
    launch(source, B, pass, first, blocks, all_blocks, diagonal, stream);
    return;
  }
  if constexpr (sizeof(scalar) < 8) {
    if (plan.blocks) {
      launch_tiles<scalar, float>(source, B, plan, pass, first, blocks, all_blocks, diagonal, pairs, stream);
      return;
    }
  }
  launch_tiles<scalar, double>(source, B, plan, pass, first, blocks, all_blocks, diagonal, pairs, stream);
}

template <class scalar>
void launch_combine(const Source& source, int64_t B, const double* alpha, cudaStream_t stream) {
  const int64_t run = kCombineThreads * kVec<scalar> / kTileColumns; // tiles that keep a block's threads busy once
  const int64_t blocks = (source.tiles + run - 1) / (run > 0 ? run : 1);
  FASTMTL_LAUNCH(combine<scalar>, dim3(unsigned(B * blocks)), dim3(kCombineThreads), 0, stream, source, blocks, alpha);
}

template <class scalar>
void launch_align_small(
    const Source& source,
    int64_t B,
    const Policy& policy,
    double* gram,
    double* alpha,
    double* eigenvalues,
    int64_t* rank,
    cudaStream_t stream) {
  const auto launch = source.tasks <= 8 ? launch_small<scalar, 8> : launch_small<scalar, 32>;
  launch(source, B, policy, gram, alpha, eigenvalues, rank, stream);
}

#define FASTMTL_INSTANTIATE(scalar)                                                                              \
  template void launch_gram<scalar>(                                                                             \
      const Source&, int64_t, const GramPlan&, Pass, int64_t, int64_t, int64_t, double*, double*, cudaStream_t); \
  template void launch_combine<scalar>(const Source&, int64_t, const double*, cudaStream_t);                     \
  template void launch_align_small<scalar>(                                                                      \
      const Source&, int64_t, const Policy&, double*, double*, double*, int64_t*, cudaStream_t);

} // namespace fastmtl::cuda
