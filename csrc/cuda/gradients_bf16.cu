#include "launch.cuh"

namespace fastmtl::cuda {
FASTMTL_INSTANTIATE(bfloat16)
} // namespace fastmtl::cuda
