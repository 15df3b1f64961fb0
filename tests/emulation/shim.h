// CUDA, as far as torch_csd/cuda/kernels uses it, for g++: the kernels' sources run on the CPU, for tests.
//
// The threads of a block are fibers on one thread. A barrier, a shuffle or an mma is a rendezvous: a fiber
// that gets there waits until all that must have come, as on a device. Where they cannot all come (a barrier
// that some threads of a block pass by, a shuffle that some lanes of a warp do not reach, one lane at a
// shuffle and another at an mma) the launch ends with an error, where a device would hang or compute
// nonsense. Blocks run one after another, so
// __shared__ memory is static.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#define CSD_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kExchangeBytes = 64;  // what a lane can show the others at once

enum class Wait { kNothing, kWarp, kBlock, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  dim3 thread;
  Wait wait = Wait::kNothing;
  int operation = 0;
};

struct Warp {
  alignas(16) char shown[2][kLanes][kExchangeBytes];
  int turn = 0;
};

struct Block {
  Fiber fibers[1024];
  Warp warps[32];
  int thread_count = 0;
  int current = 0;
  void* scheduler = nullptr;  // its stack pointer
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};
inline Block* block = nullptr;

#ifndef __x86_64__
#error "the emulation switches stacks in x86-64 assembly"
#endif
// Saves what a call must preserve on the old stack, and goes on where the new one was left.
__attribute__((naked, noinline)) inline void switch_stack(void** /*old*/, void* /*fresh*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void leave(Wait wait, int operation) {
  Fiber& fiber = block->fibers[block->current];
  fiber.wait = wait;
  fiber.operation = operation;
  switch_stack(&fiber.stack_pointer, block->scheduler);
}

inline void run_fiber() {
  block->body(block->argument);
  leave(Wait::kDone, 0);
  std::abort();  // nobody goes on with a fiber that is done
}

inline void start_fiber(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(std::aligned_alloc(4096, kStackBytes));
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // where run_fiber would return to; also what aligns the stack as a call does
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.wait = Wait::kNothing;
}

inline void resume(int index) {
  Fiber& fiber = block->fibers[index];
  fiber.wait = Wait::kNothing;
  block->current = index;
  threadIdx = fiber.thread;
  switch_stack(&block->scheduler, fiber.stack_pointer);
}

inline int lane() { return block->current % kLanes; }
inline Warp& warp() { return block->warps[block->current / kLanes]; }

// Operations that must not meet each other.
enum Operation { kSyncWarp = 1, kShuffleXor, kShuffle, kReduceMax, kMma, kSyncThreads };

// Shows `mine` to the warp's lanes and returns what they show. It stays valid until the lane's next
// rendezvous.
template <typename T>
const T* exchange(const T& mine, int operation, T (&all)[kLanes]) {
  static_assert(sizeof(T) <= kExchangeBytes);
  Warp& own = warp();
  const int turn = own.turn;
  std::memcpy(own.shown[turn][lane()], &mine, sizeof(T));
  leave(Wait::kWarp, operation);
  for (int i = 0; i < kLanes; ++i) std::memcpy(&all[i], own.shown[turn][i], sizeof(T));
  return all;
}

// Runs one block. Returns null, or what is wrong.
inline const char* run_block() {
  static char message[200];
  const int count = block->thread_count, warp_count = count / kLanes;
  for (int i = 0; i < count; ++i) start_fiber(block->fibers[i]);
  for (int i = 0; i < warp_count; ++i) block->warps[i].turn = 0;
  for (;;) {
    bool moved = false;
    int at_barrier = 0, done = 0;
    for (int w = 0; w < warp_count; ++w) {
      Fiber* lanes = block->fibers + w * kLanes;
      for (bool again = true; again;) {  // while the whole warp meets at its own rendezvous
        for (int i = 0; i < kLanes; ++i) {
          if (lanes[i].wait == Wait::kNothing) {
            resume(w * kLanes + i);
            moved = true;
          }
        }
        again = true;
        for (int i = 0; i < kLanes; ++i) {
          again = again && lanes[i].wait == Wait::kWarp && lanes[i].operation == lanes[0].operation;
        }
        if (again) {
          block->warps[w].turn ^= 1;
          for (int i = 0; i < kLanes; ++i) lanes[i].wait = Wait::kNothing;
        }
      }
      for (int i = 0; i < kLanes; ++i) {
        at_barrier += lanes[i].wait == Wait::kBlock;
        done += lanes[i].wait == Wait::kDone;
      }
    }
    if (done == count) return nullptr;
    if (at_barrier == count) {
      for (int i = 0; i < count; ++i) block->fibers[i].wait = Wait::kNothing;
      continue;
    }
    if (!moved) {
      std::snprintf(
          message, sizeof(message),
          "deadlock in block (%u, %u, %u): %d of %d threads are done, %d wait at a barrier, %d in their warp",
          blockIdx.x, blockIdx.y, blockIdx.z, done, count, at_barrier, count - done - at_barrier);
      return message;
    }
  }
}

// Runs the kernel over the grid. arguments: the address of each, as cuLaunchKernel takes them.
template <typename... Parameters, size_t... indices>
const char* launch(void (*kernel)(Parameters...), const dim3& grid, const dim3& threads, void** arguments,
                   std::index_sequence<indices...>) {
  using Values = std::tuple<Parameters...>;
  struct Call {
    void (*kernel)(Parameters...);
    void** arguments;
  } call{kernel, arguments};
  static Block own;
  block = &own;
  block->thread_count = static_cast<int>(threads.x * threads.y * threads.z);
  if (block->thread_count % kLanes != 0 || block->thread_count > 1024 || threads.y != 1 || threads.z != 1) {
    return "blocks must be of one dimension and of whole warps, of 1024 threads at most";
  }
  block->argument = &call;
  block->body = [](void* argument) {
    auto* own_call = static_cast<Call*>(argument);
    own_call->kernel(*static_cast<std::tuple_element_t<indices, Values>*>(own_call->arguments[indices])...);
  };
  for (int i = 0; i < block->thread_count; ++i) block->fibers[i].thread = {static_cast<unsigned>(i), 0, 0};
  blockDim = threads;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        if (const char* problem = run_block()) return problem;
      }
    }
  }
  return nullptr;
}

template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), const dim3& grid, const dim3& threads, void** arguments) {
  return launch(kernel, grid, threads, arguments, std::index_sequence_for<Parameters...>());
}

// mma.m16n8k16 as the PTX manual lays it out, sums in fp32. low and high widen the halves of a register.
template <typename Low, typename High>
void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, Low low,
         High high) {
  struct Operands {
    float a[8], b[4];
  } all[kLanes];
  exchange(Operands{{low(a0), high(a0), low(a1), high(a1), low(a2), high(a2), low(a3), high(a3)},
                    {low(b0), high(b0), low(b1), high(b1)}},
           kMma, all);
  const int quad = lane() / 4, member = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * member + i % 2;  // row quad or quad + 8
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, part = k / 8;
      c[i] += all[4 * quad + holder].a[2 * (upper + 2 * part) + k % 2] *
              all[4 * column + holder].b[2 * part + k % 2];
    }
  }
}

}  // namespace emulation

// ---- what kernels call ----

inline void __syncthreads() { emulation::leave(emulation::Wait::kBlock, emulation::kSyncThreads); }
inline void __syncwarp(unsigned = 0xffffffff) {
  emulation::leave(emulation::Wait::kWarp, emulation::kSyncWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  T all[emulation::kLanes];
  return emulation::exchange(value, emulation::kShuffleXor, all)[emulation::lane() ^ mask];
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  T all[emulation::kLanes];
  return emulation::exchange(value, emulation::kShuffle, all)[lane % emulation::kLanes];
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  unsigned all[emulation::kLanes], greatest = 0;
  emulation::exchange(value, emulation::kReduceMax, all);
  for (unsigned other : all) greatest = other > greatest ? other : greatest;
  return greatest;
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
// g++ is told not to contract, and rounds to nearest even.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }

template <typename T>
T min(T x, T y) {
  return y < x ? y : x;
}
template <typename T>
T max(T x, T y) {
  return x < y ? y : x;
}
