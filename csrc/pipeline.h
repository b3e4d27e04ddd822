// Rows by group on their way into symmetric matrices: sorted, cut into blocks, packed, multiplied by themselves.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "product.h"
#include "rows.h"

namespace loft_fast {

constexpr int64_t kBlock = 512;      // rows added to a state at a time
constexpr int64_t kChunk = 64;       // rows packed in a step
constexpr int64_t kAhead = 4;        // rows that are fetched while one is packed
constexpr int64_t kApart = 320;      // bytes between panels: without, the same rows of all would share a few cache sets
constexpr int kSpins = 1000;         // tries before a waiting thread gives way to others
constexpr int64_t kSmall = 1 << 21;  // multiply-adds below which a thread costs more than it brings

// Rows start .. start + n of a group, which has seen `before` rows so far.
struct Block {
    int64_t group, start, n, before;
    bool first, last;  // of its group in this call
};

// Tiles of a matrix's upper triangle: panel `panel` by panels [left, right).
struct Tiles {
    int64_t panel, left, right;
};

template <typename In>
struct Source {
    const Rows& x;
    const int64_t* order;  // of the rows, or null

    LOFT_INLINE const In* row(int64_t i) const {
        return static_cast<const In*>(x.data) + x.row_stride * (order ? order[i] : i);
    }
};

// A panel holds `width` columns of a block, row by row: (rows, width).
constexpr int64_t panels_of(int64_t d, int width) { return (d + width - 1) / width; }
constexpr int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// A team of threads at work on a list of blocks. A stage is a list of steps: prepare a block, pack the one before it,
// multiply the one before that. Every member takes the next step, and waits only where a stage begins until all of the
// last one is done.
//
// Job: what is done with the rows. Of two blocks at a time, told apart by a slot, 0 or 1:
//     Input, Value, bytes       types of a row's and of a packed number; width of a vector
//     fold                      rows that share a packed number
//     parts, part(from, k, to)  a packed number is made of so many, which are multiplied one after another; those of
//                               one row of a sliver
//     State                     what it writes to
//     Job(source, state, rows)  for blocks of so many rows at most
//     preparations()            how many steps it takes to prepare a block
//     prepare(block, slot, i)   one of them
//     open(chunk)               rows of this chunk come next
//     place(rows, stride, columns, panel, slot, chunk, out)   pack some columns of `fold` rows; the last may be null
//     finish(block, slot)       all rows are packed
//     fetch(block, p, q)        the product of panels p and q will be needed soon
//     multiply(left, right, rows, acc)   slivers of one part by a panel, of so many packed rows
//     settle(block, slot, p, q, acc)   here is the product, of all parts
template <typename Job>
class Pipeline {
    using In = typename Job::Input;
    using T = typename Job::Value;
    static constexpr int kWidth = Shape<T, Job::bytes>::width, kHeight = Shape<T, Job::bytes>::height;
    static constexpr int kFold = Job::fold, kParts = Job::parts;
    static_assert(kChunk % kFold == 0);

    static constexpr int64_t packed(int64_t rows) { return (rows + kFold - 1) / kFold; }

  public:
    // What one member needs for itself.
    struct Scratch {
        explicit Scratch(int64_t rows) : slivers(kParts * kWidth * packed(rows)) {}
        Aligned<T> slivers;
    };

    Pipeline(const Source<In>& source, const typename Job::State& state, int64_t rows, int members)
        : source_(source),
          d_(source.x.d),
          panels_(panels_of(d_, kWidth)),
          stride_(kWidth * packed(rows) + kApart / static_cast<int64_t>(sizeof(T))),
          chunks_(chunks_of(rows)),
          job_(source, state, rows),
          packed_rows_{Aligned<T>(panels_ * stride_), Aligned<T>(panels_ * stride_)} {
        // Long runs of tiles cut a panel less often, but there must be some for everyone.
        const int64_t length = 1 + panels_ / (1 + members / 8);
        for (int64_t panel = 0; panel < panels_; ++panel)
            for (int64_t left = panel; left < panels_; left += length)
                tiles_.push_back({panel, left, std::min(panels_, left + length)});
    }

    // Steps of one stage: more members than that have nothing to do.
    int64_t steps() const { return job_.preparations() + chunks_ + static_cast<int64_t>(tiles_.size()); }

    // Get ready for these blocks.
    void open(const Block* blocks, int64_t count) {
        blocks_ = blocks;
        count_ = count;
        next_ = done_ = packed_ = 0;
    }

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch& own) {
        const int64_t total = (count_ + 2) * steps(), preparations = job_.preparations();
        for (int64_t id; (id = next_.fetch_add(1)) < total; done_.fetch_add(1)) {
            const int64_t stage = id / steps(), step = id % steps();
            for (int spins = 0; done_.load() < stage * steps(); ++spins)
                if (spins > kSpins) std::this_thread::yield();
            if (step < preparations) {
                if (exists(stage)) job_.prepare(blocks_[stage], stage % 2, step);
            } else if (step < preparations + chunks_) {
                if (exists(stage - 1)) pack(stage - 1, step - preparations);
            } else if (exists(stage - 2)) {
                multiply_add(stage - 2, tiles_[step - preparations - chunks_], own);
            }
        }
    }

  private:
    bool exists(int64_t block) const { return 0 <= block && block < count_; }
    T* panel(int64_t block, int64_t p) const { return packed_rows_[block % 2].get() + p * stride_; }

