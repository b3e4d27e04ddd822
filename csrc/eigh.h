// Eigenvectors of symmetric matrices.
#pragma once

#include <cstdint>

namespace loft_fast {

// Of `many` matrices, (d, d) each in rows without gaps, of which the upper half is read: eigenvalues, d in ascending
// order, and eigenvectors, (d, d) in columns. False where some number is not finite, or it does not converge.
bool eigh(const float* matrix, int64_t many, int64_t d, float* values, float* vectors, int threads);

}  // namespace loft_fast
