// host_cuda.h - runs CUDA C++ kernels on the CPU, so that they can be tested without a GPU and under sanitizers.
//
// Every CUDA thread is a fiber (a stack of its own, switched by hand). The blocks of a grid run one after another, and
// the threads of a block take turns: a thread runs until it meets a barrier or a warp collective, then another goes on.
// One operating-system thread runs everything, so a run is repeatable.
//
// Emulated: the built-in indices, dynamic shared memory, __syncthreads*, __syncwarp, shuffles and votes, a float64 warp
// product, integer atomics, __threadfence, cache-hinted loads and stores, vector types, a few intrinsics.
//
// Found and thrown from the launch as host_cuda::Error, after which the emulator can be used again:
//   - threads of a block that wait at different barriers, or at a barrier that another thread missed by returning;
//   - a warp collective whose lanes disagree, that names a lane that has returned, or that reads a lane not in its
//   mask;
//   - deadlock;
//   - a launch configuration that no device accepts, or more dynamic shared memory than set_shared_limit allows.
// Call sites are compared by source position, which is stricter than the hardware.
//
// Found through wrong results: a read of shared memory before any write (it is filled with 0xff, a NaN) and a missing
// barrier (run under all three orders of set_order).
// Found by AddressSanitizer: an access outside the dynamic shared memory or outside a buffer in global memory. Arrays
// carved out of the same dynamic shared memory are not told apart.
// Found by ThreadSanitizer: races between threads of a block and between blocks of a launch. Barriers and __syncwarp
// order memory, shuffles and votes do not. Between blocks only a __threadfence, then an atomic, then in another block
// an atomic on the same address, then a __threadfence order memory.
//
// Not emulated: inline PTX, mma, cp.async, TMA, clusters, grid sync, blocks that wait for each other, __activemask,
// static __shared__ and __constant__ variables (they do not compile), weak memory order in the results, half precision
// types, approximate arithmetic (rsqrt is 1 / sqrt), limits on registers, and time. A loop that never ends is not
// found.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(HOST_CUDA_UCONTEXT)
#define HOST_CUDA_UCONTEXT
#endif
#ifdef HOST_CUDA_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// The emulator itself is not under test: its own state is shared by all fibers on purpose. Functions marked so must not
// call the standard library on that state, since templates from there would be instrumented.
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define HOST_CUDA_RUNTIME __attribute__((no_sanitize("thread"))) inline
#else
#define HOST_CUDA_RUNTIME inline
#endif

// ---- Types and keywords of CUDA C++ ---------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
constexpr float2 make_float2(float x, float y) {
  return {x, y};
}
constexpr float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
constexpr double2 make_double2(double x, double y) {
  return {x, y};
}
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
// A failed launch throws instead.
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

constexpr int warpSize = 32;

namespace host_cuda {

// ---- Interface for tests --------------------------------------------------------------------------------------------

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// In which order threads that could run go on, and in which order the blocks of a grid run.
enum class Order { sequential, reversed, shuffled };

struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;
};

// An address that a thread has loaded from, where it is watched.
struct Load {
  uint64_t warp; // of the grid
  unsigned lane;
  uintptr_t address;
  size_t bytes;
};

struct Settings {
  std::mutex mutex; // one launch at a time
  bool watches = false;
  std::vector<Load> loads;
  Order order = Order::sequential;
  uint64_t seed = 0;
  size_t shared_limit = 227 << 10;
  std::vector<LaunchRecord> launches;
};
inline Settings settings;

inline void set_order(Order order, uint64_t seed = 0) {
  settings.order = order;
  settings.seed = seed;
}

inline void set_order(std::string_view name, uint64_t seed = 0) {
  if (name == "sequential") {
    set_order(Order::sequential, seed);
  } else if (name == "reversed") {
    set_order(Order::reversed, seed);
  } else if (name == "shuffled") {
    set_order(Order::shuffled, seed);
  } else {
    throw std::invalid_argument("host_cuda: no such order: " + std::string(name));
  }
}

// The largest dynamic shared memory that a launch may ask for.
inline void set_shared_limit(size_t bytes) {
  settings.shared_limit = bytes;
}

// The launches since the last reset, in order, including those that failed while running.
inline const std::vector<LaunchRecord>& launches() {
  return settings.launches;
}

inline void reset_launches() {
  settings.launches.clear();
}

// ---- State ----------------------------------------------------------------------------------------------------------

