// Panels for processors that multiply matrices (Intel AMX): tiles of 16 x 16 words, of 32 bits each.
#pragma once

#include "pair_product.h"

#if LOFT_AMX
#define LOFT_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define LOFT_TILE_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t{stride}) : "memory")
#define LOFT_TILE_STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(int64_t{stride}) : "memory")
#define LOFT_TILE_PRODUCT(instruction, sum, left, right) \
    __asm__ volatile(instruction " %%tmm" #right ", %%tmm" #left ", %%tmm" #sum ::)
#endif

namespace loft_fast {

// A word has Fold numbers of one column, of as many rows; 16 words of each column are a step. Numbers are split into
// planes that add up to them: a panel is (steps, planes, 16, width) words, a left operand (steps, planes, 2, 16, 16),
// with the words of a column next to each other. Rows past the last are zero.
template <int Fold, int Planes>
struct MatrixTiles {
    using Packed = int32_t;
    static constexpr int bytes = 64, width = 32, planes = Planes;
    static constexpr int kEdge = 16, kTile = kEdge * kEdge, kPlane = kEdge * width, kStep = planes * kPlane;
    static constexpr int64_t kStride = width * sizeof(Packed), kTileStride = kEdge * sizeof(Packed);

    // While it lives, all tile registers of this thread are whole ones.
    class Session {
      public:
        Session() {
#if LOFT_AMX
            struct alignas(64) {
                uint8_t palette = 1, start = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {};
                uint8_t rows[16] = {};
            } shape;
            for (int tile = 0; tile < 8; ++tile) {
                shape.row_bytes[tile] = kTileStride;
                shape.rows[tile] = kEdge;
            }
            __asm__ volatile("ldtilecfg (%0)" ::"r"(&shape) : "memory");
#endif
        }
        ~Session() {
#if LOFT_AMX
            __asm__ volatile("tilerelease" ::);
#endif
        }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
    };

    static constexpr int64_t size(int64_t rows) { return steps(rows) * kStep; }
    static constexpr int64_t offset(int64_t row) {
        return row / (Fold * kEdge) * kStep + row % (Fold * kEdge) / Fold * width;
    }
    static constexpr int64_t left_size(int64_t rows) { return size(rows); }

    static LOFT_INLINE void blank(int64_t rows, int64_t column, Packed* out) {
        for (int p = 0; p < planes; ++p)
            for (int64_t r = 0; r < words(rows); ++r)
                std::fill(out + p * kPlane + r * width + column, out + p * kPlane + (r + 1) * width, 0);
    }

    static LOFT_INLINE void end(int64_t rows, Packed* panel) {
        const int64_t first = words(rows) % kEdge;
        if (first == 0) return;
        for (int p = 0; p < planes; ++p) {
            Packed* plane = panel + (steps(rows) - 1) * kStep + p * kPlane;
            std::fill(plane + first * width, plane + kPlane, 0);
        }
    }

    static LOFT_INLINE void cut(const Packed* panel, int64_t rows, Packed* left) {
        for (int64_t plane = 0; plane < steps(rows) * planes; ++plane)
            for (int half = 0; half < 2; ++half)
                transpose(panel + plane * kPlane + half * kEdge, width, left + (2 * plane + half) * kTile, kEdge);
    }

    // 16 x 16 words, of rows some words apart: pairs of rows are interleaved, then pairs of pairs, and so on.
#if LOFT_AMX
    __attribute__((target("avx512f"))) LOFT_NOINLINE static void transpose(const Packed* from, int64_t row, Packed* to,
                                                                            int64_t column) {
        __m512i a[kEdge], b[kEdge];
        for (int i = 0; i < kEdge; ++i) a[i] = _mm512_loadu_si512(from + i * row);
        for (int i = 0; i < kEdge; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < kEdge; i += 4)
            for (int k = 0; k < 2; ++k) {
                a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
                a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
            }
        constexpr int kEven = 0x88, kOdd = 0xdd;  // of the four columns that a register has
        for (int k = 0; k < 4; ++k) {             // a[4 i + k]: columns k, 4 + k, 8 + k and 12 + k of rows 4 i .. 4 i + 3
            const __m512i even = _mm512_shuffle_i32x4(a[k], a[4 + k], kEven);
            const __m512i odd = _mm512_shuffle_i32x4(a[k], a[4 + k], kOdd);
            const __m512i even_below = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], kEven);
            const __m512i odd_below = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], kOdd);
            _mm512_store_si512(to + k * column, _mm512_shuffle_i32x4(even, even_below, kEven));
            _mm512_store_si512(to + (4 + k) * column, _mm512_shuffle_i32x4(odd, odd_below, kEven));
            _mm512_store_si512(to + (8 + k) * column, _mm512_shuffle_i32x4(even, even_below, kOdd));
            _mm512_store_si512(to + (12 + k) * column, _mm512_shuffle_i32x4(odd, odd_below, kOdd));
        }
    }
