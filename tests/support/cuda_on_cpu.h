// Runs CUDA kernels on the CPU, with a std::thread for each CUDA thread, so that g++ and its sanitizers check them:
// shared memory, barriers of warps and blocks, and races are real. Only implements what the kernels of csrc use.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__

using std::max;
using std::min;

namespace cuda_on_cpu {

constexpr unsigned kMaxBlocks = 16;

struct Index {
  unsigned x;
};

// std::barrier would order threads of other barriers too, through counters in its library, and so hide races.
class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  std::array<int, 32> values;
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / 32) {}
  Barrier barrier;
  std::deque<Warp> warps;
};

inline thread_local Block* block;

}  // namespace cuda_on_cpu

inline thread_local cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_on_cpu::block->barrier.wait(); }

inline int __shfl_up_sync(unsigned, int value, unsigned step) {
  cuda_on_cpu::Warp& warp = cuda_on_cpu::block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  warp.values[lane] = value;
  warp.barrier.wait();
  const int received = warp.values[lane < step ? lane : lane - step];
  warp.barrier.wait();
  return received;
}

inline void atomicExch(unsigned long long* place, unsigned long long value) { std::atomic_ref(*place).exchange(value); }

template <typename T>
T& block_shared() {
  static std::array<T, cuda_on_cpu::kMaxBlocks> memory;
  return memory[blockIdx.x];
}

namespace cuda_on_cpu {

// Runs kernel<<<blocks, threads>>>(args...) and waits for it. Blocks consist of whole warps and all run concurrently.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, const Arguments&... args) {
  std::deque<Block> running;
  std::vector<std::jthread> pool;
  for (unsigned number = 0; number < blocks; ++number) {
    Block& mine = running.emplace_back(threads);
    for (unsigned thread = 0; thread < threads; ++thread) {
      pool.emplace_back([&, number, thread] {
        block = &mine, threadIdx = {thread}, blockIdx = {number}, blockDim = {threads}, gridDim = {blocks};
        kernel(args...);
      });
    }
  }
}

}  // namespace cuda_on_cpu
