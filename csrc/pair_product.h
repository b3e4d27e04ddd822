// The innermost product for pairs of 16-bit integers, which processors multiply and add up in one instruction.
#pragma once

#include "product.h"

#if LOFT_X86
#include <immintrin.h>
#endif

namespace loft_fast {

// Two integers of one column, of rows 2 r (low half) and 2 r + 1.
using Pair = int32_t;

inline Pair pair_of(int32_t first, int32_t second) {
    return static_cast<Pair>((static_cast<uint32_t>(first) & 0xffffu) | static_cast<uint32_t>(second) << 16);
}
inline int32_t first_of(Pair pair) { return static_cast<int16_t>(static_cast<uint32_t>(pair) & 0xffffu); }
inline int32_t second_of(Pair pair) { return pair >> 16; }

// q = 256 high + low, with low in [-128, 127] and so high in [-128, 128]: sums of 512 products of either with another
// 16-bit integer fit 32 bits.
LOFT_INLINE int16_t low_of(int16_t q) { return static_cast<int8_t>(q); }
LOFT_INLINE int16_t high_of(int16_t q) { return static_cast<int16_t>((q >> 8) + (q >> 7 & 1)); }

// acc[i][j] = sum over pairs of left[i] * right[j], both halves, as `multiply` for numbers.
template <int Bytes>
inline void multiply_pairs(const Pair* left, const Pair* right, int64_t pairs, int32_t* acc) {
    constexpr int kWidth = Shape<Pair, Bytes>::width, kHeight = Shape<Pair, Bytes>::height;
    for (int top = 0; top < kWidth; ++top)
        for (int j = 0; j < kWidth; ++j) {
            const Pair* a = left + top / kHeight * kHeight * pairs + top % kHeight;
            const Pair* b = right + j;
            int32_t sum = 0;
            for (int64_t r = 0; r < pairs; ++r, a += kHeight, b += kWidth)
                sum += first_of(*a) * first_of(*b) + second_of(*a) * second_of(*b);
            acc[top * kWidth + j] = sum;
        }
}

#if LOFT_X86
// The same for each kind of vector. A macro, since a template cannot choose the instructions it is compiled for.
#define LOFT_MULTIPLY_PAIRS(bytes, features, Wide, multiply_add)                                              \
    template <>                                                                                               \
    __attribute__((target(features))) inline void multiply_pairs<bytes>(const Pair* left, const Pair* right,  \
                                                                        int64_t pairs, int32_t* acc) {        \
        using V = Vector<int32_t, bytes>;                                                                     \
        constexpr int kWidth = Shape<Pair, bytes>::width, kHeight = Shape<Pair, bytes>::height;               \
        for (int top = 0; top < kWidth; top += kHeight) {                                                     \
            const Pair* a = left + top * pairs;                                                               \
            const Pair* b = right;                                                                            \
            V sum[kHeight][3] = {};                                                                           \
            for (int64_t r = 0; r < pairs; ++r, a += kHeight, b += kWidth)                                    \
                for (int i = 0; i < kHeight; ++i)                                                             \
                    for (int v = 0; v < 3; ++v)                                                               \
                        sum[i][v] += (V)multiply_add((Wide)(V{} + a[i]), (Wide)reinterpret_cast<const V*>(b)[v]); \
            for (int i = 0; i < kHeight; ++i)                                                                 \
                for (int v = 0; v < 3; ++v) reinterpret_cast<V*>(acc + (top + i) * kWidth)[v] = sum[i][v];    \
        }                                                                                                     \
    }

LOFT_MULTIPLY_PAIRS(16, "sse2", __m128i, _mm_madd_epi16)
LOFT_MULTIPLY_PAIRS(32, "avx2", __m256i, _mm256_madd_epi16)
LOFT_MULTIPLY_PAIRS(64, "avx512f,avx512bw,prefer-vector-width=512", __m512i, _mm512_madd_epi16)
#undef LOFT_MULTIPLY_PAIRS
#endif

}  // namespace loft_fast
