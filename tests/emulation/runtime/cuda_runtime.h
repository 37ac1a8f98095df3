// Stands in for the CUDA runtime where csrc/cuda/platform.h calls it: nothing runs, a call fails where it is told to,
// and the error stays, as the runtime's does, until somebody takes it.
#pragma once

#include <cstddef>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
struct dim3 {
  unsigned x, y = 1, z = 1;
};
struct cudaLaunchConfig_t {
  dim3 gridDim{0}, blockDim{0};
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace runtime {
inline cudaError_t attribute = cudaSuccess, launch = cudaSuccess; // what these calls return
inline cudaError_t last = cudaSuccess;
inline int launches = 0;

inline cudaError_t returned(cudaError_t status) {
  last = status == cudaSuccess ? last : status;
  return status;
}
} // namespace runtime

inline cudaError_t cudaGetLastError() {
  const cudaError_t status = runtime::last;
  runtime::last = cudaSuccess;
  return status;
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return runtime::returned(runtime::attribute);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Parameters...), Arguments...) {
  runtime::launches += runtime::launch == cudaSuccess;
  return runtime::returned(runtime::launch);
}
