// Sums of many symmetric matrices on the CPU.
#pragma once

#include <cstdint>
#include <vector>

namespace loft_fast {

// out += the sum of `matrices`, all d x d and symmetric, added in the order given. Only upper triangles are read; out
// becomes exactly symmetric. The result does not depend on the number of threads.
void symmetric_sum(double* out, const std::vector<const double*>& matrices, int64_t d, int threads);

}  // namespace loft_fast
