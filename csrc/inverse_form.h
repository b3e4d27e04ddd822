// Forms of an inverse that is not made: elimination in a bordered matrix.
#pragma once

#include <cstdint>

namespace loft_fast {

// out = U^T N^-1 U, s x s and exactly symmetric, for each of `many` pairs: N, d x d, symmetric, of which the upper
// triangle is read, and U, d x s; all contiguous. positive[i]: whether N is positive definite; otherwise `out` holds
// anything. The result does not depend on the number of threads.
void inverse_form(const double* matrix, const double* border, int64_t many, int64_t d, int64_t s, double* out,
                  bool* positive, int threads);

}  // namespace loft_fast