constexpr unsigned max_threads = 1024;
constexpr size_t stack_bytes = 128 << 10;
constexpr size_t page_bytes = 4096;
constexpr unsigned max_fiber_sets = 8;

enum class Status { ready, at_barrier, in_collective, returned };
enum class Collective { sync, shuffle, ballot };

struct Fiber {
#ifdef HOST_CUDA_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
  const void* stack; // lowest address
  size_t size;
  void* fake_stack; // AddressSanitizer's
  void* tsan_fiber;

  uint3 thread;
  unsigned index; // of the thread in its block
  Status status;

  // What the thread waits for, or waited for last.
  const char* operation;
  std::source_location where;
  unsigned mask;   // lanes of the collective
  unsigned source; // lane that a shuffle reads
  uint64_t value;  // given to the collective
  uint64_t result; // got from it
  unsigned warp_syncs;
};

struct State {
  // The launch.
  std::string_view kernel;
  void (*call)(const void*);
  const void* call_argument;
  dim3 grid, block;
  unsigned threads;
  size_t shared_bytes;
  Order order;
  uint64_t random;

  // The block that runs.
  uint3 block_index;
  unsigned char* shared;
  Fiber fibers[max_threads];
  Fiber* current;
  Fiber* previous; // who switched to `current`
  Fiber main;      // the thread that launches
  unsigned returned;
  unsigned warp_returned[max_threads / 32]; // bit per lane
  unsigned warp_waiting[max_threads / 32];  // lanes inside a collective

  // The barrier: predicates are summed in `votes` and published in `vote_result` when the last thread comes.
  unsigned arrived;
  unsigned barriers;
  int votes, vote_result;
  const Fiber* first_arrived;

  // Threads that can go on: a ring, each thread at most once.
  uint16_t ready[max_threads];
  unsigned ready_head, ready_count;

  bool failed;
  char error[1024];

  char* stacks;

  // For ThreadSanitizer.
  char launch_start, launch_end; // sync objects, as is each 8 bytes from `sync` on
  char* sync;
  void* publisher; // a fiber, see announce_atomic
  void* fiber_sets[max_fiber_sets][max_threads + 1];
};
inline State state;

// ---- Sanitizers -----------------------------------------------------------------------------------------------------

// ThreadSanitizer is told about order through sync objects: release adds what the caller has seen to the object,
// acquire adds what the object has to the caller. The two objects of a barrier are used in turn: a thread that is
// already at the next barrier must not count for those that are still leaving this one.
enum SyncObject : unsigned { sync_barrier = 0, sync_fenced = 2, sync_seen = 3, sync_warp = 4, sync_count = 68 };
static_assert(sync_count == sync_warp + 2 * max_threads / 32 && 8 * sync_count <= page_bytes);

HOST_CUDA_RUNTIME void release(void* object) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(object);
#else
  (void)object;
#endif
}

HOST_CUDA_RUNTIME void acquire(void* object) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(object);
#else
  (void)object;
#endif
}

HOST_CUDA_RUNTIME void* sync_object(unsigned index) {
  return state.sync + 8 * index;
}

// For ThreadSanitizer to see an atomic access, which orders nothing.
template <class T>
__attribute__((noinline)) void touch_atomic(T* address) {
  __atomic_fetch_add(address, 0, __ATOMIC_RELAXED);
}

// An atomic publishes only what its block has fenced before, not all that its thread has seen, and what it reads is
// seen only after a fence. A fiber of the block's own, which follows nothing else, moves the clocks.
template <class T>
HOST_CUDA_RUNTIME void announce_atomic(T* address) {
#ifdef __SANITIZE_THREAD__
  touch_atomic(address);
  __tsan_switch_to_fiber(state.publisher, __tsan_switch_to_fiber_no_sync);
  acquire(sync_object(sync_fenced));
  acquire(address);
  release(address);
  release(sync_object(sync_seen));
  __tsan_switch_to_fiber(state.current->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#else
  (void)address;
#endif
}

// ---- Fibers ---------------------------------------------------------------------------------------------------------

#ifndef HOST_CUDA_UCONTEXT
// Saves the registers that a function must keep, changes stacks, and returns on the other one.
__attribute__((naked, noinline)) HOST_CUDA_RUNTIME void swap_stacks(
    [[maybe_unused]] void** save,
    [[maybe_unused]] void* load) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}
#endif

