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

// Merge the rows of every group g into its running count[g], mean[g] (d values) and scatter[g] (d x d, the sum of
// (x - mean)(x - mean)^T; exactly symmetric before and after).
// group: n indices below scatter.size(), or null for one group. The result does not depend on the number of threads.
void moments_update(const Rows& x, const int64_t* group, int64_t* count, double* mean,
                    const std::vector<double*>& scatter, int threads);

}  // namespace loft_fast
