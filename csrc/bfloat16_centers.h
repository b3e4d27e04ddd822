// What to subtract from bfloat16 rows, so that their differences are bfloat16 numbers again.
#pragma once

#include "rows.h"

namespace loft_fast {

// For each group and column a center, (groups, width) with zeros from column d on: zero, or where the column lies far
// from zero a bfloat16 number near its mean, of which every row differs by a bfloat16 number. Empty if nothing serves:
// then products of these differences, added up in float32, would not give each group's covariance to about 1e-6 of its
// norm.
std::vector<float> bfloat16_centers(const Rows& x, const Sorted& sorted, int64_t width, int threads);

}  // namespace loft_fast
