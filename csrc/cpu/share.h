// How work on matrices and their columns is split over threads: by shape alone, so that the bits do not depend on the
// number of threads.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "threads.h"

namespace fastmtl::cpu {

// A batch entry of at most this many elements is still in the cache when its weights are known.
constexpr int64_t kCachedElements = int64_t(1) << 17;
// Up to this many tasks, or elements, the work on one matrix is not split if there are other matrices.
constexpr int64_t kAloneTasks = 256;
constexpr int64_t kAloneElements = int64_t(1) << 20;
// Results are written past the cache if G is larger than this: they would only evict what is read next.
constexpr int64_t kStreamBytes = int64_t(4) << 20;

inline int64_t columns(const Gradients& G) {
  int64_t P = 0;
  for (int64_t k = 0; k < G.count; ++k) {
    P += G.segments[k].length;
  }
  return P;
}

// Calls f(begin, end, stream) for ranges of columns that make up all of G, on several threads where it is large.
template <class F>
void share_columns(const Gradients& G, F&& f) {
  constexpr int64_t kUnit = 1024; // columns
  const int64_t P = columns(G), units = (P + kUnit - 1) / kUnit;
  int64_t bytes = 0;
  for (int64_t k = 0; k < G.count; ++k) {
    bytes += G.tasks * G.segments[k].length * element_size(G.segments[k].dtype);
  }
  if (bytes < (1 << 18)) {
    f(0, P, false);
    return;
  }
  parallel_for(0, units, 4, [&](int64_t begin, int64_t end) {
    f(begin * kUnit, std::min(end * kUnit, P), bytes > kStreamBytes);
  });
}

// Calls f(b) for every matrix of a batch: on one thread each if they are many or small, else one after another on all
// threads. Either way f splits its own work alike.
template <class F>
void share_matrices(int64_t B, bool small, F&& f) {
  const auto each = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      f(b);
    }
  };
  if (B > 1 && (small || B >= 4 * int64_t(torch::stable::get_num_threads()))) {
    parallel_for(0, B, 1, each);
  } else {
    each(0, B);
  }
}

inline bool is_small(const Gradients& G) {
  return columns(G) * G.tasks <= kAloneElements;
}

// Whether there are few tasks and columns, so that a thread takes its matrices in one walk.
inline bool share_out(const Gradients* G, int64_t B) {
  return B >= 4 && G[0].tasks <= kMaxLanesTasks && columns(G[0]) * G[0].tasks <= kCachedElements;
}

} // namespace fastmtl::cpu
