// Threads for the kernels.
#pragma once

#include <functional>

namespace loft_fast {

// Run task() in up to `threads` threads at once, the caller's among them, and wait for all. There may be fewer.
void in_parallel(int threads, const std::function<void()>& task);

}  // namespace loft_fast
