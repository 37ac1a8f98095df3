// Which kernels run here, and their per-thread scratch.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace fastmtl::cpu {

namespace {

const Kernels* choose() {
  const char* wanted = std::getenv("FASTMTL_CPU");
  const bool portable = wanted && !std::strcmp(wanted, "portable"), avx2 = wanted && !std::strcmp(wanted, "avx2");
#if defined(__x86_64__) && defined(__GNUC__)
  if (!portable) {
    if (!avx2 && avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return avx512_kernels();
    }
    // F16C is not checked: every processor with AVX2 has it, and Clang 14 has no name for it.
    if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return avx2_kernels();
    }
  }
#else
  (void)portable, (void)avx2;
#endif
  return portable_kernels();
}

class Scratch {
 public:
  ~Scratch() {
    release();
  }
  double* get(int64_t doubles) {
    if (doubles > capacity_) {
      release();
      const size_t bytes = (size_t(doubles) * sizeof(double) + 63) / 64 * 64;
      memory_ = static_cast<double*>(std::aligned_alloc(64, bytes));
      if (!memory_) {
        throw std::bad_alloc();
      }
      capacity_ = doubles;
    }
    return memory_;
  }
  void trim() {
    if (capacity_ > kKeptScratch) {
      release();
    }
  }

 private:
  void release() {
    std::free(memory_);
    memory_ = nullptr;
    capacity_ = 0;
  }

  double* memory_ = nullptr;
  int64_t capacity_ = 0;
};

thread_local Scratch scratch[2];

} // namespace

double* thread_scratch(int slot, int64_t doubles) {
  return scratch[slot].get(doubles);
}

void trim_thread_scratch() {
  scratch[0].trim();
  scratch[1].trim();
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

} // namespace fastmtl::cpu
