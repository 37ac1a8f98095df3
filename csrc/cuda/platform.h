// What a kernel file needs of CUDA. The tests compile the same files for the host: there tests/emulation/host_cuda.h
// takes the place of the toolkit.
#pragma once

#ifdef FASTMTL_EMULATE
#include "host_cuda.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// The block's dynamic shared memory as bytes.
#define FASTMTL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// A template kernel goes in parentheses: FASTMTL_LAUNCH((kernel<float, 4>), grid, block, shared, stream, arguments...).
#define FASTMTL_LAUNCH(kernel, ...) ::fastmtl::cuda::launch(kernel, __VA_ARGS__)

namespace fastmtl::cuda {

// Every call of the runtime goes through this. An error that is thrown is also taken from the runtime, which would hand
// it to whoever looks next: to torch, after some other op.
inline void check(cudaError_t status) {
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string("fastmtl: CUDA error: ") + cudaGetErrorString(status));
  }
}

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...),
    dim3 grid,
    dim3 block,
    size_t shared,
    cudaStream_t stream,
    Arguments... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

} // namespace fastmtl::cuda
#endif
