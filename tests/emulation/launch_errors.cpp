// csrc/cuda/platform.h on a runtime whose calls fail: an error is thrown, and nobody else finds it.
#include "cuda/platform.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

void kernel(int) {}

void expect(bool good, const char* what) {
  if (!good) {
    std::printf("FAILED: %s\n", what);
    std::exit(1);
  }
}

template <class F>
void fails(F&& call, const char* with) {
  bool thrown = false;
  try {
    call();
  } catch (const std::runtime_error& error) {
    thrown = std::strstr(error.what(), "fastmtl: CUDA error: ") && std::strstr(error.what(), with);
  }
  expect(thrown, "an error in the library's words");
  expect(runtime::last == cudaSuccess, "the next check of someone else finds no error");
}

} // namespace

int main() {
  const auto launch = [](size_t shared) { FASTMTL_LAUNCH(kernel, dim3{1}, dim3{32}, shared, nullptr, 1); };
  launch(0);
  launch(100 << 10);
  expect(runtime::launches == 2, "kernels are launched");
  runtime::launch = cudaErrorInvalidConfiguration;
  fails([&] { launch(0); }, "invalid configuration argument");
  runtime::launch = cudaSuccess;
  runtime::attribute = cudaErrorInvalidValue;
  fails([&] { launch(100 << 10); }, "invalid argument");
  launch(0); // asks for nothing
  expect(runtime::launches == 3, "what failed did not run");
  fails([] { fastmtl::cuda::check(cudaErrorInvalidValue); }, "invalid argument");
  std::printf("all hold\n");
}
