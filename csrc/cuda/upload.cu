#include <cstring>

#include "kernels.h"
#include "source.cuh"

namespace fastmtl::cuda {

void launch_upload(const uint64_t* words, int64_t count, uint64_t* table, cudaStream_t stream) {
  while (count > 0) {
    const int part = int(count < kManyWords ? count : kManyWords);
    if (part <= kFewWords) {
      Words<kFewWords> few{};
      memcpy(few.word, words, size_t(part) * 8);
      FASTMTL_LAUNCH(upload<kFewWords>, dim3(1), dim3(256), 0, stream, few, part, table);
    } else {
      Words<kManyWords> many;
      memcpy(many.word, words, size_t(part) * 8);
      FASTMTL_LAUNCH(upload<kManyWords>, dim3(4), dim3(256), 0, stream, many, part, table);
    }
    words += part;
    table += part;
    count -= part;
  }
}

} // namespace fastmtl::cuda
