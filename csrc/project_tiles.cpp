#include "project_tiles.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "aligned.h"
#include "matrix_tiles.h"
#include "parallel.h"

#if LOFT_AMX

namespace loft_fast {
namespace {

using Form = BFloat16Tiles;
constexpr int64_t kWidth = Form::width;
constexpr int64_t kTiles = 2;        // tiles of rows in a block: a panel of the basis is read once for all of them
constexpr int64_t kSmall = 1 << 24;  // multiply-adds below which a thread costs more than it brings

#define LOFT_ROUND __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) LOFT_NOINLINE

__mmask32 first(int64_t count) { return count >= kWidth ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

// `count` numbers, 32 of them to a step of an operand.
LOFT_ROUND void round_row(const float* row, int64_t count, int32_t* to, int64_t step) {
    for (int64_t k = 0; k < count; k += kWidth, to += step) {
        const __mmask32 mask = first(count - k);
        const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row + k);
        const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), row + k + 16);
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// The same of a row of x less the center, which has zeros up to a multiple of 32.
LOFT_ROUND void center_row(const BFloat16* row, const float* center, int64_t count, int32_t* to) {
    for (int64_t k = 0; k < count; k += kWidth, to += Form::kStep) {
        const __m512i bits = _mm512_maskz_loadu_epi16(first(count - k), row + k);
        const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16);
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16);
        const __m512 a = _mm512_sub_ps(_mm512_castsi512_ps(low), _mm512_loadu_ps(center + k));
        const __m512 b = _mm512_sub_ps(_mm512_castsi512_ps(high), _mm512_loadu_ps(center + k + 16));
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

// Pairs of two rows of the basis, 32 columns at most.
LOFT_ROUND void pair_rows(const float* even, const float* odd, int64_t count, int32_t* to) {
    for (int64_t j = 0; j < kWidth; j += 16) {
        const auto mask = static_cast<__mmask16>(first(count) >> j);
        const __m512 a = _mm512_maskz_loadu_ps(mask, even + j), b = _mm512_maskz_loadu_ps(mask, odd + j);
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
        _mm512_storeu_si512(to + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// 32 sums at most plus the center, as BFloat16 rounds them: the processor's own conversion takes tiny numbers for zero.
LOFT_ROUND void store_row(const float* sums, const float* center, int64_t count, BFloat16* to) {
    for (int64_t j = 0; j < kWidth; j += 16) {
        const __m512 value = _mm512_add_ps(_mm512_loadu_ps(sums + j), _mm512_loadu_ps(center + j));
        const __m512i bits = _mm512_castps_si512(value), upper = _mm512_srli_epi32(bits, 16);
        const __m512i even = _mm512_and_si512(upper, _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
        const __m512i nan = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
        const __mmask16 none = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        const __m512i nearest = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), none, nan);
        _mm512_mask_cvtepi32_storeu_epi16(to + j, static_cast<__mmask16>(first(count) >> j), nearest);
    }
}

#undef LOFT_ROUND

// A team of threads packs the basis, then everyone takes the next block of rows and does it alone.
class TileProjector {
  public:
    // What one member needs for itself: a block less the center, and its coordinates, as left operands.
    struct Scratch {
        Scratch(int64_t tiles, int64_t d, int64_t s)
            : centered(tiles * Form::size(d)), coordinates(tiles * Form::size(s)), row(d) {}
        Aligned<int32_t> centered, coordinates;
        std::vector<float> row;
    };

    TileProjector(const Rows& x, const float* basis, const float* center, int64_t s, BFloat16* out, int64_t members)
        : x_(x),
          basis_(basis),
          center_(panels_of(x.d) * kWidth, 0.0f),
          d_(x.d),
          s_(s),
          out_(out),
          inner_(panels_of(s)),
          outer_(panels_of(x.d)),
          tiles_(panels_of(x.n)),
          depth_(std::clamp<int64_t>(tiles_ / members, 1, kTiles)),
          blocks_((tiles_ + depth_ - 1) / depth_),
          columns_(inner_ * Form::size(x.d)),
          rows_(outer_ * Form::size(s)) {
        std::copy_n(center, d_, center_.data());
    }

    int64_t depth() const { return depth_; }
    int64_t blocks() const { return blocks_; }

    // Work until nothing is left to take; every member calls it.
    void work(Scratch& own) {
        const Form::Session session;
        for (int64_t id; (id = next_panel_.fetch_add(1)) < inner_ + outer_; packed_.fetch_add(1))
            id < inner_ ? pack_columns(id) : pack_rows(id - inner_);
        wait_for(packed_, inner_ + outer_);
        for (int64_t id; (id = next_block_.fetch_add(1)) < blocks_;) run(id * depth_ * kWidth, own);
    }

  private:
    static int64_t panels_of(int64_t columns) { return (columns + kWidth - 1) / kWidth; }

    // Panel p of U, d rows; past its edges, zeros.
    void pack_columns(int64_t p) {
        const int64_t left = p * kWidth;
        const std::vector<float> none(s_, 0.0f);
        int32_t* to = columns_.get() + p * Form::size(d_);
        for (int64_t k = 0; k < panels_of(d_) * kWidth; k += 2) {
            const float* even = k < d_ ? basis_ + k * s_ : none.data();
            const float* odd = k + 1 < d_ ? basis_ + (k + 1) * s_ : none.data();
            pair_rows(even + left, odd + left, s_ - left, to + Form::offset(k));
        }
    }

    // A panel of U^T, s rows.
    void pack_rows(int64_t p) {
        int32_t* to = rows_.get() + p * Form::size(s_);
        std::fill_n(to, Form::size(s_), 0);
        alignas(64) int32_t words[Form::kTile];
        for (int64_t k = 0; k < s_; k += kWidth, to += Form::kStep)
            for (int half = 0; half < 2; ++half) {
                std::fill_n(words, Form::kTile, 0);
                const int64_t top = p * kWidth + half * Form::kEdge;
                for (int64_t i = 0; i < std::min<int64_t>(Form::kEdge, d_ - top); ++i)
                    round_row(basis_ + (top + i) * s_ + k, std::min(kWidth, s_ - k), words + i * Form::kEdge, 0);
                Form::transpose(words, Form::kEdge, to + half * Form::kEdge, kWidth);
            }
    }

    // Where row i of a tile begins in a left operand.
    static int32_t* place(int32_t* left, int64_t i) {
        return left + i / Form::kEdge * Form::kTile + i % Form::kEdge * Form::kEdge;
    }

    void run(int64_t start, Scratch& own) {
        const int64_t n = std::min(depth_ * kWidth, x_.n - start), tiles = panels_of(n);
        int32_t *centered = own.centered.get(), *coordinates = own.coordinates.get();
        std::fill_n(centered + (tiles - 1) * Form::size(d_), Form::size(d_), 0);
        for (int64_t r = 0; r < n; ++r) {
            const BFloat16* from = static_cast<const BFloat16*>(x_.data) + x_.row_stride * (start + r);
            int32_t* to = place(centered + r / kWidth * Form::size(d_), r % kWidth);
            if (x_.col_stride == 1) {
                center_row(from, center_.data(), d_, to);
            } else {
                for (int64_t k = 0; k < d_; ++k) own.row[k] = value_of(from[k * x_.col_stride]) - center_[k];
                round_row(own.row.data(), d_, to, Form::kStep);
            }
        }
        const Extent whole{kWidth, kWidth, false};
        alignas(64) float acc[kWidth * kWidth];
        for (int64_t p = 0; p < inner_; ++p)
            for (int64_t t = 0; t < tiles; ++t) {
                Form::multiply(centered + t * Form::size(d_), columns_.get() + p * Form::size(d_), d_, whole, acc);
                int32_t* to = coordinates + t * Form::size(s_) + p * Form::kStep;
                for (int64_t i = 0; i < kWidth; ++i) round_row(acc + i * kWidth, kWidth, place(to, i), 0);
            }
        for (int64_t p = 0; p < outer_; ++p)
            for (int64_t t = 0; t < tiles; ++t) {
                Form::multiply(coordinates + t * Form::size(s_), rows_.get() + p * Form::size(s_), s_, whole, acc);
                const int64_t left = p * kWidth, top = t * kWidth;
                for (int64_t i = 0; i < std::min(kWidth, n - top); ++i)
                    store_row(acc + i * kWidth, center_.data() + left, d_ - left, out_ + (start + top + i) * d_ + left);
            }
    }

    const Rows& x_;
    const float* basis_;
    std::vector<float> center_;
    const int64_t d_, s_;
    BFloat16* out_;
    const int64_t inner_, outer_, tiles_, depth_, blocks_;
    Aligned<int32_t> columns_, rows_;
    std::atomic<int64_t> next_panel_{0}, packed_{0}, next_block_{0};
};

}  // namespace

void project_tiles(const Rows& x, const float* basis, const float* center, int64_t s, void* out, int threads) {
    if (x.n == 0) return;
    const int64_t affordable = std::min<int64_t>(threads, 1 + x.n * x.d * s / kSmall);
    TileProjector team(x, basis, center, s, static_cast<BFloat16*>(out), affordable);
    const int workers = static_cast<int>(std::min(affordable, team.blocks()));
    std::vector<TileProjector::Scratch> scratch;
    scratch.reserve(workers);
    for (int i = 0; i < workers; ++i) scratch.emplace_back(team.depth(), x.d, s);
    std::atomic<int> arrived{0};
    in_parallel(workers, [&] { team.work(scratch[arrived.fetch_add(1)]); });
}

}  // namespace loft_fast

#else

namespace loft_fast {

void project_tiles(const Rows&, const float*, const float*, int64_t, void*, int) {}

}  // namespace loft_fast

#endif
