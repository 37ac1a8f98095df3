#include "pipeline.h"

#include <algorithm>
#include <memory>

namespace fastmtl::cuda {

namespace {

// One block does a matrix of at most this many entries in the time that three launches take; in a batch there are
// enough blocks for larger ones.
constexpr int64_t kSmallEntries = int64_t(1) << 15, kSmallEntriesInBatch = int64_t(1) << 20, kManyMatrices = 64;
// Partial sums may take this much memory.
constexpr int64_t kPartialBytes = int64_t(32) << 20;

template <class F>
void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::f64:
      return f(double{});
    case Dtype::bf16:
      return f(bfloat16{});
    case Dtype::f16:
      return f(float16{});
  }
}

// Columns from an address to the next multiple of 16.
int64_t head_of(uint64_t address, Dtype dtype) {
  return int64_t(-address % 16) / element_size(dtype);
}

int64_t tiles_of(int64_t columns) {
  return (columns + kTileColumns - 1) / kTileColumns;
}

GramPlan plan_of(const Batch& G, bool exact, const Context& context) {
  const int64_t T = G.tasks();
  // Float64 tensor cores multiply as fast as float32 does elsewhere, and spare a second pass over G and the probe.
  // Where float64 is slow, and for the blocks off the diagonal beyond 64 tasks, float32 comes first.
  // Without columns there is nothing to measure.
  const bool blocks = !exact && G.columns() > 0 && !G.has(Dtype::f64) && T > (context.slow_float64 ? 8 : kGroupRows);
  int rows = T <= 2 ? 2 : T <= 4 ? 4 : 8;
  if (blocks) {
    rows = T <= 16 ? 16 : T <= 32 ? 32 : kGroupRows;
  } else if (T > 8) {
    rows = T <= 48 ? int(T + 7) / 8 * 8 : kGroupRows;
  }
  return {rows, blocks, (T + kGroupRows - 1) / kGroupRows};
}

// Blocks that share the tiles of one matrix: a function of the shapes alone, so that the order of the sums does not
// depend on the GPU (within one instruction of gram_groups it may).
int64_t blocks_of(const GramPlan& plan, int64_t tiles, int64_t B, int64_t bytes) {
  const int64_t enough = plan.rows <= 8 ? 256 : 512;
  // Every block ends with sums worth several tiles, and leaves a partial; those of many rows are large.
  const int64_t wanted = plan.rows <= 16 ? std::clamp<int64_t>(tiles / 4, enough, 1024) : enough;
  return std::max<int64_t>(1, std::min({tiles, wanted / B, kPartialBytes / bytes}));
}

double* global_scratch(int64_t B, int64_t count, size_t shared, const Context& context) {
  return int64_t(shared) <= context.shared_limit ? nullptr : allocate<double>(context, B * count);
}

void balance(
    const double* M,
    int64_t B,
    int64_t T,
    const Policy& policy,
    Judge judge,
    Pass pass,
    const double* bound,
    const Weights& weights,
    Verdict* verdict,
    double* gram,
    const Context& context) {
  double* scratch = global_scratch(B, balance_scratch(T), balance_shared(T, true), context);
  launch_balance(M, B, T, policy, judge, pass, bound, scratch, weights, verdict, gram, context.stream);
}

void mend(const Batch& G, Pass pass, double* M, const Context& context) {
  if (G.with_missing().count > 0) {
    launch_mend(G.with_missing(), pass, G.tasks(), M, context.stream);
  }
}

bool is_small(const Batch& G) {
  const int64_t entries = std::max<int64_t>(G.tasks(), 8) * G.columns(); // 8 rows take as long as fewer
  return G.parts().size() == 1 && G.tasks() <= kMaxSmallTasks &&
         entries <= (G.matrices() >= kManyMatrices ? kSmallEntriesInBatch : kSmallEntries);
}

} // namespace

