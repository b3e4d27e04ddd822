#include "project.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "pair_product.h"
#include "project_tiles.h"

namespace loft_fast {
namespace {

constexpr int64_t kTiles = 2;        // tiles of rows in a block: what is made of a block stays in the cache
constexpr int64_t kChain = 128;      // pairs of bfloat16 numbers added up in one register
constexpr int64_t kSmall = 1 << 21;  // multiply-adds below which a thread costs more than it brings

// How many numbers a kernel multiplies at once, and how they are put together.
template <typename Kernel>
struct Entry {
    static constexpr int numbers = 1;
    static LOFT_INLINE auto of(const typename Kernel::Sum* values) { return *values; }
};
template <>
struct Entry<BFloat16Pairs<kChain>> {
    static constexpr int numbers = 2;
    static LOFT_INLINE Pair of(const float* values) {
        return pair_of(BFloat16(values[0]).bits, BFloat16(values[1]).bits);
    }
};

// A team of threads packs the basis, then everyone takes the next block of rows and does it alone.
template <typename In, typename Kernel>
class Projector {
    using T = typename Kernel::Sum;
    using Packed = typename Kernel::Packed;
    static constexpr int kWidth = Shape<Packed, Kernel::bytes>::width, kHeight = Shape<Packed, Kernel::bytes>::height;
    static constexpr int kNumbers = Entry<Kernel>::numbers;

  public:
    // What one member needs for itself: a block less the center, and its coordinates in the subspace, in slivers.
    struct Scratch {
        Scratch(int64_t rows, int64_t d, int64_t s)
            : centered(rows * entries(d)), coordinates(rows * entries(s)), row(kHeight * entries(d)), values(d + 1) {}
        Aligned<Packed> centered, coordinates;
        Aligned<Packed> row;  // a few rows on their way there
        Aligned<T> values;
    };

    Projector(const Rows& x, const T* basis, const T* center, int64_t s, In* out, int64_t members)
        : x_(x),
          basis_(basis),
          center_(center),
          d_(x.d),
          s_(s),
          out_(out),
          inner_((s + kWidth - 1) / kWidth),
          outer_((x.d + kWidth - 1) / kWidth),
          tiles_((x.n + kWidth - 1) / kWidth),
          depth_(std::clamp<int64_t>(tiles_ / members, 1, kTiles)),
          blocks_((tiles_ + depth_ - 1) / depth_),
          columns_(inner_ * kWidth * entries(x.d)),
          rows_(outer_ * kWidth * entries(s)) {}

    int64_t block_rows() const { return depth_ * kWidth; }
    int64_t blocks() const { return blocks_; }

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch& own) {
        const int64_t panels = inner_ + outer_;
        for (int64_t id; (id = next_panel_.fetch_add(1)) < panels; packed_.fetch_add(1))
            id < inner_ ? pack_columns(id) : pack_rows(id - inner_);
        wait_for(packed_, panels);
        for (int64_t id; (id = next_block_.fetch_add(1)) < blocks_;) run(id * block_rows(), own);
    }

  private:
    static int64_t entries(int64_t length) { return (length + kNumbers - 1) / kNumbers; }

    static Extent extent(int64_t rows, int64_t columns) {
        return {std::min<int64_t>(kWidth, rows), std::min<int64_t>(kWidth, columns), false};
    }

    // Panel p of U, (d, width); past its edges, zeros.
    LOFT_INLINE void pack_columns(int64_t p) {
        const int64_t left = p * kWidth, width = std::min<int64_t>(kWidth, s_ - left);
        Packed* to = columns_.get() + left * entries(d_);
        T values[kWidth * kNumbers] = {};
        for (int64_t k = 0; k < d_; k += kNumbers, to += kWidth) {
            for (int64_t i = 0; i < kNumbers; ++i)
                for (int64_t j = 0; j < width; ++j)
                    values[j * kNumbers + i] = k + i < d_ ? basis_[(k + i) * s_ + left + j] : T(0);
            for (int64_t j = 0; j < kWidth; ++j) to[j] = Entry<Kernel>::of(values + j * kNumbers);
        }
    }

    // A panel of U^T, (s, width).
    LOFT_INLINE void pack_rows(int64_t p) {
        const int64_t left = p * kWidth;
        const int64_t whole = s_ / kNumbers;
        Packed* to = rows_.get() + left * entries(s_);
        for (int64_t j = 0; j < kWidth; ++j) {
            const T* from = basis_ + (left + j) * s_;
            const bool there = left + j < d_;
            for (int64_t k = 0; k < whole; ++k)
                to[k * kWidth + j] = there ? Entry<Kernel>::of(from + k * kNumbers) : Packed(0);
            if (whole < entries(s_)) {
                const T last[kNumbers] = {there ? from[s_ - 1] : T(0)};
                to[whole * kWidth + j] = Entry<Kernel>::of(last);
            }
        }
    }

