// What every op on CUDA tensors starts with.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "tensors.h"
#include "../cuda/pipeline.h"

namespace fastmtl::cuda {

namespace { // as in tensors.h

using torch::stable::Device;
using torch::stable::accelerator::DeviceGuard;

const Device kHost(torch::headeronly::DeviceType::CPU);

// The device and stream of a call, and the memory that its kernels use. The memory returns to torch's allocator once
// the launches are queued, and is reused in stream order.
class Call {
 public:
  explicit Call(const Tensor& like) : guard_(like.get_device_index()), like_(like) {
    const int32_t device = like.get_device_index();
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    int ratio = 0, shared = 0;
    check(cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device));
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    context_.stream = static_cast<cudaStream_t>(stream);
    context_.slow_float64 = ratio > 4;
    context_.shared_limit = shared;
    context_.allocate = [this](int64_t bytes) {
      memory_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
      return memory_.back().mutable_data_ptr();
    };
  }

  const Context& context() const {
    return context_;
  }

 private:
  DeviceGuard guard_;
  Tensor like_;
  std::vector<Tensor> memory_;
  Context context_;
};

} // namespace

} // namespace fastmtl::cuda
