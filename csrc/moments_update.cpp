#include "moments_update.h"

#include <cmath>

#include "pipeline.h"

namespace loft_fast {
namespace {

constexpr int64_t kSample = 8;  // every so many rows, one goes into a block's reference
constexpr int64_t kWide = 8;    // panels sampled in a step

struct Running {
    double* mean;
    const std::vector<double*>& scatter;
};

// Merges blocks into running means and scatters.
template <typename In, typename T, int Bytes>
class Merge {
    static constexpr int kWidth = Shape<T, Bytes>::width;

  public:
    using Input = In;
    using Value = T;
    using State = Running;
    static constexpr int bytes = Bytes, fold = 1, parts = 1;

    Merge(const Source<In>& source, const State& state, int64_t rows)
        : source_(source),
          state_(state),
          d_(source.x.d),
          panels_(panels_of(d_, kWidth)),
          sums_(chunks_of(rows) * panels_ * kWidth),
          origin_(d_),
          mean_(d_) {
        for (Slot& slot : slots_) {
            slot.center.resize(panels_ * kWidth);
            slot.within.resize(panels_ * kWidth);
            slot.between.resize(panels_ * kWidth);
        }
    }

    int64_t preparations() const { return (panels_ + kWide - 1) / kWide; }

    // The reference of a block's products: the mean of every eighth row, rounded as T. An eighth of the rows have their
    // mean within sqrt(7) standard deviations of that of all, whatever the data: so the products keep their digits.
    LOFT_INLINE void prepare(const Block& block, int slot, int64_t step) {
        const int64_t left = step * kWide * kWidth, columns = std::min(d_ - left, kWide * kWidth);
        const int64_t stride = source_.x.col_stride;
        const In* first = source_.row(block.start) + stride * left;
        double sum[kWide * kWidth] = {};
        for (int64_t r = kSample; r < block.n; r += kSample) {
            const In* values = source_.row(block.start + r) + stride * left;
            for (int64_t j = 0; j < columns; ++j)
                sum[j] += static_cast<double>(value_of(values[j * stride])) - value_of(first[j * stride]);
        }
        const auto n = static_cast<double>((block.n + kSample - 1) / kSample);
        T* center = slots_[slot].center.data() + left;
        for (int64_t j = 0; j < columns; ++j) center[j] = static_cast<T>(value_of(first[j * stride]) + sum[j] / n);
    }

    LOFT_INLINE void open(int64_t chunk) {
        std::fill_n(sums_.data() + chunk * panels_ * kWidth, panels_ * kWidth, 0.0);
    }

    // Rows less the reference of their block; and their sum.
    LOFT_INLINE void place(const std::array<const In*, 1>& rows, int64_t stride, int64_t columns, int64_t p, int slot,
                           int64_t chunk, T* out) {
        const In* values = rows[0];
        const T* center = slots_[slot].center.data() + p * kWidth;
        double* sum = sums_.data() + (chunk * panels_ + p) * kWidth;
        for (int64_t j = 0; j < columns; ++j) {
            const T value = value_of(values[(p * kWidth + j) * stride]);
            out[j] = value - center[j];
            sum[j] += static_cast<double>(value) - center[j];  // exact: means are float64, whatever the rows are
        }
    }

    // The scatter about the state's mean is that about the reference less `within` plus `between`, each a vector times
    // itself (Chan, Golub and LeVeque). Means are offsets from the group's first row until the end: however large they
    // are, they keep their digits.
    LOFT_INLINE void finish(const Block& block, int which) {
        Slot& slot = slots_[which];
        double* state = state_.mean + block.group * d_;
        if (block.first) {
            const In* values = source_.row(block.start);
            for (int64_t j = 0; j < d_; ++j) {
                origin_[j] = value_of(values[j * source_.x.col_stride]);
                mean_[j] = block.before ? state[j] - origin_[j] : 0.0;
            }
        }
        const auto n = static_cast<double>(block.n), before = static_cast<double>(block.before), total = before + n;
        for (int64_t j = 0; j < d_; ++j) {
            double sum = 0;
            for (int64_t c = 0; c < chunks_of(block.n); ++c) sum += sums_[c * panels_ * kWidth + j];
            const double center = slot.center[j] - origin_[j] + sum / n;
            const double delta = block.before ? center - mean_[j] : 0.0;
            slot.within[j] = sum / std::sqrt(n);
            slot.between[j] = delta * std::sqrt(before * n / total);
            mean_[j] = block.before ? mean_[j] + delta * (n / total) : center;
            if (block.last) state[j] = origin_[j] + mean_[j];
        }
    }

    static LOFT_INLINE void part(const T* from, int, T* to) { std::copy_n(from, Shape<T, Bytes>::height, to); }

    static LOFT_INLINE void multiply(const T* left, const T* right, int64_t rows, T* acc) {
        loft_fast::multiply<T, Bytes>(left, right, rows, acc);
    }

    LOFT_INLINE void fetch(const Block& block, int64_t p, int64_t q) const { tile(block, p, q).fetch(d_); }

    LOFT_INLINE void settle(const Block& block, int which, int64_t p, int64_t q, const T* acc) {
        const Slot& slot = slots_[which];
        const auto to = tile(block, p, q);
        double within[kWidth], between[kWidth];  // copies, which no store to the scatter could change
        std::copy_n(slot.within.data() + to.left, kWidth, within);
        std::copy_n(slot.between.data() + to.left, kWidth, between);
        const auto add = [&](int64_t columns) LOFT_LAMBDA {
            for (int64_t i = 0; i < to.height; ++i) {
                const double inner = slot.within[to.top + i], outer = slot.between[to.top + i];
                for (int64_t j = 0; j < columns; ++j)
                    to.corner[i * d_ + j] += acc[i * kWidth + j] - inner * within[j] + outer * between[j];
            }
        };
        to.width == kWidth ? add(kWidth) : add(to.width);
        if (block.last) to.reflect(d_);
    }

  private:
    struct Slot {
        std::vector<T> center;
        std::vector<double> within, between;
    };

    LOFT_INLINE Tile<kWidth, double> tile(const Block& block, int64_t p, int64_t q) const {
        return {state_.scatter[block.group], d_, p, q};
    }

    const Source<In> source_;
    const State state_;
    const int64_t d_, panels_;
    std::array<Slot, 2> slots_;
    std::vector<double> sums_, origin_, mean_;
};

template <typename In, typename T>
void dispatch(const Rows& x, const int64_t* group, int64_t* count, double* mean, const std::vector<double*>& scatter,
              int threads) {
    const Running state{mean, scatter};
    const auto groups = static_cast<int64_t>(scatter.size());
    switch (vector_bytes()) {
        case 64: return run_pipeline<Merge<In, T, 64>>(x, group, groups, count, state, threads);
        case 32: return run_pipeline<Merge<In, T, 32>>(x, group, groups, count, state, threads);
        default: return run_pipeline<Merge<In, T, 16>>(x, group, groups, count, state, threads);
    }
}

}  // namespace

void moments_update(const Rows& x, const int64_t* group, int64_t* count, double* mean,
                    const std::vector<double*>& scatter, int threads) {
    switch (x.dtype) {
        case DType::float64: return dispatch<double, double>(x, group, count, mean, scatter, threads);
        case DType::float32: return dispatch<float, float>(x, group, count, mean, scatter, threads);
        case DType::float16: return dispatch<Float16, float>(x, group, count, mean, scatter, threads);
        case DType::bfloat16: return dispatch<BFloat16, float>(x, group, count, mean, scatter, threads);
    }
}

}  // namespace loft_fast
