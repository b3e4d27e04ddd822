#include "moments_update.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <deque>
#include <thread>

#include "aligned.h"
#include "parallel.h"
#include "product.h"

namespace loft_fast {
namespace {

constexpr int64_t kBlock = 512;      // rows merged into the float64 state at a time
constexpr int64_t kChunk = 64;       // rows packed in a step
constexpr int64_t kSample = 8;       // every so many rows, one goes into a block's reference
constexpr int64_t kAhead = 4;        // rows that are fetched while one is packed
constexpr int64_t kWide = 8;         // panels sampled in a step
constexpr int64_t kApart = 320;      // bytes between panels: without, the same rows of all would share a few cache sets
constexpr int kSpins = 1000;         // tries before a waiting thread gives way to others
constexpr int64_t kSmall = 1 << 21;  // multiply-adds below which a thread costs more than it brings

// Rows start .. start + n of a group, which has seen `before` rows so far.
struct Block {
    int64_t group, start, n, before;
    bool first, last;  // of its group in this call
};

// Tiles of the scatter's upper triangle: panel `panel` by panels [left, right).
struct Tiles {
    int64_t panel, left, right;
};

struct State {
    double* mean;
    const std::vector<double*>& scatter;
};

// Blocks of rows on their way into the scatters, by a team of threads. A stage is a list of steps: sample a block, pack
// the one before it, multiply the one before that. Every member takes the next step, and waits only where a stage begins
// until all of the last one is done.
template <typename In, typename T, int Bytes>
class Stream {
    static constexpr int kWidth = Shape<T, Bytes>::width, kHeight = Shape<T, Bytes>::height;

  public:
    // What one member needs for itself.
    struct Scratch {
        explicit Scratch(int64_t rows) : slivers(kWidth * rows) {}
        Aligned<T> slivers;
    };

    Stream(const Rows& x, const int64_t* order, State state, int64_t rows, int members)
        : x_(x),
          order_(order),
          state_(state),
          d_(x.d),
          panels_((d_ + kWidth - 1) / kWidth),
          stride_(kWidth * rows + kApart / static_cast<int64_t>(sizeof(T))),
          samples_((panels_ + kWide - 1) / kWide),
          chunks_((rows + kChunk - 1) / kChunk),
          slots_{Slot(panels_ * stride_), Slot(panels_ * stride_)},
          sums_(chunks_ * panels_ * kWidth),
          origin_(d_),
          mean_(d_) {
        // Long runs of tiles cut a panel less often, but there must be some for everyone.
        const int64_t length = 1 + panels_ / (1 + members / 8);
        for (int64_t panel = 0; panel < panels_; ++panel)
            for (int64_t left = panel; left < panels_; left += length)
                tiles_.push_back({panel, left, std::min(panels_, left + length)});
        for (Slot& slot : slots_) {
            slot.center.resize(panels_ * kWidth);
            slot.within.resize(panels_ * kWidth);
            slot.between.resize(panels_ * kWidth);
        }
    }

    // Steps of one stage: more members than that have nothing to do.
    int64_t steps() const { return samples_ + chunks_ + static_cast<int64_t>(tiles_.size()); }

    // Get ready for these blocks.
    void open(const Block* blocks, int64_t count) {
        blocks_ = blocks;
        count_ = count;
        next_ = done_ = packed_ = 0;
    }

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch& own) {
        const int64_t total = (count_ + 2) * steps();
        for (int64_t id; (id = next_.fetch_add(1)) < total; done_.fetch_add(1)) {
            const int64_t stage = id / steps(), step = id % steps();
            for (int spins = 0; done_.load() < stage * steps(); ++spins)
                if (spins > kSpins) std::this_thread::yield();
            if (step < samples_)
                sample(stage, step);
            else if (step < samples_ + chunks_)
                pack(stage - 1, step - samples_);
            else
                multiply_add(stage - 2, tiles_[step - samples_ - chunks_], own);
        }
    }

  private:
    struct Slot {
        explicit Slot(int64_t size) : packed(size) {}
        Aligned<T> packed;
        std::vector<T> center;
        std::vector<double> within, between;
    };

    bool exists(int64_t block) const { return 0 <= block && block < count_; }
    Slot& slot_of(int64_t block) { return slots_[block % 2]; }
    T* panel(const Slot& slot, int64_t p) const { return slot.packed.get() + p * stride_; }

    LOFT_INLINE const In* row(int64_t i) const {
        return static_cast<const In*>(x_.data) + x_.row_stride * (order_ ? order_[i] : i);
    }

