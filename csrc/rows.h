// Rows of features as the kernels get them: plain pointers and sizes, no dependency on any torch version.
#pragma once

#include <cstdint>

namespace loft_fast {

enum class DType : int { float64 = 0, float32 = 1, float16 = 2, bfloat16 = 3 };

// n rows of d values; element (i, j) lies row_stride * i + col_stride * j elements after data.
struct Rows {
    const void* data;
    DType dtype;
    int64_t n, d, row_stride, col_stride;
};

}  // namespace loft_fast
