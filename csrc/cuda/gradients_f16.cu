#include "launch.cuh"

namespace fastmtl::cuda {
FASTMTL_INSTANTIATE(float16)
} // namespace fastmtl::cuda
