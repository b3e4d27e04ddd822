// Exact moments of quantised rows on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace loft_fast {

constexpr int64_t kLargest = 32767;  // of a quantised number

// Add the rows of every group g, each number x as q = x / scale, rounded half to even and clipped to +-32767, to
// count[g], total[g] = sum q (d values) and product[g] = sum q q^T (d x d); and to clipped[g] how many were clipped.
// inverse: 1 / scale, a power of two. group: n indices below product.size(), or null for one group.
void quantized_update(const Rows& x, double inverse, const int64_t* group, int64_t* count, int64_t* total,
                      int64_t* clipped, const std::vector<int64_t*>& product, int threads);

}  // namespace loft_fast