HOST_CUDA_RUNTIME void arrive_on_stack() {
#ifdef __SANITIZE_ADDRESS__
  // Also tells where the stack of the launching thread is.
  Fiber* from = state.previous;
  __sanitizer_finish_switch_fiber(state.current->fake_stack, &from->stack, &from->size);
#endif
}

__attribute__((noinline)) HOST_CUDA_RUNTIME void switch_to(Fiber* to, bool never_return = false) {
  Fiber* from = state.current;
  if (to == from) {
    return;
  }
  state.previous = from;
  state.current = to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(never_return ? nullptr : &from->fake_stack, to->stack, to->size);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  (void)never_return;
#ifdef HOST_CUDA_UCONTEXT
  swapcontext(&from->context, &to->context);
#else
  swap_stacks(&from->stack_pointer, to->stack_pointer);
#endif
  arrive_on_stack();
}

// ---- Scheduling -----------------------------------------------------------------------------------------------------

// Records the error and leaves the block: all its fibers are abandoned where they are. Throwing here would have to
// unwind a stack that the C++ runtime does not know.
[[noreturn]] __attribute__((format(printf, 2, 3))) HOST_CUDA_RUNTIME void
fail(const Fiber* who, const char* format, ...) {
  char what[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  const uint3 b = state.block_index;
  snprintf(
      state.error,
      sizeof(state.error),
      "host_cuda: %s: %s at %s:%u, kernel %.*s, block (%u, %u, %u), thread (%u, %u, %u)",
      what,
      who->operation,
      who->where.file_name(),
      unsigned(who->where.line()),
      int(state.kernel.size()),
      state.kernel.data(),
      b.x,
      b.y,
      b.z,
      who->thread.x,
      who->thread.y,
      who->thread.z);
  state.failed = true;
  release(&state.launch_end);
  switch_to(&state.main, true);
  __builtin_unreachable();
}

HOST_CUDA_RUNTIME void make_ready(Fiber* fiber) {
  fiber->status = Status::ready;
  state.ready[(state.ready_head + state.ready_count++) % max_threads] = uint16_t(fiber->index);
}

// Makes the threads from `first` that are named by `mask` (or all `count` of them) ready, in the order that was set.
HOST_CUDA_RUNTIME void make_ready(Fiber* first, unsigned count, unsigned mask = ~0u) {
  for (unsigned i = 0; i < count; ++i) {
    const unsigned k = state.order == Order::reversed ? count - 1 - i : i;
    if (mask >> (k % 32) & 1) {
      make_ready(first + k);
    }
  }
}

// splitmix64
HOST_CUDA_RUNTIME uint64_t next_random() {
  uint64_t z = state.random += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

[[noreturn]] HOST_CUDA_RUNTIME void fail_deadlock() {
  const Fiber* waiting[2] = {nullptr, nullptr};
  unsigned counts[2] = {0, 0};
  for (unsigned i = 0; i < state.threads; ++i) {
    const Fiber* fiber = &state.fibers[i];
    if (fiber->status == Status::at_barrier || fiber->status == Status::in_collective) {
      const int kind = fiber->status == Status::in_collective;
      if (counts[kind]++ == 0) {
        waiting[kind] = fiber;
      }
    }
  }
  fail(
      waiting[1] ? waiting[1] : waiting[0],
      "deadlock: %u threads wait at a barrier, %u in a warp collective, %u have returned",
      counts[0],
      counts[1],
      state.returned);
}

HOST_CUDA_RUNTIME Fiber* take_ready() {
  if (state.ready_count == 0) {
    fail_deadlock();
  }
  uint16_t* head = &state.ready[state.ready_head];
  if (state.order == Order::shuffled) {
    uint16_t* other = &state.ready[(state.ready_head + next_random() % state.ready_count) % max_threads];
    const uint16_t index = *other;
    *other = *head;
    *head = index;
  }
  state.ready_head = (state.ready_head + 1) % max_threads;
  --state.ready_count;
  return &state.fibers[*head];
}

// What a fiber runs: one thread of the kernel.
__attribute__((no_sanitize("address"))) HOST_CUDA_RUNTIME void thread_main() {
  arrive_on_stack();
  acquire(&state.launch_start);
  state.call(state.call_argument);

  Fiber* fiber = state.current;
  fiber->status = Status::returned;
  release(&state.launch_end);
  ++state.returned;
  if (state.arrived) {
    fail(state.first_arrived, "thread %u of the block returned while this one waits at a barrier", fiber->index);
  }
  const unsigned warp = fiber->index / 32;
  const unsigned bit = 1u << fiber->index % 32;
  state.warp_returned[warp] |= bit;
  for (unsigned lanes = state.warp_waiting[warp]; lanes; lanes &= lanes - 1) {
    const Fiber* other = &state.fibers[warp * 32 + unsigned(__builtin_ctz(lanes))];
    if (other->mask & bit) {
      fail(other, "the mask 0x%08x names lane %u, which has returned", other->mask, fiber->index % 32);
    }
  }
  switch_to(state.returned == state.threads ? &state.main : take_ready(), true);
  __builtin_unreachable();
}

HOST_CUDA_RUNTIME void start_fiber(Fiber* fiber, unsigned index) {
  char* stack = state.stacks + index * stack_bytes + page_bytes;
  fiber->stack = stack;
  fiber->size = stack_bytes - page_bytes;
  fiber->fake_stack = nullptr;
  fiber->index = index;
  fiber->thread = {index % state.block.x, index / state.block.x % state.block.y, index / state.block.x / state.block.y};
  fiber->operation = "start";
  fiber->warp_syncs = 0;
#ifdef HOST_CUDA_UCONTEXT
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = fiber->size;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, thread_main, 0);
#else
  // What swap_stacks pops: six registers and where to return to. Above it, no return address: the stack starts here.
  void** top = reinterpret_cast<void**>(stack + fiber->size);
  std::fill(top - 8, top, nullptr);
  top[-2] = reinterpret_cast<void*>(&thread_main);
  fiber->stack_pointer = top - 8;
#endif
}

inline char* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  return static_cast<char*>(memory);
}

