// Walking the columns of a ragged gradient matrix in blocks that never straddle two segments.
#pragma once

namespace fastmtl::cpu {
namespace {

struct Block {
  const Segment* segment = nullptr;
  int64_t begin = 0; // within the segment
  int64_t length = 0;
  int64_t chunk = 0; // which of the chunks it belongs to
};

// Blocks of at most `limit` columns, in order, over chunks [first, last) with column bounds `bounds`.
class BlockCursor {
 public:
  BlockCursor(const Gradients& G, const int64_t* bounds, int64_t first, int64_t last, int64_t limit)
      : segment_(G.segments),
        end_(G.segments + G.count),
        bounds_(bounds),
        chunk_(first),
        last_(last),
        limit_(limit),
        column_(bounds[first]) {
    int64_t skip = column_;
    while (segment_ != end_ && skip >= segment_->length) {
      skip -= segment_->length;
      ++segment_;
    }
    offset_ = skip;
  }

  bool next(Block& block) {
    while (chunk_ < last_ && column_ >= bounds_[chunk_ + 1]) {
      ++chunk_;
    }
    while (segment_ != end_ && offset_ == segment_->length) {
      ++segment_;
      offset_ = 0;
    }
    if (chunk_ >= last_ || segment_ == end_) {
      return false;
    }
    const int64_t in_segment = segment_->length - offset_, in_chunk = bounds_[chunk_ + 1] - column_;
    int64_t length = in_segment < in_chunk ? in_segment : in_chunk;
    if (length > limit_) { // even blocks rather than a short last one
      const int64_t blocks = (length + limit_ - 1) / limit_;
      const int64_t even = ((length + blocks - 1) / blocks + 63) / 64 * 64;
      length = even < limit_ ? even : limit_;
    }
    block = {segment_, offset_, length, chunk_};
    offset_ += length;
    column_ += length;
    return true;
  }

 private:
  const Segment* segment_;
  const Segment* end_;
  const int64_t* bounds_;
  int64_t chunk_, last_, limit_, column_, offset_ = 0;
};

template <class E>
FASTMTL_INLINE const E* row(const Block& block, int64_t t) {
  const E* p = static_cast<const E*>(block.segment->rows[t]);
  return p ? p + block.begin : nullptr;
}

// Calls f with a null pointer of the segment's element type.
template <class F>
FASTMTL_INLINE void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<const float*>(nullptr));
    case Dtype::f64:
      return f(static_cast<const double*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<const bf16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<const f16*>(nullptr));
  }
}

} // namespace
} // namespace fastmtl::cpu
