// Where the gradients lie: T rows of K tensors, read in place, and how their columns are shared out over blocks.
//
// A flat matrix (or a batch of them) is a base address and strides. A ragged list is a table in device memory, one
// record a tensor, that `upload` writes from kernel arguments: no copy from host memory, so nothing waits and a CUDA
// graph holds the table by value.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fastmtl::cuda {

// The columns of every tensor are cut into tiles; a block works on a run of tiles. It is a multiple of every vector.
constexpr int64_t kTileColumns = 512;

// A record of the table: the words below, then the T addresses of the rows (0 where a task has no gradient).
enum RecordWord { kFirstTile, kFirstColumn, kLength, kOut, kHead, kRows0 };

struct Source {
  int64_t tasks;                 // T
  int64_t tiles;                 // of one matrix
  int64_t segments;              // tensors; 1 where there is no table
  const uint64_t* table;         // [segments, kRows0 + T], or null: then
  const char* base;              // row t of matrix b is at base + b * next_matrix + t * next_row
  int64_t next_row, next_matrix; // bytes
  int64_t length;                // columns
  char* out;                     // result of matrix b at out + b * next_out, or null
  int64_t next_out;              // bytes
  int64_t head;                  // columns before the first one that lies on a multiple of 16 bytes in every row and
                                 // the result, -1 where they are not alike

  __device__ const uint64_t* record(int64_t segment) const {
    return table + segment * (kRows0 + tasks);
  }
};

// A stretch of columns of one tensor.
struct Piece {
  int64_t segment, begin, end; // columns
  int64_t head;                // of these columns, as of Source
};

// The columns [begin, end) of a piece, of which [0, to) are the whole vectors of its rows and result: counted from the
// first of those on, and from the piece's begin where they are not alike. That these numbers are short spares
// registers; a piece that they do not hold would be larger than any memory.
template <class scalar>
struct Whole {
  int64_t from; // of the segment, where 0 is
  int begin, to, end;

  __device__ explicit Whole(const Piece& piece) {
    constexpr int kV = 16 / int(sizeof(scalar));
    const bool alike = piece.head >= 0 && piece.begin + piece.head < piece.end;
    from = piece.begin + (alike ? piece.head : 0);
    begin = int(piece.begin - from);
    end = int(piece.end - from);
    to = alike ? end - end % kV : 0;
  }

  template <class X>
  __device__ X* row(X* x) const {
    return x ? x + from : nullptr;
  }

  // Where a stage of so many columns that begins at `at` ends: what is before the vectors is one of its own.
  __device__ int stage_end(int at, int columns) const {
    return at < 0 ? 0 : at + columns < end ? at + columns : end;
  }
};

// Address of row t, null where the task has no gradient.
template <class scalar>
__device__ const scalar* row_of(const Source& source, int64_t b, int64_t segment, int64_t t) {
  if (t >= source.tasks) {
    return nullptr;
  }
  if (source.table) {
    return reinterpret_cast<const scalar*>(source.record(segment)[kRows0 + t]);
  }
  return reinterpret_cast<const scalar*>(source.base + b * source.next_matrix + t * source.next_row);
}

template <class scalar>
__device__ scalar* out_of(const Source& source, int64_t b, int64_t segment) {
  if (source.table) {
    return reinterpret_cast<scalar*>(source.record(segment)[kOut]);
  }
  return reinterpret_cast<scalar*>(source.out + b * source.next_out);
}

// How many columns come before those of this segment, counted over the matrices of a batch or over all segments of a
// list, those of other types too.
inline __device__ int64_t first_column(const Source& source, int64_t b, int64_t segment) {
  return source.table ? int64_t(source.record(segment)[kFirstColumn]) : b * source.length;
}

// Walks the pieces of tiles [tile, last); every thread of a block walks alike.
class Pieces {
 public:
  __device__ Pieces(const Source& source, int64_t first, int64_t last) : source_(source), tile_(first), last_(last) {
    if (source.table) { // the last segment that starts at or before the first tile
      int64_t low = 0, high = source.segments;
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (int64_t(source.record(middle)[kFirstTile]) <= first ? low : high) = middle;
      }
      segment_ = low;
    }
  }

  __device__ bool next(Piece& piece) {
    if (tile_ >= last_) {
      return false;
    }
    int64_t first = 0, length = source_.length, end = source_.tiles;
    int64_t head = source_.head;
    if (source_.table) {
      // Segments without columns have no tiles: they start where their successor does.
      while (segment_ + 1 < source_.segments && int64_t(source_.record(segment_ + 1)[kFirstTile]) <= tile_) {
        ++segment_;
      }
      const uint64_t* record = source_.record(segment_);
      first = int64_t(record[kFirstTile]);
      length = int64_t(record[kLength]);
      head = int64_t(record[kHead]);
      end = segment_ + 1 < source_.segments ? int64_t(source_.record(segment_ + 1)[kFirstTile]) : source_.tiles;
    }
    end = end < last_ ? end : last_;
    piece.segment = segment_;
    // Pieces but the first of a segment begin with a vector; the last one may then be empty.
    const int64_t shift = head > 0 ? head : 0;
    const int64_t from = tile_ > first ? (tile_ - first) * kTileColumns + shift : 0;
    const int64_t to = (end - first) * kTileColumns + shift;
    piece.begin = from < length ? from : length;
    piece.end = to < length ? to : length;
    piece.head = from > 0 && head > 0 ? 0 : head;
    tile_ = end;
    return true;
  }

 private:
  const Source& source_;
  int64_t tile_, last_, segment_ = 0;
};

// The run of tiles of block `block` of `blocks`.
struct Run {
  int64_t first, last;
  __device__ Run(int64_t tiles, int64_t block, int64_t blocks)
      : first(tiles * block / blocks), last(tiles * (block + 1) / blocks) {}
};

// As many words as fit kernel arguments (32764 bytes since CUDA 12.1), and few for short lists.
template <int kWords>
struct Words {
  uint64_t word[kWords];
};
constexpr int kFewWords = 440, kManyWords = 4080;

// table[i] = words[i]: 8 bytes written a word.
template <int kWords>
__global__ __launch_bounds__(256) void upload(const __grid_constant__ Words<kWords> words, int count, uint64_t* table) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += int(gridDim.x * blockDim.x)) {
    table[i] = words.word[i];
  }
}

} // namespace fastmtl::cuda
