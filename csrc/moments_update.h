// Streaming moments on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace loft_fast {

// Merge the rows of every group g into its running count[g], mean[g] (d values) and scatter[g] (d x d, the sum of
// (x - mean)(x - mean)^T; exactly symmetric before and after). Of a group with rows, of which count[g] is zero, neither
// mean nor scatter is read.
// group: n indices below scatter.size(), or null for one group. The result does not depend on the number of threads.
void moments_update(const Rows& x, const int64_t* group, int64_t* count, double* mean,
                    const std::vector<double*>& scatter, int threads);

}  // namespace loft_fast
