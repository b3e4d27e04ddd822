// Columns of a matrix in panels, and the products of all of them with each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "aligned.h"
#include "parallel.h"
#include "product.h"

namespace loft_fast {

// `rows` rows of panels, (rows, width) each; past the last column, zeros.
template <typename T, int Bytes>
class Panels {
  public:
    static constexpr int width = Shape<T, Bytes>::width, height = Shape<T, Bytes>::height;
    static constexpr int64_t count_of(int64_t columns) { return (columns + width - 1) / width; }

    Panels(int64_t count, int64_t rows) : count_(count), rows_(rows), data_(count * width * rows) {}

    int64_t count() const { return count_; }
    T* at(int64_t p, int64_t row = 0) const { return data_.get() + (p * rows_ + row) * width; }

    // Rows start .. start + rows of panel p as a left operand: slivers of `height` columns, (rows, height) each.
    LOFT_INLINE void cut(int64_t p, int64_t start, int64_t rows, T* to) const {
        for (int s = 0; s < width; s += height) {
            const T* from = at(p, start) + s;
            for (int64_t r = 0; r < rows; ++r, from += width, to += height) std::copy_n(from, height, to);
        }
    }

    // The product of these slivers with the same rows of panel q.
    LOFT_INLINE void multiply_by(const T* slivers, int64_t q, int64_t start, int64_t rows, T* acc) const {
        if (rows == 0) std::fill_n(acc, width * width, T(0));
        multiply<Numbers<T, Bytes>>(slivers, at(q, start), rows, {width, width, false}, acc);
    }

    // out, (columns, columns) and exactly symmetric: the products of panels first, first + 1, ... with each other. Every
    // member of a team calls it, with slivers of its own; `next` is the panel that nobody has taken yet, less first.
    LOFT_INLINE void multiply_all(int64_t first, int64_t columns, std::atomic<int64_t>& next, T* slivers, T* out) const {
        alignas(64) T acc[width * width];
        for (int64_t p; (p = next.fetch_add(1)) < count_of(columns);) {
            cut(first + p, 0, rows_, slivers);
            const int64_t top = p * width, tall = std::min<int64_t>(width, columns - top);
            for (int64_t left = top, q = p; left < columns; left += width, ++q) {
                multiply_by(slivers, first + q, 0, rows_, acc);
                const int64_t wide = std::min<int64_t>(width, columns - left);
                for (int64_t i = 0; i < tall; ++i)
                    for (int64_t j = p == q ? i : 0; j < wide; ++j) out[(top + i) * columns + left + j] = acc[i * width + j];
                for (int64_t j = 0; j < wide; ++j)
                    for (int64_t i = 0; i < (p == q ? std::min(j, tall) : tall); ++i)
                        out[(left + j) * columns + top + i] = acc[i * width + j];
            }
        }
    }

  private:
    const int64_t count_, rows_;
    Aligned<T> data_;
};

}  // namespace loft_fast