Batch::Batch(
    const char* base,
    int64_t B,
    int64_t T,
    int64_t P,
    int64_t next_matrix,
    int64_t next_row,
    char* out,
    int64_t next_out,
    Dtype dtype)
    : B_(B), T_(T), P_(P) {
  Source source{};
  source.tasks = T;
  source.tiles = tiles_of(P);
  source.segments = 1;
  source.base = base;
  source.next_row = next_row;
  source.next_matrix = next_matrix;
  source.length = P;
  source.out = out;
  source.next_out = next_out;
  const auto address = reinterpret_cast<uintptr_t>(base), result = reinterpret_cast<uintptr_t>(out);
  const bool alike = (!out || (address - result) % 16 == 0) && (T == 1 || next_row % 16 == 0) &&
                     (B == 1 || (next_matrix % 16 == 0 && (!out || next_out % 16 == 0)));
  source.head = alike ? head_of(address, dtype) : -1;
  parts_.push_back({dtype, source});
}

Batch::Batch(const Gradients& G, const Context& context) : B_(1), T_(G.tasks), P_(0) {
  const int64_t record = kRows0 + T_;
  constexpr int kTypes = 4;
  int64_t segments[kTypes] = {};
  for (int64_t k = 0; k < G.count; ++k) {
    segments[int(G.segments[k].dtype)] += G.segments[k].length > 0;
  }
  // The tables of the types follow each other.
  Source source[kTypes] = {};
  int64_t next[kTypes], count = 0; // where in the words the next record of a type goes, and how many there are
  for (int d = 0; d < kTypes; ++d) {
    source[d].tasks = T_;
    next[d] = count;
    count += segments[d] * record;
  }
  if (count == 0) {
    return;
  }
  const std::unique_ptr<uint64_t[]> words(new uint64_t[size_t(count)]);
  bool missing = false;
  for (int64_t k = 0; k < G.count; ++k) {
    const Segment& segment = G.segments[k];
    if (segment.length == 0) {
      continue;
    }
    const int d = int(segment.dtype);
    uint64_t* to = words.get() + next[d];
    next[d] += record;
    const uint64_t result = reinterpret_cast<uintptr_t>(segment.out);
    uint64_t some = result, differ = 0; // an address, and in which bits others differ from it
    for (int64_t t = 0; t < T_; ++t) {
      const uint64_t row = reinterpret_cast<uintptr_t>(segment.rows[t]);
      to[kRows0 + t] = row;
      missing |= row == 0;
      some = some ? some : row;
      differ |= row ? row ^ some : 0;
    }
    to[kFirstTile] = uint64_t(source[d].tiles);
    to[kFirstColumn] = uint64_t(P_);
    to[kLength] = uint64_t(segment.length);
    to[kOut] = result;
    to[kHead] = uint64_t(differ % 16 == 0 ? head_of(some, segment.dtype) : -1);
    source[d].tiles += tiles_of(segment.length);
    source[d].segments += 1;
    P_ += segment.length;
  }
  uint64_t* table = allocate<uint64_t>(context, count);
  launch_upload(words.get(), count, table, context.stream);
  for (int d = 0; d < kTypes; ++d) {
    if (segments[d] > 0) {
      source[d].table = table + next[d] - segments[d] * record;
      parts_.push_back({Dtype(d), source[d]});
      if (missing) {
        with_missing_.part[with_missing_.count] = source[d];
        with_missing_.dtype[with_missing_.count++] = Dtype(d);
      }
    }
  }
}

bool Batch::has(Dtype dtype) const {
  return std::any_of(parts_.begin(), parts_.end(), [&](const Part& part) { return part.dtype == dtype; });
}

