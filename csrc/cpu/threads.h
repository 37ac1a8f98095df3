// Threads, and the state of each while it works on an op or a part of one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastmtl::cpu {

// At work, a thread computes with subnormal numbers. torch.set_flush_denormal makes one thread treat them as zeros, and
// results would then depend on the thread they came from; that mode is restored when the work is done. Then large
// scratch is freed, too.
class AtWork {
 public:
  AtWork() : mode_(mode()) {
    if (mode_ & kFlush) {
      set_mode(mode_ & ~kFlush);
    }
  }
  AtWork(const AtWork&) = delete;
  AtWork& operator=(const AtWork&) = delete;
  ~AtWork() {
    if (mode_ & kFlush) {
      set_mode(mode() | (mode_ & kFlush));
    }
    trim_thread_scratch();
  }

 private:
#if defined(__x86_64__)
  using Mode = unsigned;
  static constexpr Mode kFlush = 0x8040; // of results, of operands
  static Mode mode() {
    return _mm_getcsr();
  }
  static void set_mode(Mode mode) {
    _mm_setcsr(mode);
  }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kFlush = 1 << 24 | 1 << 19; // in general, and in half precision
  static Mode mode() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(Mode mode) {
    asm volatile("msr fpcr, %0" : : "r"(mode) : "memory");
  }
#else // torch has no such mode elsewhere
  using Mode = unsigned;
  static constexpr Mode kFlush = 0;
  static Mode mode() {
    return 0;
  }
  static void set_mode(Mode) {}
#endif

  const Mode mode_;
};

// f(begin, end) over parts of a range, on torch's threads; a single part runs on this one, which is already at work.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin <= grain) {
    if (begin < end) {
      f(begin, end);
    }
    return;
  }
  torch::stable::parallel_for(begin, end, grain, [&f](int64_t first, int64_t last) {
    const AtWork at_work;
    f(first, last);
  });
}

// An op for registration: m.impl("name", FASTMTL_CPU_OP(function)).
template <auto op>
struct Op;

template <class Result, class... Arguments, Result (*op)(Arguments...)>
struct Op<op> {
  static Result run(Arguments... arguments) {
    const AtWork at_work;
    return op(std::forward<Arguments>(arguments)...);
  }
};

#define FASTMTL_CPU_OP(op) TORCH_BOX(&::fastmtl::cpu::Op<&op>::run)

} // namespace fastmtl::cpu
