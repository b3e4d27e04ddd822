#include "quantized_update.h"

#include <cstring>

#include "pair_product.h"
#include "pipeline.h"

namespace loft_fast {
namespace {

struct Exact {
    double inverse;
    int64_t *total, *clipped;
    const std::vector<int64_t*>& product;
};

// Adds blocks of integers: exact, whatever is added first.
template <typename In, int Bytes>
class Quantize {
    static constexpr int kWidth = Shape<Pair, Bytes>::width;
    static_assert(kBlock * kLargest * 128 <= INT32_MAX, "products with the parts of `low_of` and `high_of` must fit");

  public:
    using Input = In;
    using Value = Pair;
    using State = Exact;
    static constexpr int bytes = Bytes, fold = 2, parts = 2;

    Quantize(const Source<In>& source, const State& state, int64_t rows)
        : state_(state),
          d_(source.x.d),
          panels_(panels_of(d_, kWidth)),
          sums_(chunks_of(rows) * panels_ * kWidth),
          clipped_(chunks_of(rows)) {}

    int64_t preparations() const { return 0; }
    LOFT_INLINE void prepare(const Block&, int, int64_t) {}

    LOFT_INLINE void open(int64_t chunk) {
        std::fill_n(sums_.data() + chunk * panels_ * kWidth, panels_ * kWidth, 0.0);
        clipped_[chunk] = 0;
    }

    LOFT_INLINE void place(const std::array<const In*, 2>& rows, int64_t stride, int64_t columns, int64_t p, int,
                           int64_t chunk, Pair* out) {
        int64_t first[kWidth], second[kWidth] = {};
        quantize(rows[0], stride, columns, p, chunk, first);
        if (rows[1]) quantize(rows[1], stride, columns, p, chunk, second);
        for (int64_t j = 0; j < columns; ++j)
            out[j] = pair_of(static_cast<int32_t>(first[j]), static_cast<int32_t>(second[j]));
    }

    static LOFT_INLINE void part(const Pair* from, int k, Pair* to) {
        constexpr int kCount = 2 * Shape<Pair, Bytes>::height;
        int16_t numbers[kCount];
        std::memcpy(numbers, from, sizeof numbers);
        if (k == 0)
            for (int i = 0; i < kCount; ++i) numbers[i] = low_of(numbers[i]);
        else
            for (int i = 0; i < kCount; ++i) numbers[i] = high_of(numbers[i]);
        std::memcpy(to, numbers, sizeof numbers);
    }

    static LOFT_INLINE void multiply(const Pair* left, const Pair* right, int64_t pairs, int32_t* acc) {
        multiply_pairs<Bytes>(left, right, pairs, acc);
    }

    LOFT_INLINE void finish(const Block& block, int) {
        int64_t* total = state_.total + block.group * d_;
        for (int64_t c = 0; c < chunks_of(block.n); ++c) {
            for (int64_t j = 0; j < d_; ++j) total[j] += static_cast<int64_t>(sums_[c * panels_ * kWidth + j]);
            state_.clipped[block.group] += clipped_[c];
        }
    }

    LOFT_INLINE void fetch(const Block& block, int64_t p, int64_t q) const { tile(block, p, q).fetch(d_); }

    LOFT_INLINE void settle(const Block& block, int, int64_t p, int64_t q, const int32_t* low) {
        const int32_t* high = low + kWidth * kWidth;
        const auto to = tile(block, p, q);
        for (int64_t i = 0; i < to.height; ++i)
            for (int64_t j = 0; j < to.width; ++j) {
                const int64_t at = i * kWidth + j;
                to.corner[i * d_ + j] += 256 * static_cast<int64_t>(high[at]) + low[at];
            }
        if (block.last) to.reflect(d_);
    }

  private:
    // Columns of a row as integers, in the low halves of `out`. They are added to the sums; clipped ones are counted.
    LOFT_INLINE void quantize(const In* row, int64_t stride, int64_t columns, int64_t p, int64_t chunk, int64_t* out) {
        constexpr double kShift = 0x1.8p52;  // numbers of this size have no fraction, and their integer in the low bits
        const In* values = row + p * kWidth * stride;
        double* sum = sums_.data() + (chunk * panels_ + p) * kWidth;
        int64_t clipped = 0;
        for (int64_t j = 0; j < columns; ++j) {
            const double value = value_of(values[j * stride]) * state_.inverse;
            const double above = value < -kLargest ? -kLargest : value, bounded = above > kLargest ? kLargest : above;
            const double shifted = bounded + kShift;
            clipped += value != bounded;
            sum[j] += shifted - kShift;
            std::memcpy(out + j, &shifted, sizeof shifted);
        }
        clipped_[chunk] += clipped;
    }

    LOFT_INLINE Tile<kWidth, int64_t> tile(const Block& block, int64_t p, int64_t q) const {
        return {state_.product[block.group], d_, p, q};
    }

    const State state_;
    const int64_t d_, panels_;
    std::vector<double> sums_;
    std::vector<int64_t> clipped_;
};

template <typename In>
void dispatch(const Rows& x, const int64_t* group, int64_t* count, const Exact& state, int threads) {
    const auto groups = static_cast<int64_t>(state.product.size());
    switch (vector_bytes()) {
        case 64: return run_pipeline<Quantize<In, 64>>(x, group, groups, count, state, threads);
        case 32: return run_pipeline<Quantize<In, 32>>(x, group, groups, count, state, threads);
        default: return run_pipeline<Quantize<In, 16>>(x, group, groups, count, state, threads);
    }
}

}  // namespace

void quantized_update(const Rows& x, double inverse, const int64_t* group, int64_t* count, int64_t* total,
                      int64_t* clipped, const std::vector<int64_t*>& product, int threads) {
    const Exact state{inverse, total, clipped, product};
    switch (x.dtype) {
        case DType::float64: return dispatch<double>(x, group, count, state, threads);
        case DType::float32: return dispatch<float>(x, group, count, state, threads);
        case DType::float16: return dispatch<Float16>(x, group, count, state, threads);
        case DType::bfloat16: return dispatch<BFloat16>(x, group, count, state, threads);
    }
}

}  // namespace loft_fast