// Nothing orders two blocks of a launch. So ThreadSanitizer must see nothing that both use: stacks, shared memory and
// sync objects are mapped anew for each block, and its fibers are others than those of the blocks before. But a new
// fiber costs half a millisecond and as many kilobytes, so there are only a few sets of them, used in turn: two blocks
// of a launch that use the same set are ordered, and a race between them is not found. Neighbours never do.
struct TsanBlock {
#ifdef __SANITIZE_THREAD__
  explicit TsanBlock(uint64_t number) {
    const size_t shared_bytes = (state.shared_bytes + page_bytes - 1) / page_bytes * page_bytes;
    bytes = page_bytes + shared_bytes + state.threads * stack_bytes;
    state.sync = map_memory(bytes);
    state.shared = reinterpret_cast<unsigned char*>(state.sync) + page_bytes;
    state.stacks = state.sync + page_bytes + shared_bytes;

    set = state.fiber_sets[number % std::clamp(512 / state.threads, 2u, max_fiber_sets)];
    for (unsigned i = 0; i <= state.threads; ++i) {
      if (!set[i]) {
        set[i] = __tsan_create_fiber(0);
      }
    }
    state.publisher = set[0];
    for (unsigned i = 0; i < state.threads; ++i) {
      state.fibers[i].tsan_fiber = set[1 + i];
    }
    state.main.tsan_fiber = __tsan_get_current_fiber();
  }

  ~TsanBlock() {
    for (unsigned i = 0; state.failed && i < state.threads; ++i) {
      if (state.fibers[i].status != Status::returned) {
        end_abandoned(set[1 + i]);
        set[1 + i] = nullptr;
      }
    }
    munmap(state.sync, bytes);
  }

  // After an error: what the fiber did happened before the end of the launch all the same.
  static HOST_CUDA_RUNTIME void end_abandoned(void* fiber) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
    release(&state.launch_end);
    __tsan_switch_to_fiber(state.main.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(fiber);
  }

  size_t bytes;
  void** set;
#else
  explicit TsanBlock(uint64_t) {}
#endif
};

// `number` counts the blocks that ran before.
inline void run_block(uint64_t number) {
  [[maybe_unused]] const TsanBlock tsan(number);
  if (state.shared_bytes) {
    memset(state.shared, 0xff, state.shared_bytes);
  }
  state.returned = state.arrived = state.barriers = state.ready_head = state.ready_count = 0;
  state.votes = 0;
  std::fill(std::begin(state.warp_returned), std::end(state.warp_returned), 0);
  std::fill(std::begin(state.warp_waiting), std::end(state.warp_waiting), 0);
  for (unsigned i = 0; i < state.threads; ++i) {
    start_fiber(&state.fibers[i], i);
  }
  make_ready(state.fibers, state.threads);
  state.current = &state.main;
  switch_to(take_ready());
}