    // The reference of a block's products: the mean of every eighth row, rounded as T. An eighth of the rows have their
    // mean within sqrt(7) standard deviations of that of all, whatever the data: so the products keep their digits.
    LOFT_INLINE void sample(int64_t index, int64_t step) {
        if (!exists(index)) return;
        const Block& block = blocks_[index];
        const int64_t left = step * kWide * kWidth, columns = std::min(d_ - left, kWide * kWidth);
        const In* first = row(block.start) + x_.col_stride * left;
        double sum[kWide * kWidth] = {};
        for (int64_t r = kSample; r < block.n; r += kSample) {
            const In* values = row(block.start + r) + x_.col_stride * left;
            for (int64_t j = 0; j < columns; ++j)
                sum[j] += static_cast<double>(value_of(values[j * x_.col_stride])) - value_of(first[j * x_.col_stride]);
        }
        const auto n = static_cast<double>((block.n + kSample - 1) / kSample);
        T* center = slot_of(index).center.data() + left;
        for (int64_t j = 0; j < columns; ++j) center[j] = static_cast<T>(value_of(first[j * x_.col_stride]) + sum[j] / n);
    }

    // Some rows of a block, less its reference, in panels; and their sum.
    LOFT_INLINE void pack(int64_t index, int64_t step) {
        if (!exists(index)) return;
        const Block& block = blocks_[index];
        Slot& slot = slot_of(index);
        const int64_t start = step * kChunk, end = std::min(block.n, start + kChunk), whole = d_ / kWidth;
        double* sums = sums_.data() + step * panels_ * kWidth;
        std::fill_n(sums, panels_ * kWidth, 0.0);
        const auto place = [&](const In* values, int64_t stride, int64_t width, int64_t p, int64_t r) LOFT_LAMBDA {
            const T* center = slot.center.data() + p * kWidth;
            T* out = panel(slot, p) + r * kWidth;
            double* sum = sums + p * kWidth;
            for (int64_t j = 0; j < width; ++j) {
                const T value = value_of(values[(p * kWidth + j) * stride]);
                out[j] = value - center[j];
                sum[j] += static_cast<double>(value) - center[j];  // exact: means are float64, whatever the rows are
            }
        };
        for (int64_t r = start; r < end; ++r) {
            const In* values = row(block.start + r);
            if (order_ && r + kAhead < block.n) {  // no hardware guesses where these rows are
                const In* later = row(block.start + r + kAhead);
                for (int64_t j = 0; j < d_; j += 64 / static_cast<int64_t>(sizeof(In)))
                    LOFT_PREFETCH(later + j * x_.col_stride, 0);
            }
            for (int64_t p = 0; p < whole; ++p)
                x_.col_stride == 1 ? place(values, 1, kWidth, p, r) : place(values, x_.col_stride, kWidth, p, r);
            if (whole < panels_) {
                place(values, x_.col_stride, d_ - whole * kWidth, whole, r);
                std::fill(panel(slot, whole) + r * kWidth + d_ % kWidth, panel(slot, whole) + (r + 1) * kWidth, T(0));
            }
        }
        if (packed_.fetch_add(1) + 1 == chunks_) finish(block, slot);
    }

    // The scatter about the state's mean is that about the reference less `within` plus `between`, each a vector times
    // itself (Chan, Golub and LeVeque). Means are offsets from the group's first row until the end: whatever their size,
    // they keep their digits.
    LOFT_INLINE void finish(const Block& block, Slot& slot) {
        packed_ = 0;
        double* state = state_.mean + block.group * d_;
        if (block.first) {
            const In* values = row(block.start);
            for (int64_t j = 0; j < d_; ++j) {
                origin_[j] = value_of(values[j * x_.col_stride]);
                mean_[j] = block.before ? state[j] - origin_[j] : 0.0;
            }
        }
        const auto n = static_cast<double>(block.n), before = static_cast<double>(block.before), total = before + n;
        for (int64_t j = 0; j < d_; ++j) {
            double sum = 0;
            for (int64_t c = 0; c * kChunk < block.n; ++c) sum += sums_[c * panels_ * kWidth + j];
            const double center = slot.center[j] - origin_[j] + sum / n, delta = block.before ? center - mean_[j] : 0.0;
            slot.within[j] = sum / std::sqrt(n);
            slot.between[j] = delta * std::sqrt(before * n / total);
            mean_[j] = block.before ? mean_[j] + delta * (n / total) : center;
            if (block.last) state[j] = origin_[j] + mean_[j];
        }
    }

    LOFT_INLINE void multiply_add(int64_t index, const Tiles& tiles, Scratch& own) {
        if (!exists(index)) return;
        const Block& block = blocks_[index];
        const Slot& slot = slot_of(index);
        T* to = own.slivers.get();
        for (int s = 0; s < kWidth; s += kHeight) {
            const T* from = panel(slot, tiles.panel) + s;
            for (int64_t r = 0; r < block.n; ++r, from += kWidth)
                for (int i = 0; i < kHeight; ++i) *to++ = from[i];
        }
        for (int64_t p = tiles.left; p < tiles.right; ++p) add_tile(block, slot, tiles.panel, p, own.slivers.get());
    }

