// Jobs of a pipeline that merge blocks of rows into running means and scatters.
#pragma once

#include <cmath>

#include "center.h"
#include "pipeline.h"
#include "strips.h"

namespace loft_fast {

struct Running {
    double* mean;
    const std::vector<double*>& scatter;
    const float* center;  // what to subtract from the rows of each group, (groups, width); or null
};

// What such jobs share. Value: type of what is subtracted from rows, and of sums of products.
template <typename In, typename Value, int Width>
class Merge {
  public:
    using Input = In;
    using State = Running;

    LOFT_INLINE void open(int64_t chunk) {
        std::fill_n(sums_.data() + chunk * panels_ * kWidth, panels_ * kWidth, 0.0);
    }

    // The scatter about the state's mean is that about the reference less `within` plus `between`, each a vector times
    // itself (Chan, Golub and LeVeque). Means are offsets from the group's first row until the end: however large they
    // are, they keep their digits.
    LOFT_INLINE void finish(const Block& block, int which) {
        Slot& slot = slots_[which];
        const double* state = state_.mean + block.group * d_;
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
        }
    }

    void close(const Block& block) const {
        for (int64_t j = 0; j < d_; ++j) state_.mean[block.group * d_ + j] = origin_[j] + mean_[j];
    }

    LOFT_INLINE void fetch(const Block& block, int64_t p, int64_t q) const { tile(block, p, q).fetch(d_); }

    LOFT_INLINE void settle(const Block& block, int which, int64_t p, int64_t q, const Value* acc) {
        const Slot& slot = slots_[which];
        const auto to = tile(block, p, q);
        double within[kWidth], between[kWidth];  // copies, which no store to the scatter could change
        std::copy_n(slot.within.data() + to.left, kWidth, within);
        std::copy_n(slot.between.data() + to.left, kWidth, between);
        const auto add = [&](int64_t columns) LOFT_LAMBDA {
            for (int64_t i = 0; i < to.height; ++i) {
                const double inner = slot.within[to.top + i], outer = slot.between[to.top + i];
                if (block.before == 0) std::fill_n(to.corner + i * d_, columns, 0.0);
                for (int64_t j = 0; j < columns; ++j)
                    to.corner[i * d_ + j] += acc[i * kWidth + j] - inner * within[j] + outer * between[j];
            }
        };
        to.width == kWidth ? add(kWidth) : add(to.width);
        if (block.last) to.reflect(d_);
    }

  protected:
    // Of each slot: where the reference of its block's products is.
    struct Slot {
        const Value* center;
        std::vector<double> within, between;
    };

    Merge(const Source<In>& source, const State& state, int64_t rows)
        : source_(source),
          state_(state),
          d_(source.x.d),
          panels_(panels_of(d_, kWidth)),
          sums_(chunks_of(rows) * panels_ * kWidth),
          origin_(d_),
          mean_(d_) {
        for (Slot& slot : slots_) {
            slot.within.resize(panels_ * kWidth);
            slot.between.resize(panels_ * kWidth);
        }
    }

    double* sum(int64_t chunk, int64_t p) { return sums_.data() + (chunk * panels_ + p) * kWidth; }

    const Source<In> source_;
    const State state_;
    const int64_t d_, panels_;
    std::array<Slot, 2> slots_;

  private:
    static constexpr int kWidth = Width;

    LOFT_INLINE Tile<kWidth, double> tile(const Block& block, int64_t p, int64_t q) const {
        return {state_.scatter[block.group], d_, p, q};
    }

    std::vector<double> sums_, origin_, mean_;
};

// Merges numbers less the mean of a sample of their block.
template <typename In, typename T, int Bytes>
class MergeNumbers : public Merge<In, T, Shape<T, Bytes>::width> {
    static constexpr int kWidth = Shape<T, Bytes>::width;
    static constexpr int64_t kSample = 8;  // every so many rows, one goes into a block's reference
    static constexpr int64_t kWide = 8;    // panels sampled in a step
    using Base = Merge<In, T, kWidth>;
    using Base::d_, Base::panels_, Base::slots_, Base::source_;

  public:
    using Form = Strips<Numbers<T, Bytes>>;
    static constexpr int64_t block = 512;

    MergeNumbers(const Source<In>& source, const Running& state, int64_t rows) : Base(source, state, rows) {
        for (int slot = 0; slot < 2; ++slot) {
            centers_[slot].resize(panels_ * kWidth);
            slots_[slot].center = centers_[slot].data();
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
        T* center = centers_[slot].data() + left;
        for (int64_t j = 0; j < columns; ++j) center[j] = static_cast<T>(value_of(first[j * stride]) + sum[j] / n);
    }

    // Rows less the reference of their block; and their sum, which is exact: means are float64, whatever the rows are.
    LOFT_INLINE void place(const std::array<const In*, kRows>& rows, int64_t count, int64_t stride, int64_t columns,
                           int64_t p, int slot, int64_t chunk, T* out) {
        const T* center = centers_[slot].data() + p * kWidth;
        double* sum = this->sum(chunk, p);
#if defined(__GNUC__)
        if constexpr (std::is_same_v<In, T>)
            if (stride == 1 && columns == kWidth)
                return center_panel<T, Bytes>(rows.data(), p * kWidth, count, center, sum, out);
#endif
        for (int64_t r = 0; r < count; ++r)
            for (int64_t j = 0; j < columns; ++j) {
                const T value = value_of(rows[r][(p * kWidth + j) * stride]);
                out[r * kWidth + j] = value - center[j];
                sum[j] += static_cast<double>(value) - center[j];
            }
    }

  private:
    std::array<std::vector<T>, 2> centers_;
};

// Merges bfloat16 numbers less centers from which they differ by bfloat16 numbers. Panel: a Form whose words are Pairs.
template <typename Panel>
class MergeBFloat16 : public Merge<BFloat16, float, Panel::width> {
    static constexpr int kWidth = Panel::width;
    using Base = Merge<BFloat16, float, kWidth>;
    using Base::panels_, Base::slots_, Base::state_;

  public:
    using Form = Panel;
    static constexpr int64_t block = 1024;

    MergeBFloat16(const Source<BFloat16>& source, const Running& state, int64_t rows) : Base(source, state, rows) {}

    int64_t preparations() const { return 1; }

    LOFT_INLINE void prepare(const Block& block, int slot, int64_t) {
        slots_[slot].center = state_.center + block.group * panels_ * kWidth;
    }

    LOFT_INLINE void place(const std::array<const BFloat16*, kRows>& rows, int64_t count, int64_t stride,
                           int64_t columns, int64_t p, int slot, int64_t chunk, Pair* out) {
        const float* center = slots_[slot].center + p * kWidth;
        double* sum = this->sum(chunk, p);
        int64_t r = 0;
#if LOFT_X86
        if (stride == 1 && columns == kWidth)
            center_pairs<kWidth>(rows.data(), p * kWidth, r = count / 2 * 2, center, sum, out);
#endif
        for (; r < count; r += 2)
            for (int64_t j = 0; j < columns; ++j) {
                const int64_t at = (p * kWidth + j) * stride;
                const float a = value_of(rows[r][at]) - center[j];
                const float b = r + 1 < count ? value_of(rows[r + 1][at]) - center[j] : 0.0f;
                out[r / 2 * kWidth + j] = upper_halves(a, b);
                sum[j] += static_cast<double>(a) + b;
            }
    }
};

}  // namespace loft_fast
