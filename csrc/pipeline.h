// Rows by group on their way into symmetric matrices: sorted, cut into blocks, packed, multiplied by themselves.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "product.h"
#include "rows.h"

namespace loft_fast {

constexpr int64_t kChunk = 64;       // rows packed in a step
constexpr int64_t kRows = 8;         // of these, packed one panel at a time
constexpr int64_t kApart = 320;      // bytes between panels: without, the same rows of all would share a few cache sets
constexpr int kJoin = 2;             // threads up to which it costs less that each packs all rows
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

// A panel holds `width` columns of a block.
constexpr int64_t panels_of(int64_t d, int width) { return (d + width - 1) / width; }
constexpr int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// Tiles of a list of blocks, block by block: how many are taken and done.
struct Queue {
    std::atomic<int64_t> taken{0}, done{0};
};

// Threads at work on a list of blocks.
//     team   A stage is a list of steps: prepare a block, pack the one before it, multiply the one before that. Every
//            member takes the next step, and waits only where a stage begins until all of the last one is done.
//     join   Everyone has a pipeline of its own and packs all rows, but takes only the next of the tiles. Rows packed
//            twice cost less than lines that two processors write to in turn, which may be far apart.
//
// Job: what is done with the rows. Of two blocks at a time, told apart by a slot, 0 or 1:
//     Input                     type of a row's number
//     Form                      how panels are laid out and multiplied: Strips, a kind of MatrixTiles
//     block                     rows added to a state at a time
//     State                     what it writes to
//     Job(source, state, rows)  for blocks of so many rows at most
//     preparations()            how many steps it takes to prepare a block
//     prepare(block, slot, i)   one of them
//     open(chunk)               rows of this chunk come next
//     place(rows, count, stride, columns, panel, slot, chunk, out)   pack some columns of so many rows
//     finish(block, slot)       all rows are packed
//     close(block)              it is the last one of its group, and nobody will ask for the state's vectors any more
//     fetch(block, p, q)        the product of panels p and q will be needed soon
//     settle(block, slot, p, q, acc)   here are the sums of products
//
// Form:
//     Packed, Sum, bytes        what panels and sums are made of; of the vectors that it is compiled for
//     width, sums               columns of a panel; sums, of width x width each, that a product has
//     size(rows)                numbers of a panel
//     offset(row)               where a row begins in it, one of every kRows
//     blank(rows, column, out)  zeros from this column on
//     end(rows, panel)          what follows the last row
//     left_size(rows), cut(panel, rows, left)   a panel as a left operand
//     multiply(left, right, rows, extent, acc)  its product with a panel, while a Session lives
template <typename Job>
class Pipeline {
    using In = typename Job::Input;
    using Form = typename Job::Form;
    using T = typename Form::Packed;
    static constexpr int kWidth = Form::width;
    static_assert(kChunk % kRows == 0);

  public:
    // What one member needs for itself.
    struct Scratch {
        explicit Scratch(int64_t rows) : left(Form::left_size(rows)) {}
        Aligned<T> left;
    };

    // members: of the team; one for `join`.
    Pipeline(const Source<In>& source, const typename Job::State& state, int64_t rows, int members)
        : source_(source),
          d_(source.x.d),
          panels_(panels_of(d_, kWidth)),
          stride_(Form::size(rows) + kApart / static_cast<int64_t>(sizeof(T))),
          chunks_(chunks_of(rows)),
          job_(source, state, rows) {
        for (int slot = 0; slot < (members > 1 ? 2 : 1); ++slot) packed_rows_.emplace_back(panels_ * stride_);
        // Long runs of tiles cut a panel less often, but there must be some for everyone.
        const int64_t length = 1 + panels_ / (1 + members / 8);
        for (int64_t panel = 0; panel < panels_; ++panel)
            for (int64_t left = panel; left < panels_; left += length)
                tiles_.push_back({panel, left, std::min(panels_, left + length)});
    }

    // Steps of one stage: more members than that have nothing to do.
    int64_t steps() const { return job_.preparations() + chunks_ + static_cast<int64_t>(tiles_.size()); }

