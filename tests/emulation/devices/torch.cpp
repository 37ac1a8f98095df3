// A PyTorch with several GPUs, behind the C functions of its stable ABI: tensors without numbers, an allocator, device
// guards, streams and a dispatcher that makes results of the right shape. Device memory is address space alone.
#include "torch.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>

namespace devices {

State state;

namespace {

constexpr uint64_t kArena = 0x200000000000, kArenaBytes = uint64_t(1) << 36;

struct Allocation {
  uint64_t bytes;
  void* stream; // that was current when the library took it; null: the user's, who answers for it
};
std::map<uint64_t, Allocation> live;
uint64_t next[kDevices];

int device_of(uint64_t address) {
  const uint64_t device = (address - kArena) / kArenaBytes;
  return address >= kArena && device < kDevices ? int(device) : -1;
}

void say(const std::string& what) {
  state.wrong.push_back(what);
}

std::string on(int device) {
  return device < 0 ? "no device" : "cuda:" + std::to_string(device);
}

void check_address(const std::string& who, uint64_t address) {
  const int device = device_of(address);
  if (device < 0) {
    // A word that looks like an address of the host: no number of these tests does.
    if (address >> 40 == 0x7f || address >> 40 == 0x55 || address >> 40 == 0x56) {
      say(who + ": an address of the host");
    }
    return;
  }
  if (device != state.expected) {
    say(who + ": memory of " + on(device));
    return;
  }
  auto found = live.upper_bound(address);
  if (found == live.begin() || (--found, address > found->first + found->second.bytes)) {
    say(who + ": memory that was given back");
  } else if (found->second.stream && found->second.stream != state.streams[device]) {
    say(who + ": memory that another stream uses");
  }
}

void check_place(const std::string& who, void* stream) {
  if (state.current != state.expected) {
    say(who + ": " + on(state.current) + " is current");
  }
  if (state.expected >= 0 && stream != state.streams[state.expected]) {
    say(who + ": not on the current stream of " + on(state.expected));
  }
}

} // namespace

uint64_t allocate(int device, uint64_t bytes, bool users) {
  if (!next[0]) {
    void* arena = reinterpret_cast<void*>(kArena);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    if (mmap(arena, kDevices * kArenaBytes, PROT_NONE, flags, -1, 0) != arena) {
      throw std::runtime_error("no address space for the fake devices");
    }
    for (int d = 0; d < kDevices; ++d) {
      next[d] = kArena + uint64_t(d) * kArenaBytes;
    }
  }
  const uint64_t address = next[device];
  next[device] += (bytes + 1024) / 512 * 512;
  live[address] = {bytes, users ? nullptr : state.streams[device]};
  if (!users) {
    ++state.allocations;
    if (device != state.expected) {
      say("an allocation: on " + on(device));
    }
  }
  return address;
}

void release(uint64_t address) {
  live.erase(address);
}

void launched(const char* kernel, void* stream, const void* const* arguments, const size_t* sizes, size_t count) {
  if (state.launches++ == state.fails_at) {
    throw std::runtime_error("the launch fails");
  }
  check_place(kernel, stream);
  for (size_t i = 0; i < count; ++i) {
    for (size_t at = 0; at + 8 <= sizes[i]; at += 8) {
      uint64_t word;
      memcpy(&word, static_cast<const char*>(arguments[i]) + at, 8);
      check_address(std::string(kernel) + ", argument " + std::to_string(i), word);
    }
  }
}

} // namespace devices

using devices::state;

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != state.expected) {
    devices::say("cudaDeviceGetAttribute: of cuda:" + std::to_string(device));
  }
  const int ratio = state.slow_float64 ? 64 : 2;
  *value = attribute == cudaDevAttrSingleToDoublePrecisionPerfRatio ? ratio : 232448;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t, cudaMemcpyKind, cudaStream_t stream) {
  devices::check_place("cudaMemcpyAsync", stream);
  devices::check_address("cudaMemcpyAsync, to", reinterpret_cast<uint64_t>(to));
  devices::check_address("cudaMemcpyAsync, from", reinterpret_cast<uint64_t>(from));
  return cudaSuccess;
}

namespace fake {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int32_t kCpu = 0, kCuda = 1;

struct Storage {
  int device; // -1: CPU
  void* data;

