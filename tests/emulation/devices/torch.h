// The fake PyTorch of torch.cpp, as devices.cpp sees it.
#pragma once

#include "runtime.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <string>
#include <vector>

namespace fake {

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// The ops that were registered, by name.
std::map<std::string, Boxed>& ops();

// A tensor of the user's, on a device or (-1) the CPU; `strides` empty: contiguous.
torch::stable::Tensor tensor(
    int device,
    const std::vector<int64_t>& sizes,
    torch::headeronly::ScalarType type,
    const std::vector<int64_t>& strides = {});

} // namespace fake
