// Several fake GPUs: what csrc/cuda/platform.h takes from here (before anything else is included), and what torch.cpp
// and devices.cpp share. No kernel runs and no device memory can be touched by the host: its pages have no access
// rights. Every launch is looked at: its stream, the current device, and whatever among its arguments is an address.
#pragma once

#include "host_cuda.h"

#include <stdexcept>
#include <string>
#include <vector>

enum cudaDeviceAttr { cudaDevAttrSingleToDoublePrecisionPerfRatio = 87, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);

namespace devices {

constexpr int kDevices = 3;

struct State {
  int current = 0;                              // device
  void* streams[kDevices] = {};                 // the current one of each
  int expected = -1;                            // where all that happens has to happen, -1: nothing may
  int launches = 0, allocations = 0, calls = 0; // calls: of other ops of the library, through the dispatcher
  int fails_at = -1;                            // this launch fails
  bool slow_float64 = false;
  std::vector<std::string> wrong; // what was, in words
};
extern State state;

void launched(const char* kernel, void* stream, const void* const* arguments, const size_t* sizes, size_t count);

template <class... Arguments>
void launch(const char* kernel, dim3, dim3, size_t, void* stream, const Arguments&... arguments) {
  const void* addresses[] = {&arguments...};
  const size_t sizes[] = {sizeof(Arguments)...};
  launched(kernel, stream, addresses, sizes, sizeof...(Arguments));
}

} // namespace devices

// Kernels are named and not instantiated: that makes the sources compile in seconds.
#undef FASTMTL_LAUNCH
#define FASTMTL_LAUNCH(kernel, ...) ::devices::launch(#kernel, __VA_ARGS__)

namespace fastmtl::cuda {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error("fastmtl: CUDA error");
  }
}

} // namespace fastmtl::cuda
