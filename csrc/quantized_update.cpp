#include "quantized_update.h"

#include "pipeline.h"

namespace loft_fast {
namespace {

struct Exact {
    double inverse;
    int64_t *total, *clipped;
    const std::vector<int64_t*>& product;
};

// Adds blocks of integers, held as float64: whose sums, of 512 products below 2^30, are exact.
template <typename In, int Bytes>
class Quantize {
    static constexpr int kWidth = Shape<double, Bytes>::width;

  public:
    using Input = In;
    using Value = double;
    using State = Exact;
    static constexpr int bytes = Bytes;

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

    LOFT_INLINE void place(const In* values, int64_t stride, int64_t columns, int64_t p, int, int64_t chunk,
                           double* out) {
        constexpr double kShift = 0x1.8p52;  // numbers of this size have no fraction
        double* sum = sums_.data() + (chunk * panels_ + p) * kWidth;
        double clipped = 0;
        for (int64_t j = 0; j < columns; ++j) {
            const double value = value_of(values[(p * kWidth + j) * stride]) * state_.inverse;
            const double above = value < -kLargest ? -kLargest : value, bounded = above > kLargest ? kLargest : above;
            clipped += value == bounded ? 0.0 : 1.0;
            out[j] = (bounded + kShift) - kShift;
            sum[j] += out[j];
        }
        clipped_[chunk] += clipped;
    }

    LOFT_INLINE void finish(const Block& block, int) {
        int64_t* total = state_.total + block.group * d_;
        for (int64_t c = 0; c < chunks_of(block.n); ++c) {
            for (int64_t j = 0; j < d_; ++j) total[j] += static_cast<int64_t>(sums_[c * panels_ * kWidth + j]);
            state_.clipped[block.group] += static_cast<int64_t>(clipped_[c]);
        }
    }

    LOFT_INLINE void fetch(const Block& block, int64_t p, int64_t q) const { tile(block, p, q).fetch(d_); }

    LOFT_INLINE void settle(const Block& block, int, int64_t p, int64_t q, const double* acc) {
        const auto to = tile(block, p, q);
        for (int64_t i = 0; i < to.height; ++i)
            for (int64_t j = 0; j < to.width; ++j) to.corner[i * d_ + j] += static_cast<int64_t>(acc[i * kWidth + j]);
        if (block.last) to.reflect(d_);
    }

  private:
    LOFT_INLINE Tile<kWidth, int64_t> tile(const Block& block, int64_t p, int64_t q) const {
        return {state_.product[block.group], d_, p, q};
    }

    const State state_;
    const int64_t d_, panels_;
    std::vector<double> sums_, clipped_;
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
