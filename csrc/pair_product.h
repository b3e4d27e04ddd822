// Products of pairs of 16-bit numbers, which processors multiply and add up in one instruction.
#pragma once

#include "product.h"

#if LOFT_X86
#include <immintrin.h>
#endif

namespace loft_fast {

// Two numbers of one column, of rows 2 r (low half) and 2 r + 1.
using Pair = int32_t;

inline Pair pair_of(int32_t first, int32_t second) {
    return static_cast<Pair>((static_cast<uint32_t>(first) & 0xffffu) | static_cast<uint32_t>(second) << 16);
}

// q = 256 high + low, with low in [-128, 127] and so high in [-128, 128]: sums of 512 products of either with another
// 16-bit integer fit 32 bits.
LOFT_INLINE int16_t low_of(int16_t q) { return static_cast<int8_t>(q); }
LOFT_INLINE int16_t high_of(int16_t q) { return static_cast<int16_t>((q >> 8) + (q >> 7 & 1)); }

#define LOFT_LOW(pair) ((pair) << 16 >> 16)
#define LOFT_TWO_PRODUCTS(sum, a, b) (sum) + LOFT_LOW(a) * LOFT_LOW(b) + ((a) >> 16) * ((b) >> 16)
LOFT_STRIP(strip_pairs_portable, , LOFT_TWO_PRODUCTS)
#if LOFT_X86
#define LOFT_MADD_SSE2(sum, a, b) (sum) + (S)_mm_madd_epi16((__m128i)(a), (__m128i)(b))
#define LOFT_MADD_AVX2(sum, a, b) (sum) + (S)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#define LOFT_MADD_AVX512(sum, a, b) (sum) + (S)_mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#define LOFT_MADD_VNNI(sum, a, b) (S)_mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b))
#define LOFT_MADD_BF16(sum, a, b) (S)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b))
LOFT_STRIP(strip_pairs_sse2, , LOFT_MADD_SSE2)
LOFT_STRIP(strip_pairs_avx2, __attribute__((target("avx2"))), LOFT_MADD_AVX2)
LOFT_STRIP(strip_pairs_avx512, __attribute__((target("avx512f,avx512bw,prefer-vector-width=512"))), LOFT_MADD_AVX512)
LOFT_STRIP(strip_pairs_vnni, __attribute__((target("avx512f,avx512vnni,prefer-vector-width=512"))), LOFT_MADD_VNNI)
#if LOFT_BF16
LOFT_STRIP(strip_pairs_bf16, __attribute__((target("avx512f,avx512bf16,prefer-vector-width=512"))), LOFT_MADD_BF16)
#endif
#undef LOFT_MADD_SSE2
#undef LOFT_MADD_AVX2
#undef LOFT_MADD_AVX512
#undef LOFT_MADD_VNNI
#undef LOFT_MADD_BF16
#endif
#undef LOFT_TWO_PRODUCTS
#undef LOFT_LOW

// How panels of pairs of integers are multiplied; Fused: in one instruction, not two.
template <int Bytes, bool Fused>
struct IntegerPairs {
    using Packed = Pair;
    using Sum = int32_t;
    static constexpr int bytes = Bytes;
    static constexpr int64_t chain = 256;

    template <int Count>
    static LOFT_INLINE void strip(const Pair* left, const Pair* right, int64_t rows, bool add, Sum* out) {
#if LOFT_X86
        if constexpr (Fused) return strip_pairs_vnni<Pair, Sum, Bytes, Count>(left, right, rows, add, out);
        if constexpr (Bytes == 64) return strip_pairs_avx512<Pair, Sum, Bytes, Count>(left, right, rows, add, out);
        if constexpr (Bytes == 32) return strip_pairs_avx2<Pair, Sum, Bytes, Count>(left, right, rows, add, out);
        if constexpr (Bytes == 16) return strip_pairs_sse2<Pair, Sum, Bytes, Count>(left, right, rows, add, out);
#endif
        strip_pairs_portable<Pair, Sum, Bytes, Count>(left, right, rows, add, out);
    }
};

// How panels of pairs of bfloat16 numbers are multiplied, with AVX-512-BF16: products are exact, sums are in float32.
template <int64_t Chain>
struct BFloat16Pairs {
    using Packed = Pair;
    using Sum = float;
    static constexpr int bytes = 64;
    static constexpr int64_t chain = Chain;

    template <int Count>
    static LOFT_INLINE void strip(const Pair* left, const Pair* right, int64_t rows, bool add, Sum* out) {
#if LOFT_BF16
        strip_pairs_bf16<Pair, Sum, bytes, Count>(left, right, rows, add, out);
#endif
    }
};

}  // namespace loft_fast
