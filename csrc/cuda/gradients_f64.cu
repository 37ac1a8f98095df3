#include "launch.cuh"

namespace fastmtl::cuda {
FASTMTL_INSTANTIATE(double)
} // namespace fastmtl::cuda
