// Small kernels, right ones and wrong ones, to test the emulator with.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "host_cuda.h"

namespace py = pybind11;

namespace {

constexpr unsigned kAll = 0xffffffff;

// ---- Right ----------------------------------------------------------------------------------------------------------

constexpr int kValues = 20;

// What each operation gives to each thread.
template <class T>
__global__ void collectives(double* out) {
  const int t = int(threadIdx.x), lane = t % 32;
  const T v = T(t * t + 1);
  const bool even_warp = t / 32 % 2 == 0;
  double* row = out + t * kValues;
  int k = 0;
  row[k++] = double(__shfl_sync(kAll, v, 5));
  row[k++] = double(__shfl_sync(kAll, v, lane + 1, 8));
  row[k++] = double(__shfl_xor_sync(kAll, v, 16));
  row[k++] = double(__shfl_xor_sync(kAll, v, 4, 4));
  row[k++] = double(__shfl_down_sync(kAll, v, 3));
  row[k++] = double(__shfl_down_sync(kAll, v, 3, 16));
  row[k++] = double(__shfl_up_sync(kAll, v, 2));
  row[k++] = double(__shfl_up_sync(kAll, v, 2, 4));
  row[k++] = __ballot_sync(kAll, lane % 3 == 0);
  row[k++] = __any_sync(kAll, t == 40);
  row[k++] = __all_sync(kAll, t != 40);
  row[k++] = __syncthreads_count(lane < 7);
  row[k++] = __syncthreads_or(t == 3);
  row[k++] = __syncthreads_or(t < 0);
  row[k++] = __syncthreads_and(t >= 0);
  row[k++] = __syncthreads_and(t != 3);
  if (even_warp) { // warps need not go the same way
    row[k++] = double(__shfl_xor_sync(kAll, v, 1));
  } else {
    row[k++] = -1;
  }
  if (lane < 8) { // nor the lanes, when the mask says so
    row[k++] = double(__shfl_xor_sync(0xff, v, 7));
  } else {
    row[k++] = double(__shfl_down_sync(0xffffff00, v, 1));
  }
  __syncwarp();
  row[k++] = blockDim.x * 1e6 + gridDim.x * 1e3 + blockIdx.x;
  row[k++] = warpSize;
}

template <class T>
py::array_t<double> run_collectives() {
  py::array_t<double> out({96, kValues});
  FASTMTL_LAUNCH(collectives<T>, 1, 96, 0, nullptr, out.mutable_data());
  return out;
}

// A block whose last warp has 8 lanes.
__global__ void partial_warp(int* out) {
  int sum = int(threadIdx.x);
  for (int step = 1; step < 8; step *= 2) {
    sum += __shfl_xor_sync(kAll, sum, step, 8);
  }
  out[threadIdx.x] = sum;
}

// Indices in three dimensions, for blocks and threads.
__global__ void indices(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1000 * block + thread;
}

__global__ void intrinsics(double* out, const float4* in4, const double2* in2, const uint4* bits, float2* out2) {
  const float4 a = __ldg(in4);
  const double2 b = __ldcs(in2);
  const uint4 c = __ldcg(bits);
  __stcs(out2, make_float2(a.x, a.y));
  int k = 0;
  out[k++] = a.x + a.y + a.z + a.w;
  out[k++] = b.x - b.y;
  out[k++] = __popc(c.x);
  out[k++] = __ffs(int(c.y));
  out[k++] = __clz(int(c.z));
  out[k++] = rsqrtf(4.f) + rsqrt(4.);
  out[k++] = fma(2., 3., 1.) + fma(2.f, 3.f, 1.f);
  out[k++] = min(2, 1) + max(1u, 5u);
  out[k++] = max(float(NAN), 1.f) + min(1., double(NAN));
}

// A sum over blocks in a fixed order: the last block to finish adds up what all left in `partial`.
template <bool FenceBefore, bool FenceAfter>
__global__ void __launch_bounds__(64)
    last_block_sum(const float* __restrict__ x, float* __restrict__ partial, float* out, unsigned* counter) {
  FASTMTL_DYNAMIC_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  bool* last = reinterpret_cast<bool*>(shared + blockDim.x);
  const unsigned t = threadIdx.x;
  shared[t] = x[blockIdx.x * blockDim.x + t];
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step >= 32; step /= 2) {
    if (t < step) {
      shared[t] += shared[t + step];
    }
    __syncthreads();
  }
  // Each thread of the first warp leaves a number, so that the barrier below matters as well.
  if (t < 32) {
    partial[blockIdx.x * 32 + t] = shared[t];
  }
  if constexpr (FenceBefore) {
    __threadfence();
  }
  __syncthreads();
  if (t == 0) {
    *last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*last) {
    return;
  }
  if constexpr (FenceAfter) {
    __threadfence();
  }
  if (t < 32) {
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) {
      sum += partial[block * 32 + t];
    }
    for (int step = 16; step; step /= 2) {
      sum += __shfl_xor_sync(kAll, sum, step);
    }
    if (t == 0) {
      *out = sum;
    }
  }
}

