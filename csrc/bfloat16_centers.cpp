#include "bfloat16_centers.h"

#include <atomic>
#include <cmath>

#include "pair_product.h"
#include "parallel.h"

namespace loft_fast {
namespace {

constexpr int64_t kColumns = 128;     // looked at in a step
constexpr int64_t kSample = 8;        // every so many rows, one is looked at
constexpr double kFar = 2;            // standard deviations of a mean from zero
constexpr double kError = 1e-6;       // of a covariance, relative to its norm
constexpr double kRounding = 2.4e-8;  // of a float32 number: standard deviation, relative to it
constexpr double kSmall = 0x1p-90;    // a variance; products below 2^-126 are taken for zero

class Centers {
  public:
    struct Scratch {};

    Centers(const Rows& x, const Sorted& sorted, int64_t width)
        : centers(sorted.groups() * width, 0.0f),
          x_(x),
          sorted_(sorted),
          width_(width),
          steps_((x.d + kColumns - 1) / kColumns),
          spread_(sorted.groups() * steps_) {}

    int64_t steps() const { return sorted_.groups() * steps_; }

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch&) {
        for (int64_t id; serve_ && (id = next_.fetch_add(1)) < steps();)
            if (!(x_.col_stride == 1 ? look(id, 1) : look(id, x_.col_stride))) serve_ = false;
    }

    // What is not subtracted piles up: over a chain of k rows to k times a product of means, and every addition rounds
    // the pile. If roundings are independent, they come to kRounding * k * sqrt(n / 3) times that product in a sum over n
    // rows. The norm of that is held against the norm of the variances alone: that of the covariance is larger.
    bool serve(int64_t pairs) const {
        if (!serve_) return false;
        for (int64_t g = 0; g < sorted_.groups(); ++g) {
            const auto n = static_cast<double>(sorted_.begin[g + 1] - sorted_.begin[g]);
            Spread all;
            for (int64_t step = 0; step < steps_; ++step) {
                all.means += spread_[g * steps_ + step].means;
                all.variances += spread_[g * steps_ + step].variances;
            }
            const double chain = std::min(2.0 * static_cast<double>(pairs), n);
            if (kRounding * chain * std::sqrt(n / 3) * all.means > kError * n * std::sqrt(all.variances)) return false;
        }
        return true;
    }

    std::vector<float> centers;

  private:
    // Of some columns of a group: the sum of the squares of the means that are not subtracted, and of all variances.
    struct Spread {
        double means = 0, variances = 0;
    };

    LOFT_INLINE const BFloat16* row(int64_t position, int64_t left) const {
        return static_cast<const BFloat16*>(x_.data) + x_.row_stride * sorted_.row(position) + x_.col_stride * left;
    }

    // Chooses the centers of a group's columns; false where one would not serve.
    LOFT_INLINE bool look(int64_t id, int64_t stride) {
        const int64_t g = id / steps_, left = id % steps_ * kColumns, columns = std::min(kColumns, x_.d - left);
        const int64_t begin = sorted_.begin[g], end = sorted_.begin[g + 1];
        if (begin == end) return true;
        // Offsets from the first row: of columns far from zero, the spread would drown in the squares.
        double sum[kColumns] = {}, squares[kColumns] = {};
        const BFloat16* first = row(begin, left);
        for (int64_t i = begin + kSample; i < end; i += kSample) {
            const BFloat16* values = row(i, left);
            for (int64_t j = 0; j < columns; ++j) {
                const double offset = value_of(values[j * stride]) - static_cast<double>(value_of(first[j * stride]));
                sum[j] += offset;
                squares[j] += offset * offset;
            }
        }
        const auto n = static_cast<double>((end - begin + kSample - 1) / kSample);
        float* center = centers.data() + g * width_ + left;
        Spread& spread = spread_[id];
        bool far = false, small = false;
        for (int64_t j = 0; j < columns; ++j) {
            const double offset = sum[j] / n, mean = value_of(first[j * stride]) + offset;
            const double variance = std::max(0.0, squares[j] / n - offset * offset);
            const bool near = mean * mean <= kFar * kFar * variance;
            center[j] = near ? 0.0f : value_of(BFloat16(static_cast<float>(mean)));
            spread.means += near ? mean * mean : 0.0;
            spread.variances += variance * variance;
            far |= !near;
            small |= variance > 0 && variance < kSmall;
        }
        return !small && (!far || exact(begin, end, left, columns, stride, center));
    }

    LOFT_INLINE bool exact(int64_t begin, int64_t end, int64_t left, int64_t columns, int64_t stride,
                           const float* center) const {
        for (int64_t i = begin; i < end; ++i) {
            const BFloat16* values = row(i, left);
            int64_t bad = 0;
            for (int64_t j = 0; j < columns; ++j) {
                const double difference = value_of(values[j * stride]) - static_cast<double>(center[j]);
                bad += !(value_of(BFloat16(static_cast<float>(difference))) == difference);  // NaN is not, either
            }
            if (bad) return false;
        }
        return true;
    }

    const Rows& x_;
    const Sorted& sorted_;
    const int64_t width_, steps_;
    std::vector<Spread> spread_;
    std::atomic<int64_t> next_{0};
    std::atomic<bool> serve_{true};
};

}  // namespace

BFloat16Centers bfloat16_centers(const Rows& x, const Sorted& sorted, int64_t width, int threads) {
    Centers team(x, sorted, width);
    in_parallel(static_cast<int>(std::min<int64_t>(threads, team.steps())), [&] {
        Centers::Scratch own;
        work<64>(team, own);
    });
    for (const int64_t chain : {kLongChain, kShortChain})
        if (team.serve(chain)) return {std::move(team.centers), chain};
    return {{}, 0};
}

}  // namespace loft_fast