  Storage(int device, uint64_t bytes, bool users)
      : device(device),
        data(device < 0 ? calloc(bytes + 1, 1) : reinterpret_cast<void*>(devices::allocate(device, bytes, users))) {}
  Storage(const Storage&) = delete;
  ~Storage() {
    device < 0 ? free(data) : devices::release(reinterpret_cast<uint64_t>(data));
  }
};

struct Body {
  std::vector<int64_t> sizes, strides;
  ScalarType type;
  std::shared_ptr<Storage> storage;
};

Body* body(AtenTensorHandle handle) {
  return reinterpret_cast<Body*>(handle);
}
AtenTensorHandle handle(Body* body) {
  return reinterpret_cast<AtenTensorHandle>(body);
}

int64_t element(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

std::vector<int64_t> dense(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

Body* make(int device, std::vector<int64_t> sizes, ScalarType type, std::vector<int64_t> strides, bool users) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    last += (sizes[i] - 1) * strides[i];
  }
  const auto bytes = uint64_t(std::max<int64_t>(last + 1, 1) * element(type));
  return new Body{sizes, strides, type, std::make_shared<Storage>(device, bytes, users)};
}

int64_t numel(const Body& x) {
  int64_t n = 1;
  for (const int64_t size : x.sizes) {
    n *= size;
  }
  return n;
}

bool contiguous(const Body& x) {
  int64_t expected = 1;
  for (size_t i = x.sizes.size(); i-- > 0;) {
    if (x.sizes[i] != 1 && x.strides[i] != expected) {
      return false;
    }
    expected *= x.sizes[i];
  }
  return true;
}

template <class X>
X take(StableIValue& value) {
  return torch::stable::detail::to<X>(value);
}
void give(StableIValue& value, Body* x) {
  value = torch::stable::detail::from(Tensor(handle(x)));
}

// An op by name: its arguments are taken from the stack, results of the right shape take their places.
void dispatch(const std::string& name, StableIValue* stack) {
  state.calls += name.rfind("fastmtl::", 0) == 0;
  const Tensor first = take<Tensor>(stack[0]); // of every op that the library calls
  const Body& x = *body(first.get());
  const int device = x.storage->device;
  const auto fresh = [&](const std::vector<int64_t>& sizes, ScalarType type, int where) {
    return make(where, sizes, type, dense(sizes), false);
  };
  const auto less = [&](size_t drop) { return std::vector<int64_t>(x.sizes.begin(), x.sizes.end() - int64_t(drop)); };
  if (name == "aten::new_empty") {
    const auto sizes = take<std::vector<int64_t>>(stack[1]);
    give(stack[0], fresh(sizes, take<std::optional<ScalarType>>(stack[2]).value_or(x.type), device));
  } else if (name == "aten::empty_like" || name == "aten::clone") {
    give(stack[0], make(device, x.sizes, x.type, x.strides, false));
  } else if (name == "aten::contiguous") {
    give(stack[0], contiguous(x) ? new Body(x) : fresh(x.sizes, x.type, device));
  } else if (name == "aten::copy_") {
    take<Tensor>(stack[1]);
    give(stack[0], new Body(x));
  } else if (name == "aten::to") {
    const ScalarType type = take<std::optional<ScalarType>>(stack[1]).value_or(x.type);
    const auto to = take<std::optional<torch::stable::Device>>(stack[3]);
    const int where = !to ? device : to->is_cpu() ? -1 : to->index();
    give(stack[0], type == x.type && where == device ? new Body(x) : fresh(x.sizes, type, where));
  } else if (name == "fastmtl::second_pass") {
    give(stack[0], fresh(less(2), ScalarType::Long, device));
  } else if (name.rfind("fastmtl::", 0) == 0) { // α; eigenvalues or residual; rank or eigenvectors
    const bool eigh = name == "fastmtl::eigh", many = name == "fastmtl::balance_many";
    give(stack[0], fresh(less(1), ScalarType::Double, device));
    if (eigh || many || (name != "fastmtl::pcgrad" && name != "fastmtl::gradvac")) {
      give(stack[1], fresh(eigh ? x.sizes : less(many ? 1 : 2), ScalarType::Double, device));
    }
    if (many) {
      give(stack[2], fresh(less(2), ScalarType::Long, device));
    }
  } else {
    throw std::runtime_error("the fake PyTorch has no " + name);
  }
}

} // namespace

std::map<std::string, Boxed>& ops() {
  static std::map<std::string, Boxed> found;
  return found;
}

Tensor tensor(int device, const std::vector<int64_t>& sizes, ScalarType type, const std::vector<int64_t>& strides) {
  return Tensor(handle(make(device, sizes, type, strides.empty() ? dense(sizes) : strides, true)));
}

} // namespace fake

// ---- The C functions ------------------------------------------------------------------------------------------------

using fake::body;
using fake::Body;

