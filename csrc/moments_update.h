// Streaming moments on the CPU. Plain pointers and sizes: no dependency on any torch version.
#pragma once

#include <cstdint>
#include <vector>

namespace loft_fast {

enum class DType : int { float64 = 0, float32 = 1, float16 = 2, bfloat16 = 3 };

// n rows of d values; element (i, j) lies row_stride * i + col_stride * j elements after data.
struct Rows {
    const void* data;
    DType dtype;
    int64_t n, d, row_stride, col_stride;
};

// total[g] += sum of (x_i - shift[g]), scatter[g] += sum of (x_i - shift[g])(x_i - shift[g])^T over rows i of group g.
// group: n indices below scatter.size(), or null for one group. shift, total: (groups, d). scatter: (d, d) each,
// exactly symmetric before and after. The result does not depend on the number of threads.
void moments_update(const Rows& x, const int64_t* group, const double* shift, double* total,
                    const std::vector<double*>& scatter, int threads);

}  // namespace loft_fast
