// Panels of whole rows, which are multiplied strip by strip in vector registers.
#pragma once

#include "product.h"

namespace loft_fast {

// Packed numbers as they are.
template <typename Kernel>
struct Whole {
    using Packed = typename Kernel::Packed;
    static constexpr int count = 1;
    static LOFT_INLINE void part(const Packed* from, int, Packed* to) {
        std::copy_n(from, Shape<Packed, Kernel::bytes>::height, to);
    }
};

// A form of a job's panels (pipeline.h) for kernels such as Numbers and IntegerPairs.
//     Fold                          rows that share a packed number
//     Parts::count, part(from, k, to)   what a packed number is made of: that many numbers, which are multiplied one
//                                   after another; those of one row of a sliver
template <typename Kernel, int Fold = 1, typename Parts = Whole<Kernel>>
struct Strips {
    using Packed = typename Kernel::Packed;
    using Sum = typename Kernel::Sum;
    static constexpr int bytes = Kernel::bytes, width = Shape<Packed, bytes>::width, sums = Parts::count;
    struct Session {};

    static constexpr int64_t size(int64_t rows) { return packed(rows) * width; }
    static constexpr int64_t offset(int64_t row) { return row / Fold * width; }
    static constexpr int64_t left_size(int64_t rows) { return sums * size(rows); }

    static LOFT_INLINE void blank(int64_t rows, int64_t column, Packed* out) {
        for (int64_t r = 0; r < packed(rows); ++r) std::fill(out + r * width + column, out + (r + 1) * width, Packed(0));
    }
    static LOFT_INLINE void end(int64_t, Packed*) {}

    static LOFT_INLINE void cut(const Packed* panel, int64_t rows, Packed* left) {
        constexpr int kHeight = Shape<Packed, bytes>::height;
        for (int k = 0; k < sums; ++k)
            for (int s = 0; s < width; s += kHeight) {
                const Packed* from = panel + s;
                for (int64_t r = 0; r < packed(rows); ++r, from += width, left += kHeight) Parts::part(from, k, left);
            }
    }

    static LOFT_INLINE void multiply(const Packed* left, const Packed* right, int64_t rows, const Extent& extent,
                                     Sum* acc) {
        for (int k = 0; k < sums; ++k)
            loft_fast::multiply<Kernel>(left + k * size(rows), right, packed(rows), extent, acc + k * width * width);
    }

  private:
    static constexpr int64_t packed(int64_t rows) { return (rows + Fold - 1) / Fold; }
};

}  // namespace loft_fast