inline void check_configuration() {
  const dim3 g = state.grid, b = state.block;
  const char* wrong = nullptr;
  if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z) {
    wrong = "an empty grid or block";
  } else if (g.x > 0x7fffffff || g.y > 65535 || g.z > 65535) {
    wrong = "the grid is too large";
  } else if (b.x > 1024 || b.y > 1024 || b.z > 64 || b.x * b.y * b.z > max_threads) {
    wrong = "too many threads in a block";
  } else if (state.shared_bytes > settings.shared_limit) {
    wrong = "too much dynamic shared memory";
  }
  if (wrong) {
    char text[512];
    snprintf(
        text,
        sizeof(text),
        "host_cuda: invalid launch configuration: %s: kernel %.*s, grid (%u, %u, %u), block (%u, %u, %u), %zu bytes",
        wrong,
        int(state.kernel.size()),
        state.kernel.data(),
        g.x,
        g.y,
        g.z,
        b.x,
        b.y,
        b.z,
        state.shared_bytes);
    throw Error(text);
  }
}

inline void allocate() {
#ifndef __SANITIZE_THREAD__
  if (!state.stacks) {
    state.stacks = map_memory(max_threads * stack_bytes);
    for (unsigned i = 0; i < max_threads; ++i) {
      mprotect(state.stacks + i * stack_bytes, page_bytes, PROT_NONE);
    }
  }
  // Of this size exactly, so that AddressSanitizer finds an access outside.
  void* shared = nullptr;
  if (state.shared_bytes && posix_memalign(&shared, 16, state.shared_bytes)) {
    throw std::bad_alloc();
  }
  state.shared = static_cast<unsigned char*>(shared);
#endif
}

inline void release_memory() {
#ifndef __SANITIZE_THREAD__
  free(state.shared);
#endif
#ifdef __SANITIZE_ADDRESS__
  // Abandoned fibers leave the guards around their variables behind.
  if (state.failed) {
    for (unsigned i = 0; i < state.threads; ++i) {
      __asan_unpoison_memory_region(state.fibers[i].stack, state.fibers[i].size);
    }
  }
#endif
}

inline void run_grid(
    std::string_view kernel,
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    void (*call)(const void*),
    const void* call_argument) {
  const std::lock_guard lock(settings.mutex);
  if (kernel.starts_with('(') && kernel.ends_with(')')) {
    kernel = kernel.substr(1, kernel.size() - 2);
  }
  state.kernel = kernel;
  state.grid = grid;
  state.block = block;
  state.shared_bytes = shared_bytes;
  state.call = call;
  state.call_argument = call_argument;
  state.order = settings.order;
  state.failed = false;
  check_configuration();
  state.threads = block.x * block.y * block.z;
  settings.launches.push_back({std::string(kernel), grid, block, shared_bytes});
  allocate();
  release(&state.launch_start);

  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> shuffled;
  if (state.order == Order::shuffled) {
    state.random = settings.seed;
    shuffled.resize(blocks);
    std::iota(shuffled.begin(), shuffled.end(), 0);
    for (uint64_t i = blocks; i > 1; --i) {
      std::swap(shuffled[i - 1], shuffled[next_random() % i]);
    }
  }
  for (uint64_t i = 0; i < blocks && !state.failed; ++i) {
    const uint64_t k = state.order == Order::shuffled   ? shuffled[i]
                       : state.order == Order::reversed ? blocks - 1 - i
                                                        : i;
    state.block_index = {unsigned(k % grid.x), unsigned(k / grid.x % grid.y), unsigned(k / grid.x / grid.y)};
    run_block(i);
  }
  acquire(&state.launch_end);
  release_memory();
  if (state.failed) {
    throw Error(state.error);
  }
}

// As on a device, the arguments are converted once, and each thread gets copies.
template <class... Parameters, class... Arguments>
void launch(
    const char* name,
    void (*kernel)(Parameters...),
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    cudaStream_t,
    Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const auto call = [&] { std::apply(kernel, parameters); };
  const auto erased = [](const void* argument) { (*static_cast<decltype(call)*>(argument))(); };
  run_grid(name, grid, block, shared_bytes, erased, &call);
}

// ---- Barriers and collectives ---------------------------------------------------------------------------------------

HOST_CUDA_RUNTIME bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