    // Get ready for these blocks; with a queue of their tiles, to join others at them.
    void open(const Block* blocks, int64_t count, Queue* queue = nullptr) {
        blocks_ = blocks;
        count_ = count;
        queue_ = queue;
        next_ = done_ = packed_ = 0;
    }

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch& own) { queue_ ? join(own) : team(own); }

  private:
    LOFT_INLINE void team(Scratch& own) {
        const int64_t total = (count_ + 2) * steps(), preparations = job_.preparations();
        for (int64_t id; (id = next_.fetch_add(1)) < total; done_.fetch_add(1)) {
            const int64_t stage = id / steps(), step = id % steps();
            wait_for(done_, stage * steps());
            if (step < preparations) {
                if (exists(stage)) job_.prepare(blocks_[stage], stage % 2, step);
            } else if (step < preparations + chunks_) {
                if (exists(stage - 1)) pack(stage - 1, step - preparations);
            } else if (exists(stage - 2)) {
                multiply_add(stage - 2, tiles_[step - preparations - chunks_], own);
            }
        }
    }

    LOFT_INLINE void join(Scratch& own) {
        const auto tiles = static_cast<int64_t>(tiles_.size());
        int64_t ready = -1;  // the last block that is packed or not needed
        for (int64_t id; (id = queue_->taken.fetch_add(1)) < count_ * tiles; queue_->done.fetch_add(1)) {
            const int64_t index = id / tiles;
            const Block& block = blocks_[index];
            while (ready < index)
                if (blocks_[++ready].group == block.group) {
                    for (int64_t i = 0; i < job_.preparations(); ++i) job_.prepare(blocks_[ready], ready % 2, i);
                    for (int64_t chunk = 0; chunk < chunks_; ++chunk) pack(ready, chunk);
                }
            wait_for(queue_->done, index * tiles);
            multiply_add(index, tiles_[id % tiles], own);
            if (block.last && id % tiles == tiles - 1) {
                wait_for(queue_->done, id);  // those who have tiles of this group have read its vectors
                job_.close(block);
            }
        }
    }

    bool exists(int64_t block) const { return 0 <= block && block < count_; }
    T* panel(int64_t block, int64_t p) const { return packed_rows_[block % packed_rows_.size()].get() + p * stride_; }

    LOFT_INLINE void pack(int64_t index, int64_t chunk) {
        const Block& block = blocks_[index];
        const int slot = index % 2;
        const int64_t start = chunk * kChunk, end = std::min(block.n, start + kChunk), whole = d_ / kWidth;
        const int64_t stride = source_.x.col_stride;
        job_.open(chunk);
        for (int64_t top = start; top < end; top += kRows) {
            const int64_t count = std::min(kRows, end - top);
            std::array<const In*, kRows> rows{};
            for (int64_t r = 0; r < count; ++r) {
                rows[r] = source_.row(block.start + top + r);
                if (top + r + kRows < block.n) {  // no hardware guesses where the rows of several panels are
                    const In* later = source_.row(block.start + top + r + kRows);
                    for (int64_t j = 0; j < d_; j += 64 / static_cast<int64_t>(sizeof(In)))
                        LOFT_PREFETCH(later + j * stride, 0);
                }
            }
            for (int64_t p = 0; p < whole; ++p) {
                T* out = panel(index, p) + Form::offset(top);
                stride == 1 ? job_.place(rows, count, 1, kWidth, p, slot, chunk, out)
                            : job_.place(rows, count, stride, kWidth, p, slot, chunk, out);
            }
            if (whole < panels_) {
                T* out = panel(index, whole) + Form::offset(top);
                job_.place(rows, count, stride, d_ - whole * kWidth, whole, slot, chunk, out);
                Form::blank(count, d_ % kWidth, out);
            }
        }
        if (start < end && end == block.n)
            for (int64_t p = 0; p < panels_; ++p) Form::end(block.n, panel(index, p));
        if (packed_.fetch_add(1) + 1 < chunks_) return;
        packed_ = 0;
        job_.finish(block, slot);
        if (block.last && !queue_) job_.close(block);
    }

