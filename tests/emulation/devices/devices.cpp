// Every op of the CUDA extension with tensors of cuda:1 while another device is current: whatever happens has to happen
// on cuda:1 and its current stream, and the device that was current is so again, also after an error. One tensor on
// cuda:2 is an error that names both, before anything is launched.
#include "torch.h"

#include <algorithm>
#include <cstdio>
#include <functional>

namespace {

using devices::state;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;

constexpr int kHere = 1, kElsewhere = 2;
int failures = 0;

void expect(bool good, const std::string& what) {
  if (!good) {
    std::printf("FAILED: %s\n", what.c_str());
    ++failures;
  }
}

// Tensors of a call: all of them here, but for the one that is told not to be.
struct Tensors {
  int64_t T;
  ScalarType type;
  bool views; // gradients and results whose columns are no neighbours
  int odd = -1, count = 0;
  std::vector<Tensor>* kept = nullptr; // the same ones again, if they are there

  Tensor operator()(const std::vector<int64_t>& sizes, ScalarType type, bool view = false) {
    std::vector<int64_t> strides;
    if (view) {
      strides.assign(sizes.size(), 2);
      for (size_t i = sizes.size(); i-- > 1;) {
        strides[i - 1] = strides[i] * sizes[i];
      }
    }
    const int n = count++;
    if (kept && size_t(n) < kept->size()) {
      return (*kept)[size_t(n)];
    }
    const Tensor made = fake::tensor(n == odd ? kElsewhere : kHere, sizes, type, strides);
    if (kept) {
      kept->push_back(made);
    }
    return made;
  }
  Tensor matrix(int64_t P) {
    return (*this)({T, P}, type, views);
  }
  Tensor result(int64_t P) {
    return (*this)({P}, type, views);
  }
  Tensor gram() {
    return (*this)({T, T}, ScalarType::Double);
  }
  Tensor doubles(const std::vector<int64_t>& sizes) {
    return (*this)(sizes, ScalarType::Double);
  }
  Tensor seed() {
    return (*this)({}, ScalarType::Long);
  }
  std::vector<std::optional<Tensor>> rows() { // T rows of three tensors, one of them missing
    std::vector<std::optional<Tensor>> list;
    for (int64_t t = 0; t < T; ++t) {
      list.emplace_back((*this)({7, 5}, type, views));
      list.emplace_back(t == 1 ? std::nullopt : std::optional((*this)({600}, type)));
      list.emplace_back((*this)({1}, ScalarType::Float));
    }
    return list;
  }
  std::vector<Tensor> results() {
    return {(*this)({7, 5}, type, views), (*this)({600}, type), (*this)({1}, ScalarType::Float)};
  }
};

using Stack = std::vector<StableIValue>;

void policy(Stack& stack, Tensors& make) {
  stack.push_back(from(std::optional(make.doubles({make.T}))));
  stack.push_back(from(std::string("min")));
  stack.push_back(from(1e-3));
  stack.push_back(from(1e-7));
  stack.push_back(from(std::string("normalized")));
}

struct Case {
  uint64_t results;
  std::function<Stack(Tensors&)> arguments;
};

constexpr int64_t kColumns = 70'000;

const std::map<std::string, Case> kCases = {
    {"gram", {1, [](Tensors& make) { return Stack{from(make.matrix(kColumns))}; }}},
    {"gram_rows",
     {1, [](Tensors& make) { return Stack{from(make.rows()), from(make.T), from(std::optional(make.results()))}; }}},
    {"balance",
     {3,
      [](Tensors& make) {
        Stack stack{from(make.gram())};
        policy(stack, make);
        return stack;
      }}},
    {"align_gram",
     {2,
      [](Tensors& make) {
        Stack stack{from(make.gram())};
        policy(stack, make);
        return stack;
      }}},
    {"combine",
     {0,
      [](Tensors& make) {
        return Stack{from(make.matrix(kColumns)), from(make.doubles({make.T})), from(make.result(kColumns))};
      }}},
    {"combine_rows",
     {0, [](Tensors& make) { return Stack{from(make.rows()), from(make.doubles({make.T})), from(make.results())}; }}},
    {"sign_drop",
     {0,
      [](Tensors& make) {
        return Stack{
            from(make.matrix(kColumns)),
            from(make.seed()),
            from(std::optional(make.doubles({make.T}))),
            from(make.result(kColumns))};
      }}},
    {"sign_drop_rows",
     {0,
      [](Tensors& make) {
        return Stack{
            from(make.rows()),
            from(make.T),
            from(make.seed()),
            from(std::optional(make.doubles({make.T}))),
            from(make.results())};
      }}},
    {"align",
     {0,
      [](Tensors& make) {
        Stack stack{from(make.matrix(kColumns))};
        policy(stack, make);
        stack.push_back(from(make.result(kColumns)));
        return stack;
      }}},
    {"align_rows",
     {3,
      [](Tensors& make) {
        Stack stack{from(make.rows()), from(make.T)};
        policy(stack, make);
        stack.push_back(from(make.results()));
        return stack;
      }}},
    {"eigh", {2, [](Tensors& make) { return Stack{from(make.gram())}; }}},
    {"mgda", {2, [](Tensors& make) { return Stack{from(make.gram())}; }}},
    {"dual_cone",
     {2,
      [](Tensors& make) { return Stack{from(make.gram()), from(std::optional(make.doubles({make.T}))), from(true)}; }}},
    {"cagrad", {2, [](Tensors& make) { return Stack{from(make.gram()), from(0.5)}; }}},
    {"nash", {2, [](Tensors& make) { return Stack{from(make.gram()), from(1.0)}; }}},
    {"pcgrad", {1, [](Tensors& make) { return Stack{from(make.gram()), from(make.seed()), from(true)}; }}},
    {"gradvac",
     {1, [](Tensors& make) { return Stack{from(make.gram()), from(make.seed()), from(0.5), from(make.gram())}; }}},
};
// What the op says when it fails, else nothing; its results are given back.
std::string call(const std::string& op, const Case& of, Stack stack) {
  const size_t count = stack.size();
  stack.resize(std::max<size_t>(count, of.results));
  try {
    fake::ops().at(op)(stack.data(), count, of.results);
  } catch (const std::exception& error) {
    return error.what();
  }
  for (size_t i = 0; i < of.results; ++i) {
    const Tensor result = torch::stable::detail::to<Tensor>(stack[i]);
    expect(result.is_cuda() && result.get_device_index() == kHere, op + ": a result is elsewhere");
  }
  return "";
}

void run(const std::string& op, const Case& of, const Tensors& tensors) {
  const std::string name = op + ", T = " + std::to_string(tensors.T) + ", dtype " + std::to_string(int(tensors.type)) +
                           (tensors.views ? ", views" : "") + (state.slow_float64 ? ", slow float64" : "");
  const auto begin = [&](int expected) {
    state.wrong.clear();
    state.launches = state.allocations = state.calls = 0;
    state.fails_at = -1;
    state.expected = expected;
  };
  const auto end = [&](int before) {
    expect(state.current == before, name + ": another device is current than before");
    for (const std::string& what : state.wrong) {
      expect(false, name + ": " + what);
    }
    state.current = 0;
  };

  int launches = 0, count = 0;
  std::vector<Tensor> kept;            // what the library keeps of a call must not be used on another stream
  for (const int before : {0, 2, 1}) { // on a stream of its own each
    begin(kHere);
    state.current = before;
    state.streams[kHere] = reinterpret_cast<void*>(uintptr_t(0x100 + before));
    Tensors make = tensors;
    make.kept = &kept;
    Stack stack = of.arguments(make);
    count = make.count;
    const std::string error = call(op, of, std::move(stack));
    expect(error.empty(), name + ": " + error);
    launches = state.launches;
    expect(launches > 0 || (tensors.T > 64 && state.calls > 0), name + ": nothing was launched");
    end(before);
  }
  for (int at = 0; at < launches; ++at) { // a launch that fails
    begin(kHere);
    state.fails_at = at;
    Tensors make = tensors;
    expect(call(op, of, of.arguments(make)) == "the launch fails", name + ": a failed launch is not said");
    end(0);
  }
  // One tensor on another device, each of the first and last few and some of those between.
  for (int odd = 0; count > 1 && odd < count; odd += odd < 3 || odd + 5 >= count ? 1 : std::min(37, count - 5 - odd)) {
    begin(kHere);
    Tensors make = tensors;
    make.odd = odd;
    Stack stack = of.arguments(make);
    state.wrong.clear();
    const std::string error = call(op, of, std::move(stack));
    // The first tensor says where the others have to be.
    std::erase_if(state.wrong, [](const std::string& what) { return what.rfind("cudaDeviceGetAttribute", 0) == 0; });
    if (odd == 0 || (op == "combine_rows" && error.find("alpha") == std::string::npos)) {
      std::erase_if(state.wrong, [](const std::string& what) { return what.rfind("an allocation", 0) == 0; });
    }
    const bool named = error.find("cuda:1") != std::string::npos && error.find("cuda:2") != std::string::npos;
    expect(named, name + ": tensor " + std::to_string(odd) + " elsewhere: " + error);
    expect(state.launches == 0, name + ": something was launched all the same");
    end(0);
  }
}

} // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "idle") {
    return 0;
  }
  for (int device = 0; device < devices::kDevices; ++device) {
    state.streams[device] = reinterpret_cast<void*>(uintptr_t(0x10 * (device + 1)));
  }
  int ran = 0;
  for (const auto& [op, boxed] : fake::ops()) {
    const auto found = kCases.find(op);
    expect(found != kCases.end(), op + ": no case here; add its arguments");
    if (found == kCases.end()) {
      continue;
    }
    for (const bool slow : {false, true}) {
      state.slow_float64 = slow;
      for (const int64_t T : {2, 12, 40, 64, 70, 130}) {
        for (const ScalarType type : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
          if (type != ScalarType::Float && op.find("align") == std::string::npos && (slow || T != 12)) {
            continue; // enough of them
          }
          for (const bool views : {false, true}) {
            run(op, found->second, {T, type, views});
            ++ran;
          }
        }
      }
    }
  }
  for (const auto& [op, of] : kCases) {
    expect(fake::ops().count(op) == 1, op + ": is no op any more");
  }
  std::printf("%d calls of %zu ops, %d failures\n", ran, fake::ops().size(), failures);
  return failures > 0;
}
