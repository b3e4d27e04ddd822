// Projection of rows onto an affine subspace on the CPU.
#pragma once

#include <cstdint>

#include "rows.h"

namespace loft_fast {

// out = center + (x - center) U U^T, row by row, in one pass.
// basis: U, d x s, and center: d values, contiguous; both float64 if x is, float32 otherwise.
// out: n x d values of x's type, contiguous, no part of x. The result does not depend on the number of threads.
void project(const Rows& x, const void* basis, const void* center, int64_t s, void* out, int threads);

}  // namespace loft_fast