    LOFT_INLINE void add_tile(const Block& block, const Slot& slot, int64_t p, int64_t q, const T* slivers) {
        const int64_t top = p * kWidth, left = q * kWidth;
        const int64_t height = std::min<int64_t>(kWidth, d_ - top), width = std::min<int64_t>(kWidth, d_ - left);
        double* corner = state_.scatter[block.group] + top * d_ + left;
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; j += 8) LOFT_PREFETCH(corner + i * d_ + j, 1);
        alignas(64) T acc[kWidth * kWidth];
        multiply<T, Bytes>(slivers, panel(slot, q), block.n, acc);
        double within[kWidth], between[kWidth];  // copies, which no store to the scatter could change
        std::copy_n(slot.within.data() + left, kWidth, within);
        std::copy_n(slot.between.data() + left, kWidth, between);
        const auto settle = [&](int64_t columns) LOFT_LAMBDA {
            for (int64_t i = 0; i < height; ++i) {
                const double inner = slot.within[top + i], outer = slot.between[top + i];
                for (int64_t j = 0; j < columns; ++j)
                    corner[i * d_ + j] += acc[i * kWidth + j] - inner * within[j] + outer * between[j];
            }
        };
        width == kWidth ? settle(kWidth) : settle(width);
        if (!block.last) return;
        // On the diagonal its own upper half, which goes to the lower one.
        double* mirror = state_.scatter[block.group] + left * d_ + top;
        for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < (p == q ? j : height); ++i) mirror[j * d_ + i] = corner[i * d_ + j];
    }

    const Rows& x_;
    const int64_t* order_;
    const State state_;
    const int64_t d_, panels_, stride_, samples_, chunks_;
    std::vector<Tiles> tiles_;
    std::array<Slot, 2> slots_;
    std::vector<double> sums_, origin_, mean_;
    const Block* blocks_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0}, done_{0}, packed_{0};
};

template <typename In, typename T, int Bytes>
void merge(const Rows& x, const int64_t* group, int64_t* count, double* mean, const std::vector<double*>& scatter,
           int threads) {
    const auto groups = static_cast<int64_t>(scatter.size());
    // Counting sort of the row numbers by group.
    std::vector<int64_t> begin(groups + 1, 0), order;
    if (group) {
        for (int64_t i = 0; i < x.n; ++i) ++begin[group[i] + 1];
        for (int64_t g = 0; g < groups; ++g) begin[g + 1] += begin[g];
        order.resize(x.n);
        std::vector<int64_t> next(begin.begin(), begin.end() - 1);
        for (int64_t i = 0; i < x.n; ++i) order[next[group[i]]++] = i;
    } else {
        begin[1] = x.n;
    }
    std::vector<Block> blocks;
    std::vector<int64_t> first(groups + 1, 0);  // group g has the blocks first[g] .. first[g + 1]
    int64_t largest = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t n = begin[g + 1] - begin[g];
        largest = std::max(largest, n);
        for (int64_t done = 0; done < n; done += kBlock) {
            const int64_t rows = std::min(kBlock, n - done);
            blocks.push_back({g, begin[g] + done, rows, count[g] + done, done == 0, done + rows == n});
        }
        first[g + 1] = static_cast<int64_t>(blocks.size());
    }
    const auto affordable = static_cast<int>(std::min<int64_t>(threads, 1 + x.n * x.d * x.d / kSmall));
    // Many groups of like size: everyone takes the next one and does it alone. Otherwise all work on the same one.
    const bool alone = affordable > 1 && largest * affordable * 2 <= x.n;

    // All memory is allocated before the state is touched.
    using Team = Stream<In, T, Bytes>;
    const int64_t rows = std::min(kBlock, largest);
    const int64_t* sorted = group ? order.data() : nullptr;
    std::deque<Team> teams;
    for (int i = 0; i < (alone ? affordable : 1); ++i)
        teams.emplace_back(x, sorted, State{mean, scatter}, rows, alone ? 1 : affordable);
    const int workers = alone ? affordable : static_cast<int>(std::min<int64_t>(affordable, teams[0].steps()));
    std::vector<typename Team::Scratch> scratch;
    scratch.reserve(workers);
    for (int i = 0; i < workers; ++i) scratch.emplace_back(rows);

    std::atomic<int> arrived{0};
    std::atomic<int64_t> next{0};
    teams[0].open(blocks.data(), static_cast<int64_t>(blocks.size()));
    in_parallel(workers, [&] {
        const int i = arrived.fetch_add(1);
        if (!alone) return work<Bytes>(teams[0], scratch[i]);
        for (int64_t g; (g = next.fetch_add(1)) < groups;) {
            teams[i].open(blocks.data() + first[g], first[g + 1] - first[g]);
            work<Bytes>(teams[i], scratch[i]);
        }
    });
    for (int64_t g = 0; g < groups; ++g) count[g] += begin[g + 1] - begin[g];
}

template <typename In, typename T>
void dispatch(const Rows& x, const int64_t* group, int64_t* count, double* mean, const std::vector<double*>& scatter,
              int threads) {
    switch (vector_bytes()) {
        case 64: return merge<In, T, 64>(x, group, count, mean, scatter, threads);
        case 32: return merge<In, T, 32>(x, group, count, mean, scatter, threads);
        default: return merge<In, T, 16>(x, group, count, mean, scatter, threads);
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
