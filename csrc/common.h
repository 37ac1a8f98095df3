// Small things that every part uses.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmtl {

// `count` uninitialised elements, on the stack while they are few.
template <class X, int64_t kInline>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    if (count > kInline) {
      heap_.resize(size_t(count));
      data_ = heap_.data();
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  X* get() {
    return data_;
  }
  X& operator[](int64_t i) {
    return data_[i];
  }

 private:
  X inline_[size_t(kInline)];
  std::vector<X> heap_;
  X* data_ = inline_;
};

// The first address from p on that a vector register is loaded from at once; there are eight doubles to spare.
inline double* aligned(double* p) {
  return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}

} // namespace fastmtl