template <bool FenceBefore, bool FenceAfter>
float run_last_block_sum(py::array_t<float> x) {
  const unsigned threads = 64, blocks = unsigned(x.size()) / threads;
  std::vector<float> partial(blocks * 32);
  unsigned counter = 0;
  float out = 0;
  for (int i = 0; i < 2; ++i) { // the counter is left as it was found
    FASTMTL_LAUNCH(
        (last_block_sum<FenceBefore, FenceAfter>),
        blocks,
        threads,
        threads * sizeof(float) + 1,
        nullptr,
        x.data(),
        partial.data(),
        &out,
        &counter);
  }
  return out;
}

__global__ void count(unsigned* total, int* down) {
  atomicAdd(total, 2u);
  atomicAdd(down, -1);
}

__global__ void spin(int barriers, int shuffles, unsigned* out) {
  unsigned v = threadIdx.x;
  for (int i = 0; i < barriers; ++i) {
    __syncthreads();
  }
  for (int i = 0; i < shuffles; ++i) {
    v += __shfl_xor_sync(kAll, v, 1);
  }
  out[threadIdx.x] = v;
}

__global__ void nothing() {}

// ---- Wrong, if so asked ---------------------------------------------------------------------------------------------

__global__ void rotate(const float* in, float* out, bool barrier) {
  FASTMTL_DYNAMIC_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  shared[threadIdx.x] = in[threadIdx.x];
  if (barrier) {
    __syncthreads();
  }
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

py::array_t<float> run_rotate(py::array_t<float> x, bool barrier) {
  py::array_t<float> out(x.size());
  const unsigned threads = unsigned(x.size());
  FASTMTL_LAUNCH(rotate, 1, threads, threads * sizeof(float), nullptr, x.data(), out.mutable_data(), barrier);
  return out;
}

// A shuffle lets lanes meet but does not order memory; __syncwarp does.
__global__ void exchange_in_warp(float* out, bool syncwarp) {
  FASTMTL_DYNAMIC_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  shared[threadIdx.x] = float(threadIdx.x);
  if (syncwarp) {
    __syncwarp();
  } else {
    __shfl_xor_sync(kAll, 1, 1);
  }
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void write_same(float* out) {
  if (threadIdx.x == 0) {
    *out = float(blockIdx.x);
  }
}

// Right, though ThreadSanitizer would see a race here if two blocks ran on the same stacks.
__global__ void local_array(float* out) {
  volatile float local[16];
  for (int i = 0; i < 16; ++i) {
    local[i] = float(i);
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = local[threadIdx.x % 16];
}

enum class Defect {
  none,
  shared_read_outside,
  shared_write_outside,
  shared_read_before,
  global_read_outside,
  global_write_outside,
  shared_uninitialised,
  misaligned,
  different_barriers,
  return_before_barrier,
  return_at_barrier,
  mask_of_returned,
  return_inside_mask,
  mask_without_caller,
  read_outside_mask,
  masks_disagree,
  places_disagree,
  deadlock,
};

__global__ void defective(Defect defect, const float* in, float* out) {
  FASTMTL_DYNAMIC_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  const unsigned t = threadIdx.x, n = blockDim.x, lane = t % 32;
  float v = 1;
  shared[t] = in[t];
  __syncthreads();
  switch (defect) {
    case Defect::none:
      break;
    case Defect::shared_read_outside: // of the half that was written, one of them outside of the memory
      v = shared[2 * t + 2];
      break;
    case Defect::shared_write_outside:
      shared[2 * t + 2] = 1;
      break;
    case Defect::shared_read_before:
      v = shared[int(t) - 1];
      break;
    case Defect::global_read_outside:
      v = in[t + 1];
      break;
    case Defect::global_write_outside:
      out[t + 1] = v;
      break;
    case Defect::shared_uninitialised:
      v = shared[n + t];
      break;
    case Defect::misaligned:
      v = __ldg(reinterpret_cast<const float4*>(in + 1)).x;
      break;
    case Defect::different_barriers:
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Defect::return_before_barrier:
      if (t == 7) {
        return;
      }
      __syncthreads();
      break;
    case Defect::return_at_barrier:
      if (t != 7) {
        __syncthreads();
      }
      return;
    case Defect::mask_of_returned:
      if (lane == 7) {
        return;
      }
      __shfl_xor_sync(kAll, v, 1);
      break;
    case Defect::return_inside_mask:
      if (lane != 7) {
        __ballot_sync(kAll, 1);
      }
      return;
    case Defect::mask_without_caller:
      __syncwarp(1u << 3);
      break;
    case Defect::read_outside_mask:
      if (lane < 16) {
        v = __shfl_sync(0xffff, v, 16);
      }
      break;
    case Defect::masks_disagree:
      __shfl_xor_sync(lane < 16 ? kAll : 0xffff0001, v, 0);
      break;
    case Defect::places_disagree:
      if (lane < 16) {
        __shfl_xor_sync(kAll, v, 1);
      } else {
        __shfl_xor_sync(kAll, v, 1);
      }
      break;
    case Defect::deadlock:
      if (lane < 16) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      break;
  }
  out[t] = v;
}

py::array_t<float> run_defective(Defect defect) {
  const unsigned threads = 64;
  py::array_t<float> in(threads), out(threads);
  std::fill_n(in.mutable_data(), threads, 1.f);
  FASTMTL_LAUNCH(defective, 1, threads, 2 * threads * sizeof(float), nullptr, defect, in.data(), out.mutable_data());
  return out;
}

} // namespace

PYBIND11_MODULE(toys, m) {
  m.def("set_order", [](const std::string& order, uint64_t seed) { host_cuda::set_order(order, seed); });
  m.def("set_shared_limit", &host_cuda::set_shared_limit);
  m.def("reset_launches", &host_cuda::reset_launches);
  m.def("launches", [] {
    py::list list;
    for (const host_cuda::LaunchRecord& r : host_cuda::launches()) {
      list.append(
          py::make_tuple(
              r.kernel,
              py::make_tuple(r.grid.x, r.grid.y, r.grid.z),
              py::make_tuple(r.block.x, r.block.y, r.block.z),
              r.shared_bytes));
    }
    return list;
  });

  m.def("collectives", [](const std::string& type) {
    return type == "float"    ? run_collectives<float>()
           : type == "double" ? run_collectives<double>()
           : type == "int"    ? run_collectives<int>()
           : type == "uint"   ? run_collectives<unsigned>()
                              : run_collectives<int64_t>();
  });
  m.def("partial_warp", [] {
    py::array_t<int> out(40);
    FASTMTL_LAUNCH(partial_warp, 1, 40, 0, nullptr, out.mutable_data());
    return out;
  });
  m.def("indices", [] {
    py::array_t<unsigned> out(24 * 60);
    std::fill_n(out.mutable_data(), out.size(), 0);
    FASTMTL_LAUNCH(indices, dim3(2, 3, 4), dim3(3, 4, 5), 0, nullptr, out.mutable_data());
    return out;
  });
  m.def("intrinsics", [] {
    py::array_t<double> out(9);
    const float4 a{1, 2, 3, 4};
    const double2 b{5, 7};
    const uint4 c{0xff, 8, 1, 0};
    float2 d;
    FASTMTL_LAUNCH(intrinsics, 1, 1, 0, nullptr, out.mutable_data(), &a, &b, &c, &d);
    return out;
  });
  m.def("last_block_sum", &run_last_block_sum<true, true>);
  m.def("last_block_sum_without_fence_before", &run_last_block_sum<false, true>);
  m.def("last_block_sum_without_fence_after", &run_last_block_sum<true, false>);
  m.def("count", [] {
    unsigned total = 0;
    int down = 0;
    FASTMTL_LAUNCH(count, 5, 100, 0, nullptr, &total, &down);
    return py::make_tuple(total, down);
  });
  m.def("spin", [](unsigned threads, int barriers, int shuffles) {
    std::vector<unsigned> out(threads);
    FASTMTL_LAUNCH(spin, 1, threads, 0, nullptr, barriers, shuffles, out.data());
  });
  m.def("empty", [](std::array<unsigned, 3> grid, std::array<unsigned, 3> block, size_t shared) {
    FASTMTL_LAUNCH(nothing, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared, nullptr);
  });

  m.def("rotate", &run_rotate);
  m.def("exchange_in_warp", [](bool syncwarp) {
    py::array_t<float> out(64);
    FASTMTL_LAUNCH(exchange_in_warp, 1, 64, 64 * sizeof(float), nullptr, out.mutable_data(), syncwarp);
    return out;
  });
  m.def("write_same", [](unsigned blocks) {
    float out = 0;
    FASTMTL_LAUNCH(write_same, blocks, 32, 0, nullptr, &out);
    return out;
  });
  m.def("local_array", [] {
    py::array_t<float> out(4 * 32);
    FASTMTL_LAUNCH(local_array, 4, 32, 0, nullptr, out.mutable_data());
    return out;
  });

  py::enum_<Defect>(m, "Defect")
      .value("none", Defect::none)
      .value("shared_read_outside", Defect::shared_read_outside)
      .value("shared_write_outside", Defect::shared_write_outside)
      .value("shared_read_before", Defect::shared_read_before)
      .value("global_read_outside", Defect::global_read_outside)
      .value("global_write_outside", Defect::global_write_outside)
      .value("shared_uninitialised", Defect::shared_uninitialised)
      .value("misaligned", Defect::misaligned)
      .value("different_barriers", Defect::different_barriers)
      .value("return_before_barrier", Defect::return_before_barrier)
      .value("return_at_barrier", Defect::return_at_barrier)
      .value("mask_of_returned", Defect::mask_of_returned)
      .value("return_inside_mask", Defect::return_inside_mask)
      .value("mask_without_caller", Defect::mask_without_caller)
      .value("read_outside_mask", Defect::read_outside_mask)
      .value("masks_disagree", Defect::masks_disagree)
      .value("places_disagree", Defect::places_disagree)
      .value("deadlock", Defect::deadlock);
  m.def("defective", &run_defective);
}