// Waits for all threads of the block; returns how many of them came with a true predicate.
HOST_CUDA_RUNTIME int barrier(const char* operation, bool predicate, const std::source_location& where) {
  Fiber* fiber = state.current;
  fiber->operation = operation;
  fiber->where = where;
  if (state.returned) {
    fail(fiber, "%u threads of the block have returned before this barrier", state.returned);
  }
  if (state.arrived == 0) {
    state.first_arrived = fiber;
  } else if (!same_place(state.first_arrived->where, where)) {
    fail(
        fiber,
        "the threads of a block wait at different barriers, another is %s at line %u",
        state.first_arrived->operation,
        unsigned(state.first_arrived->where.line()));
  }
  state.votes += predicate;
  fiber->status = Status::at_barrier;
  void* sync = sync_object(sync_barrier + state.barriers % 2);
  release(sync);
  if (++state.arrived == state.threads) {
    state.vote_result = state.votes;
    state.arrived = 0;
    state.votes = 0;
    ++state.barriers;
    make_ready(state.fibers, state.threads);
  }
  switch_to(take_ready());
  acquire(sync);
  return state.vote_result;
}

HOST_CUDA_RUNTIME unsigned current_lane() {
  return state.current->index % 32;
}

// All lanes that `fiber` names wait. Do they wait for the same?
HOST_CUDA_RUNTIME bool agree(const Fiber* lanes, const Fiber* fiber) {
  bool all = true;
  for (unsigned rest = fiber->mask; rest; rest &= rest - 1) {
    const Fiber* other = &lanes[__builtin_ctz(rest)];
    if (other->mask == fiber->mask && same_place(other->where, fiber->where)) {
      continue;
    }
    if (other->mask >> (fiber->index % 32) & 1) {
      fail(
          fiber,
          "lanes of a warp disagree: lane %u has the mask 0x%08x, and lane %u is in %s at line %u with the mask 0x%08x",
          fiber->index % 32,
          fiber->mask,
          other->index % 32,
          other->operation,
          unsigned(other->where.line()),
          other->mask);
    }
    all = false; // it waits for others first, and may come here later
  }
  return all;
}

// Waits until all lanes of `mask` are here with the same mask, and exchanges values. The last lane to come does the
// work for all, so that a lane that runs ahead cannot overwrite a value that another has not read yet.
HOST_CUDA_RUNTIME uint64_t collective(
    Collective kind,
    const char* operation,
    unsigned mask,
    uint64_t value,
    unsigned source,
    const std::source_location& where) {
  Fiber* fiber = state.current;
  const unsigned warp = fiber->index / 32;
  const unsigned lane = fiber->index % 32;
  Fiber* lanes = &state.fibers[warp * 32];
  if (state.threads - warp * 32 < 32) {
    mask &= (1u << (state.threads - warp * 32)) - 1; // lanes that do not exist do not count
  }
  fiber->operation = operation;
  fiber->where = where;
  fiber->mask = mask;
  fiber->value = value;
  fiber->source = source;
  if (!(mask >> lane & 1)) {
    fail(fiber, "the mask 0x%08x does not name the calling lane %u", mask, lane);
  }
  if (mask & state.warp_returned[warp]) {
    const unsigned gone = mask & state.warp_returned[warp];
    fail(fiber, "the mask 0x%08x names lane %u, which has returned", mask, unsigned(__builtin_ctz(gone)));
  }
  if (!(mask >> source & 1)) {
    fail(fiber, "lane %u reads lane %u, which is not in the mask 0x%08x", lane, source, mask);
  }

  fiber->status = Status::in_collective;
  state.warp_waiting[warp] |= 1u << lane;
  if ((mask & ~state.warp_waiting[warp]) == 0 && agree(lanes, fiber)) {
    uint64_t ballot = 0;
    for (unsigned rest = kind == Collective::ballot ? mask : 0; rest; rest &= rest - 1) {
      const unsigned k = unsigned(__builtin_ctz(rest));
      ballot |= lanes[k].value << k;
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      Fiber* other = &lanes[__builtin_ctz(rest)];
      other->result = kind == Collective::shuffle ? lanes[other->source].value : ballot;
    }
    state.warp_waiting[warp] &= ~mask;
    make_ready(lanes, 32, mask);
  }
  switch_to(take_ready());
  return fiber->result;
}

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && sizeof(T) <= 8;

template <Shuffled T>
HOST_CUDA_RUNTIME T
shuffle(const char* operation, unsigned mask, T value, unsigned source, const std::source_location& where) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = collective(Collective::shuffle, operation, mask, bits, source, where);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

