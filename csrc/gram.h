// Products of the columns of a matrix with those of another one, or with each other.
#pragma once

#include <cstdint>

namespace loft_fast {

// Of `many` matrices, (n, columns) each; strides count numbers.
template <typename T>
struct Matrices {
    const T* data;
    int64_t columns, stride, row_stride, col_stride;
};

// out = X^T Y for each pair, (x.columns, y.columns). y = null: X itself, and out is exactly symmetric. The result does
// not depend on the number of threads.
template <typename T>
void gram(const Matrices<T>& x, const Matrices<T>* y, int64_t many, int64_t n, T* out, int threads);

extern template void gram(const Matrices<float>&, const Matrices<float>*, int64_t, int64_t, float*, int);
extern template void gram(const Matrices<double>&, const Matrices<double>*, int64_t, int64_t, double*, int);

}  // namespace loft_fast
