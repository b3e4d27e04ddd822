// What the processor's multiply-adders can do, to measure the kernels against.
#pragma once

#include <cstdint>

namespace loft_fast {

// At least `count` float32 multiply-adds on numbers in registers, shared out to the threads.
void multiply_adds(int64_t count, int threads);

}  // namespace loft_fast
