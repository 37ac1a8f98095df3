// Instead of cpu/isa/avx2.cpp and avx512.cpp, which take long to compile.
#include "cpu/kernels.h"

namespace fastmtl::cpu {

const Kernels* avx2_kernels() {
  return nullptr;
}

const Kernels* avx512_kernels() {
  return nullptr;
}

} // namespace fastmtl::cpu
