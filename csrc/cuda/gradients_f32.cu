#include "launch.cuh"

namespace fastmtl::cuda {
FASTMTL_INSTANTIATE(float)
} // namespace fastmtl::cuda
