#include "project.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "product.h"

namespace loft_fast {
namespace {

constexpr int64_t kTiles = 4;        // tiles of rows in a block: what is made of a block stays in the cache
constexpr int64_t kSmall = 1 << 21;  // multiply-adds below which a thread costs more than it brings

// A team of threads packs the basis, then everyone takes the next block of rows and does it alone.
template <typename In, typename T, int Bytes>
class Projector {
    static constexpr int kWidth = Shape<T, Bytes>::width, kHeight = Shape<T, Bytes>::height;

  public:
    // What one member needs for itself: a block less the center, and its coordinates in the subspace, in slivers.
    struct Scratch {
        Scratch(int64_t rows, int64_t d, int64_t s) : centered(rows * d), coordinates(rows * s) {}
        Aligned<T> centered, coordinates;
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
          columns_(inner_ * kWidth * x.d),
          rows_(outer_ * kWidth * s) {}

    int64_t block_rows() const { return depth_ * kWidth; }
    int64_t blocks() const { return blocks_; }

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch& own) {
        const int64_t panels = inner_ + outer_;
        for (int64_t id; (id = next_panel_.fetch_add(1)) < panels; packed_.fetch_add(1))
            id < inner_ ? pack_columns(id) : pack_rows(id - inner_);
        while (packed_.load() < panels) std::this_thread::yield();
        for (int64_t id; (id = next_block_.fetch_add(1)) < blocks_;) run(id * block_rows(), own);
    }

  private:
    static Extent extent(int64_t rows, int64_t columns) {
        return {std::min<int64_t>(kWidth, rows), std::min<int64_t>(kWidth, columns), false};
    }

    // A panel of U, (d, width); past its edge, zeros.
    LOFT_INLINE void pack_columns(int64_t p) {
        const int64_t left = p * kWidth, width = std::min<int64_t>(kWidth, s_ - left);
        T* to = columns_.get() + left * d_;
        for (int64_t k = 0; k < d_; ++k, to += kWidth) {
            for (int64_t j = 0; j < width; ++j) to[j] = basis_[k * s_ + left + j];
            std::fill(to + width, to + kWidth, T(0));
        }
    }

    // A panel of U^T, (s, width).
    LOFT_INLINE void pack_rows(int64_t p) {
        const int64_t left = p * kWidth;
        T* to = rows_.get() + left * s_;
        for (int64_t j = 0; j < kWidth; ++j)
            for (int64_t c = 0; c < s_; ++c) to[c * kWidth + j] = left + j < d_ ? basis_[(left + j) * s_ + c] : T(0);
    }

    LOFT_INLINE void run(int64_t start, Scratch& own) {
        const int64_t n = std::min(block_rows(), x_.n - start);
        T* centered = own.centered.get();
        x_.col_stride == 1 ? center(start, n, 1, centered) : center(start, n, x_.col_stride, centered);
        alignas(64) T acc[kWidth * kWidth];
        for (int64_t p = 0; p < inner_; ++p)
            for (int64_t top = 0; top < n; top += kWidth) {
                multiply<Numbers<T, Bytes>>(centered + top * d_, columns_.get() + p * kWidth * d_, d_,
                                            extent(n - top, s_ - p * kWidth), acc);
                T* to = own.coordinates.get() + top * s_;
                for (int64_t i = 0; i < kWidth; ++i)
                    for (int64_t c = p * kWidth; c < std::min(s_, (p + 1) * kWidth); ++c)
                        to[(i / kHeight * s_ + c) * kHeight + i % kHeight] = acc[i * kWidth + c - p * kWidth];
            }
        for (int64_t p = 0; p < outer_; ++p)
            for (int64_t top = 0; top < n; top += kWidth) {
                multiply<Numbers<T, Bytes>>(own.coordinates.get() + top * s_, rows_.get() + p * kWidth * s_, s_,
                                            extent(n - top, d_ - p * kWidth), acc);
                const int64_t left = p * kWidth, width = std::min<int64_t>(kWidth, d_ - left);
                for (int64_t i = 0; i < std::min<int64_t>(kWidth, n - top); ++i)
                    for (int64_t j = 0; j < width; ++j)
                        out_[(start + top + i) * d_ + left + j] =
                            static_cast<In>(acc[i * kWidth + j] + center_[left + j]);
            }
    }

    // n rows less the center, in slivers of `height` rows, (d, height) each; past the last row of a tile, zeros.
    LOFT_INLINE void center(int64_t start, int64_t n, int64_t stride, T* to) {
        const int64_t whole = (n + kWidth - 1) / kWidth * kWidth;
        for (int64_t top = 0; top < whole; top += kHeight, to += d_ * kHeight) {
            for (int64_t i = 0; i < kHeight; ++i) {
                const In* values = static_cast<const In*>(x_.data) + x_.row_stride * (start + top + i);
                if (top + i < n)
                    for (int64_t k = 0; k < d_; ++k) to[k * kHeight + i] = value_of(values[k * stride]) - center_[k];
                else
                    for (int64_t k = 0; k < d_; ++k) to[k * kHeight + i] = T(0);
            }
        }
    }

    const Rows& x_;
    const T *basis_, *center_;
    const int64_t d_, s_;
    In* out_;
    const int64_t inner_, outer_, tiles_, depth_, blocks_;
    Aligned<T> columns_, rows_;
    std::atomic<int64_t> next_panel_{0}, packed_{0}, next_block_{0};
};

template <typename In, typename T, int Bytes>
void run(const Rows& x, const T* basis, const T* center, int64_t s, In* out, int threads) {
    const int64_t affordable = std::min<int64_t>(threads, 1 + x.n * x.d * s / kSmall);
    using Team = Projector<In, T, Bytes>;
    Team team(x, basis, center, s, out, affordable);
    const int workers = static_cast<int>(std::min(affordable, team.blocks()));
    std::vector<typename Team::Scratch> scratch;
    scratch.reserve(workers);
    for (int i = 0; i < workers; ++i) scratch.emplace_back(team.block_rows(), x.d, s);
    std::atomic<int> arrived{0};
    in_parallel(workers, [&] { work<Bytes>(team, scratch[arrived.fetch_add(1)]); });
}

template <typename In, typename T>
void dispatch(const Rows& x, const void* basis, const void* center, int64_t s, void* out, int threads) {
    const T *u = static_cast<const T*>(basis), *c = static_cast<const T*>(center);
    switch (vector_bytes()) {
        case 64: return run<In, T, 64>(x, u, c, s, static_cast<In*>(out), threads);
        case 32: return run<In, T, 32>(x, u, c, s, static_cast<In*>(out), threads);
        default: return run<In, T, 16>(x, u, c, s, static_cast<In*>(out), threads);
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
