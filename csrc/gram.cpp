#include "gram.h"

#include "panels.h"
#include "teams.h"

namespace loft_fast {
namespace {

// Rows and panels of X that a panel of Y, once it is in the cache, is multiplied by.
constexpr int64_t kRows = 512, kTogether = 4;

template <typename T, int Bytes>
class Gram {
    using Block = Panels<T, Bytes>;

  public:
    struct Scratch {
        explicit Scratch(const Gram& team)
            : slivers(Block::width * std::max(team.n_, team.together_ * std::min(kRows, team.n_))) {}
        Aligned<T> slivers;
    };

    Gram(const Matrices<T>& x, const Matrices<T>* y, int64_t i, int64_t n, T* out, int threads)
        : x_(x),
          y_(y),
          i_(i),
          n_(n),
          out_(out),
          left_(Block::count_of(x.columns)),
          together_(std::clamp<int64_t>(left_ / (3 * threads), 1, kTogether)),
          panels_(left_ + (y ? Block::count_of(y->columns) : 0), n) {}

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch& own) {
        for (int64_t p; (p = next_panel_.fetch_add(1)) < panels_.count(); packed_.fetch_add(1))
            p < left_ ? pack(x_, p, panels_.at(p)) : pack(*y_, p - left_, panels_.at(p));
        wait_for(packed_, panels_.count());
        if (!y_) return panels_.multiply_all(0, x_.columns, next_, own.slivers.get(), out_);
        for (int64_t p; (p = next_.fetch_add(together_)) < left_;)
            for (int64_t start = 0; start < std::max<int64_t>(n_, 1); start += kRows)
                multiply_some(p, std::min(left_, p + together_), start, own.slivers.get());
    }

  private:
    // Add products over some rows of panels p .. end of X with all of Y.
    LOFT_INLINE void multiply_some(int64_t p, int64_t end, int64_t start, T* slivers) {
        constexpr int kWidth = Block::width;
        const int64_t rows = std::min(kRows, n_ - start);
        for (int64_t i = p; i < end; ++i) panels_.cut(i, start, rows, slivers + (i - p) * kWidth * rows);
        alignas(64) T acc[kWidth * kWidth];
        for (int64_t q = left_; q < panels_.count(); ++q)
            for (int64_t i = p; i < end; ++i) {
                panels_.multiply_by(slivers + (i - p) * kWidth * rows, q, start, rows, acc);
                const int64_t top = i * kWidth, tall = std::min<int64_t>(kWidth, x_.columns - top);
                const int64_t left = (q - left_) * kWidth, wide = std::min<int64_t>(kWidth, y_->columns - left);
                for (int64_t r = 0; r < tall; ++r) {
                    T* to = out_ + (top + r) * y_->columns + left;
                    if (start == 0) std::fill_n(to, wide, T(0));
                    for (int64_t j = 0; j < wide; ++j) to[j] += acc[r * kWidth + j];
                }
            }
    }

    LOFT_INLINE void pack(const Matrices<T>& from, int64_t p, T* to) const {
        const int64_t left = p * Block::width, wide = std::min<int64_t>(Block::width, from.columns - left);
        const T* corner = from.data + i_ * from.stride + left * from.col_stride;
        if (from.col_stride == 1) return pack(corner, from.row_stride, 1, wide, to);
        if (from.row_stride == 1) return pack(corner, 1, from.col_stride, wide, to);
        pack(corner, from.row_stride, from.col_stride, wide, to);
    }

    // A cache line of every column at a time, where that is what a column's numbers share.
    LOFT_INLINE void pack(const T* from, int64_t row_stride, int64_t col_stride, int64_t wide, T* to) const {
        constexpr int64_t kLine = 64 / sizeof(T);
        for (int64_t r = 0; r < n_; ++r) std::fill(to + r * Block::width + wide, to + (r + 1) * Block::width, T(0));
        for (int64_t top = 0; top < n_; top += kLine) {
            const int64_t end = std::min(n_, top + kLine);
            if (col_stride == 1)
                for (int64_t r = top; r < end; ++r) std::copy_n(from + r * row_stride, wide, to + r * Block::width);
            else
                for (int64_t j = 0; j < wide; ++j)
                    for (int64_t r = top; r < end; ++r)
                        to[r * Block::width + j] = from[r * row_stride + j * col_stride];
        }
    }

    const Matrices<T>& x_;
    const Matrices<T>* y_;
    const int64_t i_, n_;
    T* out_;
    const int64_t left_, together_;  // panels of X, and how many of them one member takes
    Block panels_;
    std::atomic<int64_t> next_panel_{0}, packed_{0}, next_{0};
};

template <int Bytes, typename T>
void run(const Matrices<T>& x, const Matrices<T>* y, int64_t many, int64_t n, T* out, int threads) {
    const int64_t columns = y ? y->columns : x.columns, size = x.columns * columns;
    run_teams<Bytes>(many, n * size / (y ? 1 : 2), threads,
                     [&](int64_t i) { return Gram<T, Bytes>(x, y, i, n, out + i * size, threads); });
}

}  // namespace

template <typename T>
void gram(const Matrices<T>& x, const Matrices<T>* y, int64_t many, int64_t n, T* out, int threads) {
    switch (vector_bytes()) {
        case 64: return run<64>(x, y, many, n, out, threads);
        case 32: return run<32>(x, y, many, n, out, threads);
        default: return run<16>(x, y, many, n, out, threads);
    }
}

template void gram(const Matrices<float>&, const Matrices<float>*, int64_t, int64_t, float*, int);
template void gram(const Matrices<double>&, const Matrices<double>*, int64_t, int64_t, double*, int);

}  // namespace loft_fast