HOST_CUDA_RUNTIME unsigned
ballot(const char* operation, unsigned mask, bool predicate, const std::source_location& where) {
  return unsigned(collective(Collective::ballot, operation, mask, predicate, current_lane(), where));
}

HOST_CUDA_RUNTIME uint3 thread_index() {
  return state.current->thread;
}
HOST_CUDA_RUNTIME uint3 block_index() {
  return state.block_index;
}
HOST_CUDA_RUNTIME dim3 block_dim() {
  return state.block;
}
HOST_CUDA_RUNTIME dim3 grid_dim() {
  return state.grid;
}
HOST_CUDA_RUNTIME unsigned char* dynamic_shared() {
  return state.shared;
}

// No other thread runs meanwhile, so a plain update is atomic.
template <class T, class F>
HOST_CUDA_RUNTIME T atomic(T* address, F next) {
  announce_atomic(address);
  const T old = *address;
  *address = next(old);
  return old;
}

} // namespace host_cuda

// ---- What kernels call ----------------------------------------------------------------------------------------------

// These two are the project's own spelling, which platform.h defines for a device.
#define FASTMTL_DYNAMIC_SHARED(name) unsigned char* name = host_cuda::dynamic_shared()
#define FASTMTL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  host_cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

#define threadIdx (host_cuda::thread_index())
#define blockIdx (host_cuda::block_index())
#define blockDim (host_cuda::block_dim())
#define gridDim (host_cuda::grid_dim())

// Each call knows its place in the source through this default argument.
#define HOST_CUDA_HERE const std::source_location& where = std::source_location::current()

