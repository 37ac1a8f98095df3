// What the emulated kernels get from tests: a device, its memory, and addresses as integers.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/pipeline.h"

namespace fastmtl::cuda {

namespace {

// Device memory of one call: exact allocations, so that AddressSanitizer sees their ends, filled with NaN.
struct Session {
  std::vector<std::unique_ptr<unsigned char[]>> memory;
  Context context;

  Session(bool slow_float64, int64_t shared_limit) : context{nullptr, {}, slow_float64, shared_limit} {
    context.allocate = [this](int64_t bytes) {
      memory.emplace_back(new unsigned char[size_t(bytes)]);
      memset(memory.back().get(), 0xff, size_t(bytes));
      return static_cast<void*>(memory.back().get());
    };
  }
};

template <class X>
X* at(uintptr_t address) {
  return reinterpret_cast<X*>(address);
}

} // namespace

} // namespace fastmtl::cuda
