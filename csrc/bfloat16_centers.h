// What to subtract from bfloat16 rows, so that their differences are bfloat16 numbers again.
#pragma once

#include <vector>

#include "rows.h"

namespace loft_fast {

// Pairs of rows whose products may be added up in float32 before the sum goes on: the longer, the faster.
constexpr int64_t kLongChain = 128, kShortChain = 64;

struct BFloat16Centers {
    // For each group and column, (groups, width) with zeros from column d on: zero, or where the column lies far from
    // zero a bfloat16 number near its mean, of which every row differs by a bfloat16 number.
    std::vector<float> values;
    // The longest with which products of these differences give each group's covariance to about 1e-6 of its norm; zero
    // if none does.
    int64_t chain;
};

BFloat16Centers bfloat16_centers(const Rows& x, const Sorted& sorted, int64_t width, int threads);

}  // namespace loft_fast