inline void __syncthreads(HOST_CUDA_HERE) {
  host_cuda::barrier("__syncthreads", false, where);
}
inline int __syncthreads_count(int predicate, HOST_CUDA_HERE) {
  return host_cuda::barrier("__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, HOST_CUDA_HERE) {
  return host_cuda::barrier("__syncthreads_or", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, HOST_CUDA_HERE) {
  return host_cuda::barrier("__syncthreads_and", predicate == 0, where) == 0;
}

namespace host_cuda {

// Waits for the lanes of `mask`; what each leaves as `value` can be read until it meets others again.
HOST_CUDA_RUNTIME void meet(const char* operation, unsigned mask, uint64_t value, const std::source_location& where) {
  Fiber* fiber = state.current;
  void* sync = sync_object(sync_warp + fiber->index / 32 * 2 + fiber->warp_syncs++ % 2);
  release(sync);
  collective(Collective::sync, operation, mask, value, current_lane(), where);
  acquire(sync);
}

} // namespace host_cuda

HOST_CUDA_RUNTIME void __syncwarp(unsigned mask = ~0u, HOST_CUDA_HERE) {
  host_cuda::meet("__syncwarp", mask, 0, where);
}

// A shuffle that would leave its segment of `width` lanes gives the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, HOST_CUDA_HERE) {
  const unsigned segment = unsigned(width) - 1;
  const unsigned lane = (host_cuda::current_lane() & ~segment) | (unsigned(source) & segment);
  return host_cuda::shuffle("__shfl_sync", mask, value, lane, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, HOST_CUDA_HERE) {
  const unsigned lane = host_cuda::current_lane();
  const unsigned source = lane ^ unsigned(lane_mask);
  const bool inside = source / unsigned(width) <= lane / unsigned(width);
  return host_cuda::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HOST_CUDA_HERE) {
  const unsigned lane = host_cuda::current_lane();
  const bool inside = lane % unsigned(width) + delta < unsigned(width);
  return host_cuda::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HOST_CUDA_HERE) {
  const unsigned lane = host_cuda::current_lane();
  const bool inside = lane % unsigned(width) >= delta;
  return host_cuda::shuffle("__shfl_up_sync", mask, value, inside ? lane - delta : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HOST_CUDA_HERE) {
  return host_cuda::ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, HOST_CUDA_HERE) {
  return host_cuda::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HOST_CUDA_HERE) {
  return host_cuda::ballot("__all_sync", mask, predicate == 0, where) == 0;
}

namespace host_cuda {

// A warp's mma.sync.m16n8k8 on float64: c [16, 8] += a [16, 8] b [8, 8], each sum in the order of its terms. Two
// meetings of the lanes: all have come before one reads, and all have read before one goes on.
HOST_CUDA_RUNTIME void
mma(double (&c)[4], const double (&low)[2], const double (&high)[2], const double (&right)[2], HOST_CUDA_HERE) {
  struct Operands {
    const double *low, *high, *right;
  } const mine{low, high, right};
  const Fiber* lanes = &state.fibers[state.current->index / 32 * 32];
  const unsigned row = current_lane() & ~3u, column = current_lane() % 4 * 8;
  const uint64_t address = reinterpret_cast<uint64_t>(&mine);
  meet("mma", ~0u, address, where);
  for (unsigned i = 0; i < 2; ++i) {
    for (unsigned k = 0; k < 4; ++k) {
      const auto* left = reinterpret_cast<const Operands*>(lanes[row + k].value);
      const auto* first = reinterpret_cast<const Operands*>(lanes[column + k].value);
      const auto* second = reinterpret_cast<const Operands*>(lanes[column + 4 + k].value);
      c[0] = fma(left->low[i], first->right[i], c[0]);
      c[1] = fma(left->low[i], second->right[i], c[1]);
      c[2] = fma(left->high[i], first->right[i], c[2]);
      c[3] = fma(left->high[i], second->right[i], c[3]);
    }
  }
  meet("mma", ~0u, address, where); // the same value: others may still be reading it
}

} // namespace host_cuda

HOST_CUDA_RUNTIME void __threadfence() {
  host_cuda::acquire(host_cuda::sync_object(host_cuda::sync_seen));
  host_cuda::release(host_cuda::sync_object(host_cuda::sync_fenced));
}

// Integers only: a sum of floating-point numbers by atomics would depend on the order of the threads.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return host_cuda::atomic(address, [=](unsigned old) { return old + value; });
}
inline int atomicAdd(int* address, int value) {
  return host_cuda::atomic(address, [=](int old) { return int(unsigned(old) + unsigned(value)); });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return host_cuda::atomic(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

namespace host_cuda {
// Called by what loads from global memory, each time.
template <class T>
void watch(const T* address) {
  if (settings.watches) {
    const unsigned index = state.current->index;
    const uint64_t block = state.block_index.x + uint64_t(state.grid.x) * state.block_index.y;
    const uint64_t warp = block * (max_threads / 32) + index / 32;
    settings.loads.push_back({warp, index % 32, reinterpret_cast<uintptr_t>(address), sizeof(T)});
  }
}

// Bytes that were asked for since the watch began, how many of them 16 at a time, and those of the 32-byte sectors that
// took. The nth load of every lane of a warp counts as one instruction, as it is where lanes do not part.
inline std::tuple<int64_t, int64_t, int64_t> watched() {
  std::map<std::pair<uint64_t, uint64_t>, std::set<uintptr_t>> sectors; // of a warp's instruction
  std::map<std::pair<uint64_t, unsigned>, uint64_t> before;             // loads of a lane
  int64_t asked = 0, wide = 0, moved = 0;
  for (const Load& load : settings.loads) {
    const uint64_t n = before[{load.warp, load.lane}]++;
    for (uintptr_t a = load.address / 32; a <= (load.address + load.bytes - 1) / 32; ++a) {
      sectors[{load.warp, n}].insert(a);
    }
    asked += int64_t(load.bytes);
    wide += load.bytes == 16 ? 16 : 0;
  }
  for (const auto& [instruction, touched] : sectors) {
    moved += 32 * int64_t(touched.size());
  }
  return {asked, wide, moved};
}

inline void watch_loads(bool watches) {
  settings.watches = watches;
  settings.loads.clear();
}

template <class T>
concept Loadable = std::is_arithmetic_v<T> || std::same_as<T, float2> || std::same_as<T, float4> ||
                   std::same_as<T, double2> || std::same_as<T, uint4>;
} // namespace host_cuda

template <host_cuda::Loadable T>
T __ldg(const T* address) {
  host_cuda::watch(address);
  return *address;
}
template <host_cuda::Loadable T>
T __ldcs(const T* address) {
  host_cuda::watch(address);
  return *address;
}
template <host_cuda::Loadable T>
T __ldcg(const T* address) {
  return *address;
}
template <host_cuda::Loadable T>
void __stcs(T* address, T value) {
  *address = value;
}

// Unlike std::min and std::max, these prefer a number to a NaN.
template <class T>
  requires std::is_arithmetic_v<T>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(a, b);
  } else {
    return b < a ? b : a;
  }
}
template <class T>
  requires std::is_arithmetic_v<T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(a, b);
  } else {
    return a < b ? b : a;
  }
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline float rsqrt(float x) {
  return 1 / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1 / std::sqrt(x);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return std::countl_zero(unsigned(x));
}