    Extent extent(int64_t p, int64_t q) const {
        return {std::min<int64_t>(kWidth, d_ - p * kWidth), std::min<int64_t>(kWidth, d_ - q * kWidth), p == q};
    }

    LOFT_INLINE void multiply_add(int64_t index, const Tiles& tiles, Scratch& own) {
        const Block& block = blocks_[index];
        Form::cut(panel(index, tiles.panel), block.n, own.left.get());
        alignas(64) typename Form::Sum acc[Form::sums * kWidth * kWidth] = {};
        [[maybe_unused]] const typename Form::Session session{};
        for (int64_t p = tiles.left; p < tiles.right; ++p) {
            job_.fetch(block, tiles.panel, p);
            Form::multiply(own.left.get(), panel(index, p), block.n, extent(tiles.panel, p), acc);
            job_.settle(block, index % 2, tiles.panel, p, acc);
        }
    }

    const Source<In> source_;
    const int64_t d_, panels_, stride_, chunks_;
    Job job_;
    std::vector<Aligned<T>> packed_rows_;  // of blocks, in turn
    std::vector<Tiles> tiles_;
    const Block* blocks_ = nullptr;
    int64_t count_ = 0;
    Queue* queue_ = nullptr;
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

// Run all rows through a job. count: rows that each group has seen, raised by those that are new.
template <typename Job>
void run_pipeline(const Rows& x, const Sorted& sorted, int64_t* count, const typename Job::State& state, int threads) {
    const std::vector<int64_t>& begin = sorted.begin;
    const int64_t groups = sorted.groups();
    std::vector<Block> blocks;
    std::vector<int64_t> first(groups + 1, 0);  // group g has the blocks first[g] .. first[g + 1]
    int64_t largest = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t n = begin[g + 1] - begin[g];
        largest = std::max(largest, n);
        for (int64_t done = 0; done < n; done += Job::block) {
            const int64_t rows = std::min(Job::block, n - done);
            blocks.push_back({g, begin[g] + done, rows, count[g] + done, done == 0, done + rows == n});
        }
        first[g + 1] = static_cast<int64_t>(blocks.size());
    }
    const auto affordable = static_cast<int>(std::min<int64_t>(threads, 1 + x.n * x.d * x.d / kSmall));
    // Many groups of like size: everyone takes the next one and does it alone. Otherwise all work on the same one.
    const bool alone = largest * affordable * 2 <= x.n, join = alone || affordable <= kJoin;

    // All memory is allocated before the state is touched.
    using Team = Pipeline<Job>;
    const int64_t rows = std::min(Job::block, largest);
    const Source<typename Job::Input> source{x, sorted.order.empty() ? nullptr : sorted.order.data()};
    std::deque<Team> teams;
    for (int i = 0; i < (join ? affordable : 1); ++i) teams.emplace_back(source, state, rows, join ? 1 : affordable);
    const int workers = join ? affordable : static_cast<int>(std::min<int64_t>(affordable, teams[0].steps()));
    std::vector<typename Team::Scratch> scratch;
    scratch.reserve(workers);
    for (int i = 0; i < workers; ++i) scratch.emplace_back(rows);

    const auto all = static_cast<int64_t>(blocks.size());
    Queue queue;
    teams[0].open(blocks.data(), all);
    std::atomic<int> arrived{0};
    std::atomic<int64_t> next{0};
    in_parallel(workers, [&] {
        const int i = arrived.fetch_add(1);
        if (!join) return work<Job::Form::bytes>(teams[0], scratch[i]);
        if (!alone) {
            teams[i].open(blocks.data(), all, &queue);
            return work<Job::Form::bytes>(teams[i], scratch[i]);
        }
        for (int64_t g; (g = next.fetch_add(1)) < groups;) {
            Queue own;
            teams[i].open(blocks.data() + first[g], first[g + 1] - first[g], &own);
            work<Job::Form::bytes>(teams[i], scratch[i]);
        }
    });
    for (int64_t g = 0; g < groups; ++g) count[g] += begin[g + 1] - begin[g];
}

}  // namespace loft_fast