extern "C" {

#define FAKE_NUMBER(function, value) \
  int32_t function() {               \
    return int32_t(value);           \
  }
#define FAKE_DTYPE(name, type) FAKE_NUMBER(aoti_torch_dtype_##name, torch::headeronly::ScalarType::type)
FAKE_DTYPE(uint8, Byte)
FAKE_DTYPE(int8, Char)
FAKE_DTYPE(int16, Short)
FAKE_DTYPE(int32, Int)
FAKE_DTYPE(int64, Long)
FAKE_DTYPE(float16, Half)
FAKE_DTYPE(float32, Float)
FAKE_DTYPE(float64, Double)
FAKE_DTYPE(complex32, ComplexHalf)
FAKE_DTYPE(complex64, ComplexFloat)
FAKE_DTYPE(complex128, ComplexDouble)
FAKE_DTYPE(bool, Bool)
FAKE_DTYPE(bfloat16, BFloat16)
FAKE_DTYPE(float8_e5m2, Float8_e5m2)
FAKE_DTYPE(float8_e4m3fn, Float8_e4m3fn)
FAKE_DTYPE(float8_e5m2fnuz, Float8_e5m2fnuz)
FAKE_DTYPE(float8_e4m3fnuz, Float8_e4m3fnuz)
FAKE_DTYPE(uint16, UInt16)
FAKE_DTYPE(uint32, UInt32)
FAKE_DTYPE(uint64, UInt64)
FAKE_NUMBER(aoti_torch_device_type_cpu, 0)
FAKE_NUMBER(aoti_torch_device_type_cuda, 1)
FAKE_NUMBER(aoti_torch_device_type_meta, 14)
FAKE_NUMBER(aoti_torch_device_type_xpu, 12)
FAKE_NUMBER(aoti_torch_device_type_mps, 13)
FAKE_NUMBER(aoti_torch_device_type_privateuse1, 20)
FAKE_NUMBER(aoti_torch_layout_strided, 0)
FAKE_NUMBER(aoti_torch_layout_sparse_coo, 1)
FAKE_NUMBER(aoti_torch_layout_sparse_csr, 2)
FAKE_NUMBER(aoti_torch_layout__mkldnn, 3)
FAKE_NUMBER(aoti_torch_layout_sparse_csc, 4)
FAKE_NUMBER(aoti_torch_layout_sparse_bsr, 5)
FAKE_NUMBER(aoti_torch_layout_sparse_bsc, 6)
FAKE_NUMBER(aoti_torch_layout_jagged, 7)
FAKE_NUMBER(aoti_torch_memory_format_contiguous_format, 0)
FAKE_NUMBER(aoti_torch_memory_format_preserve_format, 1)
FAKE_NUMBER(aoti_torch_memory_format_channels_last, 2)
FAKE_NUMBER(aoti_torch_memory_format_channels_last_3d, 3)

uint64_t aoti_torch_abi_version() {
  return TORCH_ABI_VERSION;
}

AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* made) {
  *made = fake::handle(new Body{});
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle from, AtenTensorHandle* made) {
  *made = fake::handle(new Body(*body(from)));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle x) {
  delete body(x);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle x, bool* found) {
  *found = fake::contiguous(*body(x));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle x, int64_t** found) {
  *found = body(x)->sizes.data();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle x, int64_t** found) {
  *found = body(x)->strides.data();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle x, int64_t i, int64_t* found) {
  *found = body(x)->sizes[size_t(i < 0 ? i + int64_t(body(x)->sizes.size()) : i)];
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle x, int64_t i, int64_t* found) {
  *found = body(x)->strides[size_t(i < 0 ? i + int64_t(body(x)->sizes.size()) : i)];
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle x, int64_t* found) {
  *found = fake::numel(*body(x));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle x, int64_t* found) {
  *found = int64_t(body(x)->sizes.size());
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle x, int32_t* found) {
  *found = int32_t(body(x)->type);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle x, int32_t* found) {
  *found = body(x)->storage->device < 0 ? fake::kCpu : fake::kCuda;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle x, int32_t* found) {
  *found = body(x)->storage->device;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle x, void** found) {
  *found = body(x)->storage->data;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle x, const void** found) {
  *found = body(x)->storage->data;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_copy_(AtenTensorHandle, AtenTensorHandle, int32_t) {
  return AOTI_TORCH_SUCCESS; // torch's own, on the device of its tensors
}
AOTITorchError aoti_torch_empty_strided(
    int64_t dims,
    const int64_t* sizes,
    const int64_t* strides,
    int32_t dtype,
    int32_t type,
    int32_t index,
    AtenTensorHandle* made) {
  const int device = type == fake::kCpu ? -1 : index;
  *made = fake::handle(
      fake::make(
          device, {sizes, sizes + dims}, torch::headeronly::ScalarType(dtype), {strides, strides + dims}, false));
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* made) {
  *made = reinterpret_cast<DeviceGuardHandle>(new int(state.current));
  state.current = index;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  int* before = reinterpret_cast<int*>(guard);
  state.current = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** found) {
  *found = state.streams[device];
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle* made) {
  *made = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return AOTI_TORCH_FAILURE;
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return AOTI_TORCH_FAILURE;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) {
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, fake::Boxed boxed, uint64_t) {
  fake::ops()[name] = boxed;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  fake::dispatch(name, stack);
  return AOTI_TORCH_SUCCESS;
}

using List = std::vector<StableIValue>;
AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* made) {
  *made = reinterpret_cast<StableListHandle>(new List);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  *size = reinterpret_cast<List*>(list)->size();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* element) {
  *element = (*reinterpret_cast<List*>(list))[i];
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue element) {
  reinterpret_cast<List*>(list)->push_back(element);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete reinterpret_cast<List*>(list);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_new_string_handle(const char* data, size_t length, StringHandle* made) {
  *made = reinterpret_cast<StringHandle>(new std::string(data, length));
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_string_length(StringHandle text, size_t* length) {
  *length = reinterpret_cast<std::string*>(text)->size();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_string_c_str(StringHandle text, const char** data) {
  *data = reinterpret_cast<std::string*>(text)->c_str();
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_delete_string(StringHandle text) {
  delete reinterpret_cast<std::string*>(text);
  return AOTI_TORCH_SUCCESS;
}

} // extern "C"
