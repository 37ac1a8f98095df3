// The kernels for any machine: the vectors are the compiler's generic ones, 16 bytes wide.
#include "../kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#define FASTMTL_VECTOR_BYTES 16
#define FASTMTL_NAME "portable"
#define FASTMTL_TABLE portable_kernels
#include "table.inc"
