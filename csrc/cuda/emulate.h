// CUDA's model of execution on a CPU, so that kernels are tested where there is no GPU: one thread of the system for each
// thread of a block, barriers for __syncthreads and for what the lanes of a warp exchange. Blocks run one after another.
//
// Slow, and made for blocks of a few hundred threads; what it shows is that indices, barriers and exchanges are right.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;

namespace emulated {

// Threads that wait sleep: hundreds that spin would take the processors from everything else.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++waiting_ == threads_) {
      waiting_ = 0, ++round_;
      all_.notify_all();
      return;
    }
    for (const auto round = round_; round == round_;) all_.wait(lock);
  }

 private:
  const int threads_;
  int waiting_ = 0;
  std::uint64_t round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};

struct Warp {
  Barrier barrier;
  std::uint64_t words[32][8];
  explicit Warp(int lanes) : barrier(lanes) {}
};

struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::uint64_t> shared;
  int votes = 0;
  Block(int threads, std::size_t bytes) : barrier(threads), shared(bytes / 8 + 1) {
    for (int first = 0; first < threads; first += 32) warps.push_back(std::make_unique<Warp>(std::min(32, threads - first)));
  }
};

inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local int lane;

// All lanes of a warp put in words and see what the others have put in.
template <class Use>
auto exchange(const void* words, std::size_t bytes, Use use) {
  std::memcpy(warp->words[lane], words, bytes);
  warp->barrier.wait();
  auto result = use(warp->words);
  warp->barrier.wait();
  return result;
}

}  // namespace emulated

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulated::block->barrier.wait(); }

inline void __syncwarp() { emulated::warp->barrier.wait(); }

inline int __syncthreads_or(int predicate) {
  if (threadIdx.x == 0) emulated::block->votes = 0;
  __syncthreads();
  if (predicate) std::atomic_ref<int>(emulated::block->votes) = 1;
  __syncthreads();
  const int result = emulated::block->votes;
  __syncthreads();
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::exchange(&value, sizeof value, [&](std::uint64_t (*words)[8]) {
    T other;
    std::memcpy(&other, words[emulated::lane ^ mask], sizeof other);
    return other;
  });
}

inline void atomicAdd(unsigned long long* where, unsigned long long more) {
  std::atomic_ref<unsigned long long>(*where) += more;
}

// D (16 x 8) += A (16 x 32) B (32 x 8) with bytes: mma.m16n8k32, as every lane holds it.
template <class TA, class TB>
void mma_bytes(int (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  std::uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  emulated::exchange(words, sizeof words, [&](std::uint64_t (*all)[8]) {
    const auto byte = [&](int lane, int word, int k) {
      std::uint32_t value;
      std::memcpy(&value, reinterpret_cast<const char*>(all[lane]) + 4 * word, 4);
      return (value >> (8 * k)) & 255;
    };
    for (int e = 0; e < 4; ++e) {
      const int row = emulated::lane / 4 + 8 * (e / 2), column = emulated::lane % 4 * 2 + e % 2;
      for (int k = 0; k < 32; ++k) {
        const auto x = static_cast<TA>(byte(row % 8 * 4 + k % 16 / 4, row / 8 + 2 * (k / 16), k % 4));
        const auto y = static_cast<TB>(byte(column * 4 + k % 16 / 4, 4 + k / 16, k % 4));
        d[e] += static_cast<int>(x) * static_cast<int>(y);
      }
    }
    return 0;
  });
}

#define SHARED_MEMORY(type, name) type* name = reinterpret_cast<type*>(emulated::block->shared.data())

template <class Kernel, class... Arguments>
int launch(Kernel kernel, dim3 grid, int threads, std::size_t shared, cudaStream_t, Arguments... arguments) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        emulated::Block block(threads, shared);
        std::fill(block.shared.begin(), block.shared.end(), 0xcdcdcdcdcdcdcdcdull);  // nothing may count on zeros
        std::vector<std::thread> running;
        for (int t = 0; t < threads; ++t)
          running.emplace_back([&, t] {
            threadIdx = dim3(t, 0, 0), blockIdx = dim3(x, y, z), blockDim = dim3(threads), gridDim = grid;
            emulated::block = &block, emulated::warp = block.warps[t / 32].get(), emulated::lane = t % 32;
            kernel(arguments...);
          });
        for (auto& one : running) one.join();
      }
  return 0;
}