    LOFT_INLINE void pack(int64_t index, int64_t chunk) {
        const Block& block = blocks_[index];
        const int slot = index % 2;
        const int64_t start = chunk * kChunk, end = std::min(block.n, start + kChunk), whole = d_ / kWidth;
        const int64_t stride = source_.x.col_stride;
        job_.open(chunk);
        for (int64_t r = start; r < end; r += kFold) {
            std::array<const In*, kFold> rows{};
            for (int f = 0; f < kFold && r + f < end; ++f) {
                rows[f] = source_.row(block.start + r + f);
                if (source_.order && r + f + kAhead < block.n) {  // no hardware guesses where these rows are
                    const In* later = source_.row(block.start + r + f + kAhead);
                    for (int64_t j = 0; j < d_; j += 64 / static_cast<int64_t>(sizeof(In)))
                        LOFT_PREFETCH(later + j * stride, 0);
                }
            }
            for (int64_t p = 0; p < whole; ++p) {
                T* out = panel(index, p) + r / kFold * kWidth;
                stride == 1 ? job_.place(rows, 1, kWidth, p, slot, chunk, out)
                            : job_.place(rows, stride, kWidth, p, slot, chunk, out);
            }
            if (whole < panels_) {
                T* out = panel(index, whole) + r / kFold * kWidth;
                job_.place(rows, stride, d_ - whole * kWidth, whole, slot, chunk, out);
                std::fill(out + d_ % kWidth, out + kWidth, T(0));
            }
        }
        if (packed_.fetch_add(1) + 1 < chunks_) return;
        packed_ = 0;
        job_.finish(block, slot);
    }

    LOFT_INLINE void multiply_add(int64_t index, const Tiles& tiles, Scratch& own) {
        const Block& block = blocks_[index];
        const int64_t rows = packed(block.n);
        T* to = own.slivers.get();
        for (int k = 0; k < kParts; ++k)
            for (int s = 0; s < kWidth; s += kHeight) {
                const T* from = panel(index, tiles.panel) + s;
                for (int64_t r = 0; r < rows; ++r, from += kWidth, to += kHeight) Job::part(from, k, to);
            }
        alignas(64) T acc[kParts * kWidth * kWidth];
        for (int64_t p = tiles.left; p < tiles.right; ++p) {
            job_.fetch(block, tiles.panel, p);
            for (int k = 0; k < kParts; ++k)
                Job::multiply(own.slivers.get() + k * kWidth * rows, panel(index, p), rows, acc + k * kWidth * kWidth);
            job_.settle(block, index % 2, tiles.panel, p, acc);
        }
    }

    const Source<In> source_;
    const int64_t d_, panels_, stride_, chunks_;
    Job job_;
    std::array<Aligned<T>, 2> packed_rows_;
    std::vector<Tiles> tiles_;
    const Block* blocks_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0}, done_{0}, packed_{0};
};

// A tile of a d x d matrix of int64 or float64: rows top .. top + height, columns left .. left + width.
template <int Width, typename Number>
struct Tile {
    int64_t top, left, height, width;
    Number* corner;
    Number* mirror;

    Tile(Number* matrix, int64_t d, int64_t p, int64_t q)
        : top(p * Width),
          left(q * Width),
          height(std::min<int64_t>(Width, d - top)),
          width(std::min<int64_t>(Width, d - left)),
          corner(matrix + top * d + left),
          mirror(matrix + left * d + top) {}

    LOFT_INLINE void fetch(int64_t d) const {
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; j += 8) LOFT_PREFETCH(corner + i * d + j, 1);
    }

    // Copy to the lower triangle; on the diagonal its own upper half.
    LOFT_INLINE void reflect(int64_t d) const {
        for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < (top == left ? j : height); ++i) mirror[j * d + i] = corner[i * d + j];
    }
};

// Run all rows through a job. group: for each row an index below `groups`, or null for one group. count: rows that each
// group has seen, raised by those that are new.
template <typename Job>
void run_pipeline(const Rows& x, const int64_t* group, int64_t groups, int64_t* count,
                  const typename Job::State& state, int threads) {
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
    using Team = Pipeline<Job>;
    const int64_t rows = std::min(kBlock, largest);
    const Source<typename Job::Input> source{x, group ? order.data() : nullptr};
    std::deque<Team> teams;
    for (int i = 0; i < (alone ? affordable : 1); ++i) teams.emplace_back(source, state, rows, alone ? 1 : affordable);
    const int workers = alone ? affordable : static_cast<int>(std::min<int64_t>(affordable, teams[0].steps()));
    std::vector<typename Team::Scratch> scratch;
    scratch.reserve(workers);
    for (int i = 0; i < workers; ++i) scratch.emplace_back(rows);

    std::atomic<int> arrived{0};
    std::atomic<int64_t> next{0};
    teams[0].open(blocks.data(), static_cast<int64_t>(blocks.size()));
    in_parallel(workers, [&] {
        const int i = arrived.fetch_add(1);
        if (!alone) return work<Job::bytes>(teams[0], scratch[i]);
        for (int64_t g; (g = next.fetch_add(1)) < groups;) {
            teams[i].open(blocks.data() + first[g], first[g + 1] - first[g]);
            work<Job::bytes>(teams[i], scratch[i]);
        }
    });
    for (int64_t g = 0; g < groups; ++g) count[g] += begin[g + 1] - begin[g];
}

}  // namespace loft_fast
