#include "quantized_update.h"

#include <cstring>

#include "matrix_tiles.h"
#include "pipeline.h"
#include "strips.h"

namespace loft_fast {
namespace {

struct Exact {
    double inverse;
    int64_t *total, *clipped;
    const std::vector<int64_t*>& product;
};

// Pairs of integers, of which left operands are multiplied in two parts.
template <int Bytes, bool Fused>
struct Pairs {
    struct Halves {
        static constexpr int count = 2;
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
    };

    static constexpr int fold = 2;
    static constexpr int64_t block = 512;
    static_assert(block * kLargest * 128 <= INT32_MAX, "products with either part must fit");
    using Form = Strips<IntegerPairs<Bytes, Fused>, fold, Halves>;

    // Integers of a column, of `fold` rows, in a panel.
    static LOFT_INLINE void put(const int64_t (&rows)[fold][Form::width], int64_t columns, Pair* out) {
        for (int64_t j = 0; j < columns; ++j)
            out[j] = pair_of(static_cast<int32_t>(rows[0][j]), static_cast<int32_t>(rows[1][j]));
    }

    static LOFT_INLINE int64_t sum(const int32_t* low) {
        return 256 * static_cast<int64_t>(low[Form::width * Form::width]) + *low;
    }
};

// Their bytes, for processors that multiply matrices of these.
struct Bytes {
    static constexpr int fold = 4;
    static constexpr int64_t block = 1024;
    static_assert(block * 255 * 255 <= INT32_MAX, "products of bytes must fit");
    using Form = IntegerTiles;

    static LOFT_INLINE void put(const int64_t (&rows)[fold][Form::width], int64_t columns, int32_t* out) {
        for (int64_t j = 0; j < columns; ++j) {
            uint32_t high = 0, low = 0;
            for (int r = 0; r < fold; ++r) {
                const auto bits = static_cast<uint32_t>(rows[r][j]);
                high |= (bits >> 8 & 0xffu) << 8 * r;
                low |= (bits & 0xffu) << 8 * r;
            }
            out[j] = static_cast<int32_t>(high);
            out[Form::kPlane + j] = static_cast<int32_t>(low);
        }
    }

    static LOFT_INLINE int64_t sum(const int32_t* high) {
        constexpr int kNext = Form::width * Form::width;
        return (static_cast<int64_t>(high[0]) << 16) + (static_cast<int64_t>(high[kNext]) << 8) + high[2 * kNext];
    }
};

// Adds blocks of integers: exact, whatever is added first. Packing: Pairs or Bytes.
template <typename In, typename Packing>
class Quantize {
    static constexpr int kWidth = Packing::Form::width;

  public:
    using Input = In;
    using Form = typename Packing::Form;
    using State = Exact;
    static constexpr int64_t block = Packing::block;

    Quantize(const Source<In>& source, const State& state, int64_t rows)
        : state_(state),
          d_(source.x.d),
          panels_(panels_of(d_, kWidth)),
          sums_(chunks_of(rows) * panels_ * kWidth),
          clipped_(chunks_of(rows)),
          total_(d_) {}

    int64_t preparations() const { return 0; }
    LOFT_INLINE void prepare(const Block&, int, int64_t) {}

    LOFT_INLINE void open(int64_t chunk) {
        std::fill_n(sums_.data() + chunk * panels_ * kWidth, panels_ * kWidth, 0.0);
        clipped_[chunk] = 0;
    }

    LOFT_INLINE void place(const std::array<const In*, kRows>& rows, int64_t count, int64_t stride, int64_t columns,
                           int64_t p, int, int64_t chunk, int32_t* out) {
        for (int64_t r = 0; r < count; r += Packing::fold, out += kWidth) {
            int64_t numbers[Packing::fold][kWidth] = {};
            for (int64_t i = 0; i < std::min<int64_t>(Packing::fold, count - r); ++i)
                quantize(rows[r + i], stride, columns, p, chunk, numbers[i]);
            Packing::put(numbers, columns, out);
        }
    }

    LOFT_INLINE void finish(const Block& block, int) {
        if (block.first) {
            std::fill(total_.begin(), total_.end(), 0);
            all_clipped_ = 0;
        }
        for (int64_t c = 0; c < chunks_of(block.n); ++c) {
            for (int64_t j = 0; j < d_; ++j) total_[j] += static_cast<int64_t>(sums_[c * panels_ * kWidth + j]);
            all_clipped_ += clipped_[c];
        }
    }

    void close(const Block& block) const {
        for (int64_t j = 0; j < d_; ++j) state_.total[block.group * d_ + j] += total_[j];
        state_.clipped[block.group] += all_clipped_;
    }

    LOFT_INLINE void fetch(const Block& block, int64_t p, int64_t q) const { tile(block, p, q).fetch(d_); }

    LOFT_INLINE void settle(const Block& block, int, int64_t p, int64_t q, const int32_t* acc) {
        const auto to = tile(block, p, q);
        for (int64_t i = 0; i < to.height; ++i)
            for (int64_t j = 0; j < to.width; ++j) to.corner[i * d_ + j] += Packing::sum(acc + i * kWidth + j);
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
    std::vector<int64_t> clipped_;  // of each chunk
    std::vector<int64_t> total_;    // of the group so far
    int64_t all_clipped_ = 0;
};

template <typename In>
void dispatch(const Rows& x, const Sorted& sorted, int64_t* count, const Exact& state, int threads) {
    const Instructions has = instructions();
    if (has >= Instructions::amx) return run_pipeline<Quantize<In, Bytes>>(x, sorted, count, state, threads);
    if (has >= Instructions::avx512_vnni)
        return run_pipeline<Quantize<In, Pairs<64, true>>>(x, sorted, count, state, threads);
    switch (vector_bytes()) {
        case 64: return run_pipeline<Quantize<In, Pairs<64, false>>>(x, sorted, count, state, threads);
        case 32: return run_pipeline<Quantize<In, Pairs<32, false>>>(x, sorted, count, state, threads);
        default: return run_pipeline<Quantize<In, Pairs<16, false>>>(x, sorted, count, state, threads);
    }
}

}  // namespace

void quantized_update(const Rows& x, double inverse, const int64_t* group, int64_t* count, int64_t* total,
                      int64_t* clipped, const std::vector<int64_t*>& product, int threads) {
    const Exact state{inverse, total, clipped, product};
    const Sorted sorted = sort_rows(x.n, group, static_cast<int64_t>(product.size()));
    switch (x.dtype) {
        case DType::float64: return dispatch<double>(x, sorted, count, state, threads);
        case DType::float32: return dispatch<float>(x, sorted, count, state, threads);
        case DType::float16: return dispatch<Float16>(x, sorted, count, state, threads);
        case DType::bfloat16: return dispatch<BFloat16>(x, sorted, count, state, threads);
    }
}

}  // namespace loft_fast
