// Threads for the kernels.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

namespace loft_fast {

// Multiply-adds below which a thread costs more than it brings.
constexpr int64_t kWorthAThread = 1 << 19;

// Run task() in up to `threads` threads at once, the caller's among them, and wait for all. There may be fewer. The
// first exception is rethrown when all are done; so none may be thrown while others wait for its thread.
void in_parallel(int threads, const std::function<void()>& task);

// Spins a while before it gives way to others: what is waited for is being done by another thread right now.
inline void wait_for(const std::atomic<int64_t>& done, int64_t wanted) {
    for (int spins = 0; done.load() < wanted; ++spins)
        if (spins > 1000) std::this_thread::yield();
}

}  // namespace loft_fast