    LOFT_INLINE void run(int64_t start, Scratch& own) {
        const int64_t n = std::min(block_rows(), x_.n - start);
        Packed *centered = own.centered.get(), *coordinates = own.coordinates.get();
        x_.col_stride == 1 ? center(start, n, 1, own) : center(start, n, x_.col_stride, own);
        alignas(64) T acc[kWidth * kWidth];
        for (int64_t p = 0; p < inner_; ++p)
            for (int64_t top = 0; top < n; top += kWidth) {
                multiply<Kernel>(centered + top * entries(d_), columns_.get() + p * kWidth * entries(d_), entries(d_),
                                 extent(n - top, s_ - p * kWidth), acc);
                store(acc, p * kWidth, coordinates + top * entries(s_));
            }
        for (int64_t p = 0; p < outer_; ++p)
            for (int64_t top = 0; top < n; top += kWidth) {
                multiply<Kernel>(coordinates + top * entries(s_), rows_.get() + p * kWidth * entries(s_), entries(s_),
                                 extent(n - top, d_ - p * kWidth), acc);
                const int64_t left = p * kWidth, width = std::min<int64_t>(kWidth, d_ - left);
                for (int64_t i = 0; i < std::min<int64_t>(kWidth, n - top); ++i)
                    for (int64_t j = 0; j < width; ++j)
                        out_[(start + top + i) * d_ + left + j] =
                            static_cast<In>(acc[i * kWidth + j] + center_[left + j]);
            }
    }

    // A tile of coordinates, from column `left` on, into the slivers of its rows. Columns past the last are zero.
    LOFT_INLINE void store(const T* acc, int64_t left, Packed* to) {
        const int64_t count = entries(std::min<int64_t>(kWidth, s_ - left));
        for (int64_t top = 0; top < kWidth; top += kHeight, to += entries(s_) * kHeight)
            for (int64_t k = 0; k < count; ++k)
                for (int64_t i = 0; i < kHeight; ++i)
                    to[(left / kNumbers + k) * kHeight + i] = Entry<Kernel>::of(acc + (top + i) * kWidth + k * kNumbers);
    }

    // n rows less the center, in slivers of `height` rows, (d, height) each; past the last row of a tile, zeros.
    LOFT_INLINE void center(int64_t start, int64_t n, int64_t stride, Scratch& own) {
        const int64_t whole = (n + kWidth - 1) / kWidth * kWidth, length = entries(d_);
        Packed *to = own.centered.get(), *row = own.row.get();
        T* values = own.values.get();
        values[d_] = 0;
        for (int64_t top = 0; top < whole; top += kHeight, to += length * kHeight) {
            for (int64_t i = 0; i < kHeight; ++i) {
                const In* from = static_cast<const In*>(x_.data) + x_.row_stride * (start + top + i);
                if (top + i < n)
                    for (int64_t k = 0; k < d_; ++k) values[k] = value_of(from[k * stride]) - center_[k];
                else
                    std::fill_n(values, d_, T(0));
                for (int64_t k = 0; k < length; ++k) row[i * length + k] = Entry<Kernel>::of(values + k * kNumbers);
            }
            for (int64_t k = 0; k < length; ++k)
                for (int64_t i = 0; i < kHeight; ++i) to[k * kHeight + i] = row[i * length + k];
        }
    }

    const Rows& x_;
    const T *basis_, *center_;
    const int64_t d_, s_;
    In* out_;
    const int64_t inner_, outer_, tiles_, depth_, blocks_;
    Aligned<Packed> columns_, rows_;
    std::atomic<int64_t> next_panel_{0}, packed_{0}, next_block_{0};
};

template <typename Kernel, typename In>
void run(const Rows& x, const typename Kernel::Sum* basis, const typename Kernel::Sum* center, int64_t s, In* out,
         int threads) {
    if (x.n == 0) return;
    const int64_t affordable = std::min<int64_t>(threads, 1 + x.n * x.d * s / kSmall);
    using Team = Projector<In, Kernel>;
    Team team(x, basis, center, s, out, affordable);
    const int workers = static_cast<int>(std::min(affordable, team.blocks()));
    std::vector<typename Team::Scratch> scratch;
    scratch.reserve(workers);
    for (int i = 0; i < workers; ++i) scratch.emplace_back(team.block_rows(), x.d, s);
    std::atomic<int> arrived{0};
    in_parallel(workers, [&] { work<Kernel::bytes>(team, scratch[arrived.fetch_add(1)]); });
}

template <typename In, typename T>
void dispatch(const Rows& x, const void* basis, const void* center, int64_t s, void* out, int threads) {
    const T *u = static_cast<const T*>(basis), *c = static_cast<const T*>(center);
    In* to = static_cast<In*>(out);
    if constexpr (std::is_same_v<In, BFloat16>) {
        if (instructions() >= Instructions::amx) return project_tiles(x, u, c, s, out, threads);
        if (instructions() >= Instructions::avx512_bf16) return run<BFloat16Pairs<kChain>>(x, u, c, s, to, threads);
    }
    switch (vector_bytes()) {
        case 64: return run<Numbers<T, 64>>(x, u, c, s, to, threads);
        case 32: return run<Numbers<T, 32>>(x, u, c, s, to, threads);
        default: return run<Numbers<T, 16>>(x, u, c, s, to, threads);
    }
}

}  // namespace

void project(const Rows& x, const void* basis, const void* center, int64_t s, void* out, int threads) {
    switch (x.dtype) {
        case DType::float64: return dispatch<double, double>(x, basis, center, s, out, threads);
        case DType::float32: return dispatch<float, float>(x, basis, center, s, out, threads);
        case DType::float16: return dispatch<Float16, float>(x, basis, center, s, out, threads);
        case DType::bfloat16: return dispatch<BFloat16, float>(x, basis, center, s, out, threads);
    }
}

}  // namespace loft_fast
