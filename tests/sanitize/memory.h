// Memory of exactly the size that is asked for: what lies around it is poisoned for AddressSanitizer, and written with
// a pattern that must be there at the end, which also finds what no sanitizer sees (stores past the cache).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FASTMTL_POISON(p, n) __asan_poison_memory_region(p, n)
#define FASTMTL_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define FASTMTL_POISON(p, n) (void)(p), (void)(n)
#define FASTMTL_UNPOISON(p, n) (void)(p), (void)(n)
#endif

inline std::string current_case;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s: %s\n", current_case.c_str(), what.c_str());
  std::exit(1);
}

inline void check(bool good, const char* what) {
  if (!good) {
    fail(what);
  }
}

// `bytes` bytes that begin `offset` bytes after an address aligned to 128, all ones to begin with: NaN in every format.
class Block {
 public:
  explicit Block(int64_t bytes, int64_t offset = 0) : before_(kGuard + size_t(offset)), bytes_(size_t(bytes)) {
    size_ = (before_ + bytes_ + 2 * kGuard - 1) / kGuard * kGuard;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(kGuard, size_));
    std::memset(base_, kPattern, size_);
    std::memset(base_ + before_, 0xff, bytes_);
    FASTMTL_POISON(base_, before_);
    FASTMTL_POISON(base_ + before_ + bytes_, size_ - before_ - bytes_);
  }
  Block(Block&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), before_(other.before_), bytes_(other.bytes_), size_(other.size_) {}
  Block& operator=(Block&&) = delete;

  ~Block() {
    if (!base_) {
      return;
    }
    FASTMTL_UNPOISON(base_, size_);
    for (size_t i = 0; i < size_; ++i) {
      if (base_[i] != kPattern && (i < before_ || i >= before_ + bytes_)) {
        fail(
            "written " + std::to_string(int64_t(i) - int64_t(before_)) + " bytes from the start of a buffer of " +
            std::to_string(bytes_));
      }
    }
    std::free(base_);
  }

  void* get() const {
    return base_ + before_;
  }
  size_t bytes() const {
    return bytes_;
  }

 private:
  static constexpr size_t kGuard = 128;
  static constexpr unsigned char kPattern = 0x5a;

  unsigned char* base_;
  size_t before_, bytes_, size_;
};

// `count` elements, `offset` elements after an aligned address.
template <class X>
class Exact {
 public:
  explicit Exact(int64_t count, int64_t offset = 0)
      : block_(count * int64_t(sizeof(X)), offset * int64_t(sizeof(X))), count_(count) {}

  operator X*() const {
    return static_cast<X*>(block_.get());
  }
  int64_t count() const {
    return count_;
  }
  bool same_bits(const Exact& other) const {
    return std::memcmp(block_.get(), other.block_.get(), block_.bytes()) == 0;
  }

 private:
  Block block_;
  int64_t count_;
};
