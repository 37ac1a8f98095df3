// Stands in for PyTorch's header of this name, of which csrc/cpu uses what is about threads. PyTorch's own run on
// OpenMP, whose library ThreadSanitizer cannot see into: it would take every barrier for none. These threads it does
// see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace torch::stable {

inline int64_t worker_count = 1;

inline uint32_t get_num_threads() {
  return uint32_t(worker_count);
}

// f(begin, end) over ranges as even as PyTorch's, one a thread. The grain is ignored: what is safe to share out stays
// so in smaller parts, and small problems are shared out too.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const F& f) {
  static thread_local bool inside = false;
  if (begin >= end) {
    return;
  }
  const int64_t most = inside ? 1 : std::min(worker_count, end - begin), size = (end - begin + most - 1) / most;
  std::vector<std::thread> others;
  for (int64_t at = begin + size; at < end; at += size) {
    others.emplace_back([&f, at, last = std::min(end, at + size)] {
      inside = true;
      f(at, last);
    });
  }
  const bool was_inside = std::exchange(inside, true);
  f(begin, std::min(end, begin + size));
  inside = was_inside;
  for (std::thread& other : others) {
    other.join();
  }
}

} // namespace torch::stable