GramResult gram(const Batch& G, bool exact, Pass pass, double* M, const Context& context) {
  const int64_t B = G.matrices(), T = G.tasks();
  const GramPlan plan = plan_of(G, exact, context);
  const Judge judge = plan.blocks ? Judge::blocks : G.has(Dtype::f64) ? Judge::range : Judge::none;
  const GramResult result{judge, judge == Judge::none ? nullptr : allocate<double>(context, B)};
  if (B == 0) {
    return result;
  }
  const int64_t diagonal_slot = plan.diagonal_layout().values() + 1, pairs_slot = plan.pair_layout().values() + 1;
  const int64_t bytes = B * int64_t(sizeof(double)) * (plan.diagonal * diagonal_slot + plan.pairs() * pairs_slot);
  std::vector<int64_t> blocks;
  int64_t all = 0;
  for (const Batch::Part& part : G.parts()) {
    blocks.push_back(part.source.tiles ? blocks_of(plan, part.source.tiles, B, bytes) : 0);
    all += blocks.back();
  }
  const Partials partials{
      allocate<double>(context, B * plan.diagonal * all * diagonal_slot),
      allocate<double>(context, B * plan.pairs() * all * pairs_slot),
      all};
  const auto each_part = [&](auto&& launch) {
    int64_t first = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i] > 0) {
        with_type(G.parts()[i].dtype, [&](auto scalar) { launch(scalar, G.parts()[i].source, first, blocks[i]); });
      }
      first += blocks[i];
    }
  };
  each_part([&](auto scalar, const Source& source, int64_t first, int64_t own) {
    launch_gram<decltype(scalar)>(source, B, plan, pass, first, own, partials, context.stream);
  });
  launch_reduce(plan, pass, B, T, partials, M, judge == Judge::range ? result.bound : nullptr, context.stream);
  if (judge == Judge::blocks) {
    float* z = allocate<float>(context, B * T * kProbes);
    double* partial = allocate<double>(context, B * all * T * kProbes);
    launch_probe_vectors(M, B, T, z, context.stream);
    each_part([&](auto scalar, const Source& source, int64_t first, int64_t own) {
      launch_probe<decltype(scalar)>(source, B, z, first, own, all, partial, context.stream);
    });
    launch_probe_bound(M, B, T, z, all, partial, result.bound, context.stream);
  } else { // of blocks that are not finite an exact pass is to come
    mend(G, pass, M, context);
  }
  return result;
}

bool in_one_block(int64_t T, const Context& context) {
  return T <= kMaxJacobiTasks && int64_t(balance_shared(T, false)) <= context.shared_limit;
}

void balance(
    const double* M,
    int64_t B,
    int64_t T,
    const Policy& policy,
    const Weights& weights,
    const Context& context) {
  if (B > 0) {
    balance(M, B, T, policy, Judge::none, {}, nullptr, weights, nullptr, nullptr, context);
  }
}

void combine(const Batch& G, const double* alpha, const Context& context) {
  for (const Batch::Part& part : G.parts()) {
    if (part.source.tiles > 0 && G.matrices() > 0) {
      with_type(part.dtype, [&](auto scalar) {
        launch_combine<decltype(scalar)>(part.source, G.matrices(), alpha, context.stream);
      });
    }
  }
}

void sign_drop(const Batch& G, const int64_t* seed, const double* leak, const Context& context) {
  for (const Batch::Part& part : G.parts()) {
    if (part.source.tiles > 0 && G.matrices() > 0) {
      with_type(part.dtype, [&](auto scalar) {
        launch_sign_drop<decltype(scalar)>(part.source, G.matrices(), seed, leak, context.stream);
      });
    }
  }
}

void align(const Batch& G, const Policy& policy, double* M, const Weights& weights, const Context& context) {
  const int64_t B = G.matrices(), T = G.tasks();
  if (B == 0) {
    return;
  }
  if (is_small(G)) {
    with_type(G.parts()[0].dtype, [&](auto scalar) {
      launch_align_small<decltype(scalar)>(G.parts()[0].source, B, policy, M, weights, context.stream);
    });
    if (M) {
      mend(G, {}, M, context);
    }
    return;
  }
  Weights kept = weights;
  if (!M) {
    M = allocate<double>(context, B * T * T);
    kept = {allocate<double>(context, B * T), nullptr, allocate<int64_t>(context, B)};
  }
  const GramResult first = gram(G, false, {}, M, context);
  Verdict* verdict = first.judge == Judge::none ? nullptr : allocate<Verdict>(context, B);
  balance(M, B, T, policy, first.judge, {}, first.bound, kept, verdict, nullptr, context);
  if (verdict) { // kernels that do nothing where the verdict is good
    const Pass pass{verdict};
    double* again = allocate<double>(context, B * T * T);
    gram(G, true, pass, again, context);
    balance(again, B, T, policy, Judge::none, pass, nullptr, kept, nullptr, M, context);
  }
  combine(G, kept.alpha, context);
}

void eigh(const double* M, int64_t B, int64_t T, double* eigenvalues, double* eigenvectors, const Context& context) {
  if (B > 0) {
    double* scratch = global_scratch(B, T * T, jacobi_shared(T, true), context);
    launch_eigh(M, B, T, eigenvalues, eigenvectors, scratch, context.stream);
  }
}

} // namespace fastmtl::cuda
