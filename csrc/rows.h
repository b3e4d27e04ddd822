// Rows of features as the kernels get them: plain pointers and sizes, no dependency on any torch version.
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

// Rows by group: those of group g are at the positions begin[g] .. begin[g + 1].
struct Sorted {
    std::vector<int64_t> begin;
    std::vector<int64_t> order;  // which row is at a position; empty where that is the row of this number

    int64_t groups() const { return static_cast<int64_t>(begin.size()) - 1; }
    int64_t row(int64_t position) const { return order.empty() ? position : order[position]; }
};

// group: for each row an index below `groups`, or null for one group.
inline Sorted sort_rows(int64_t n, const int64_t* group, int64_t groups) {
    if (!group) return {{0, n}, {}};
    Sorted sorted{std::vector<int64_t>(groups + 1, 0), std::vector<int64_t>(n)};
    for (int64_t i = 0; i < n; ++i) ++sorted.begin[group[i] + 1];
    for (int64_t g = 0; g < groups; ++g) sorted.begin[g + 1] += sorted.begin[g];
    std::vector<int64_t> next(sorted.begin.begin(), sorted.begin.end() - 1);
    for (int64_t i = 0; i < n; ++i) sorted.order[next[group[i]]++] = i;
    return sorted;
}

}  // namespace loft_fast