#else
    static void transpose(const Packed*, int64_t, Packed*, int64_t) {}
#endif

  protected:
    static constexpr int64_t words(int64_t rows) { return (rows + Fold - 1) / Fold; }
    static constexpr int64_t steps(int64_t rows) { return (words(rows) + kEdge - 1) / kEdge; }
};

// bfloat16 numbers. Products of 32 rows are added up by themselves, then added to the sum.
struct BFloat16Tiles : MatrixTiles<2, 1> {
    using Sum = float;
    static constexpr int sums = 1;

    // 2 x 2 tiles of sums in registers 0 to 3, of left tiles in 4 and 5 and right ones in 6 and 7.
    static LOFT_NOINLINE void multiply(const Packed* left, const Packed* right, int64_t rows, const Extent&, Sum* acc) {
#if LOFT_AMX
        LOFT_TILE_ZERO(0);
        LOFT_TILE_ZERO(1);
        LOFT_TILE_ZERO(2);
        LOFT_TILE_ZERO(3);
        for (int64_t step = 0; step < steps(rows); ++step, left += kStep, right += kStep) {
            LOFT_TILE_LOAD(4, left, kTileStride);
            LOFT_TILE_LOAD(5, left + kTile, kTileStride);
            LOFT_TILE_LOAD(6, right, kStride);
            LOFT_TILE_LOAD(7, right + kEdge, kStride);
            LOFT_TILE_PRODUCT("tdpbf16ps", 0, 4, 6);
            LOFT_TILE_PRODUCT("tdpbf16ps", 1, 4, 7);
            LOFT_TILE_PRODUCT("tdpbf16ps", 2, 5, 6);
            LOFT_TILE_PRODUCT("tdpbf16ps", 3, 5, 7);
        }
        LOFT_TILE_STORE(0, acc, kStride);
        LOFT_TILE_STORE(1, acc + kEdge, kStride);
        LOFT_TILE_STORE(2, acc + kEdge * width, kStride);
        LOFT_TILE_STORE(3, acc + kEdge * width + kEdge, kStride);
#endif
    }
};

// 16-bit integers q = 256 high + low, high signed and low not. Three sums: of high times high, of high times low and the
// other way round, of low times low (unsigned).
struct IntegerTiles : MatrixTiles<4, 2> {
    using Sum = int32_t;
    static constexpr int sums = 3;

    static LOFT_NOINLINE void multiply(const Packed* left, const Packed* right, int64_t rows, const Extent& extent,
                                       Sum* acc) {
#if LOFT_AMX
        for (int i = 0; i * kEdge < extent.height; ++i)
            for (int j = extent.diagonal ? i : 0; j * kEdge < extent.width; ++j) {
                const Packed *a = left + i * kTile, *b = right + j * kEdge;
                LOFT_TILE_ZERO(0);
                LOFT_TILE_ZERO(1);
                LOFT_TILE_ZERO(2);
                for (int64_t step = 0; step < steps(rows); ++step, a += kStep, b += kStep) {
                    LOFT_TILE_LOAD(4, a, kTileStride);
                    LOFT_TILE_LOAD(7, b + kPlane, kStride);
                    LOFT_TILE_PRODUCT("tdpbsud", 1, 4, 7);
                    LOFT_TILE_LOAD(6, b, kStride);
                    LOFT_TILE_PRODUCT("tdpbssd", 0, 4, 6);
                    LOFT_TILE_LOAD(5, a + 2 * kTile, kTileStride);
                    LOFT_TILE_PRODUCT("tdpbuud", 2, 5, 7);
                    LOFT_TILE_PRODUCT("tdpbusd", 1, 5, 6);
                }
                Sum* to = acc + (i * width + j) * kEdge;
                LOFT_TILE_STORE(0, to, kStride);
                LOFT_TILE_STORE(1, to + width * width, kStride);
                LOFT_TILE_STORE(2, to + 2 * width * width, kStride);
            }
#endif
    }
};

#if LOFT_AMX
#undef LOFT_TILE_ZERO
#undef LOFT_TILE_LOAD
#undef LOFT_TILE_STORE
#undef LOFT_TILE_PRODUCT
#endif

}  // namespace loft_fast
