// Rows less a center, on their way into a panel, and the sum of that.
#pragma once

#include "half.h"
#include "pair_product.h"

namespace loft_fast {

#if defined(__GNUC__)
// A panel's columns of `count` rows. A macro, since a template cannot choose the instructions it is compiled for.
//     center, sum: of the panel; out: (count, width)
#define LOFT_CENTER(name, attributes)                                                                                  \
    template <typename T, int Bytes>                                                                                   \
    attributes LOFT_NOINLINE void name(const T* const* rows, int64_t column, int64_t count, const T* center,           \
                                       double* sum, T* out) {                                                          \
        using V = Vector<T, Bytes>;                                                                                    \
        using D = Vector<double, Bytes>;                                                                               \
        constexpr int kWidth = Shape<T, Bytes>::width, kLanes = Shape<T, Bytes>::lanes;                                \
        constexpr int kDoubles = Shape<double, Bytes>::lanes;                                                          \
        using Part = Vector<T, kDoubles * sizeof(T)>;                                                                  \
        for (int left = 0; left < kWidth; left += kLanes) {                                                            \
            const V near = *reinterpret_cast<const V*>(center + left);                                                 \
            for (int64_t r = 0; r < count; ++r)                                                                        \
                *reinterpret_cast<V*>(out + r * kWidth + left) =                                                       \
                    *reinterpret_cast<const V*>(rows[r] + column + left) - near;                                       \
        }                                                                                                              \
        for (int left = 0; left < kWidth; left += kDoubles) {                                                          \
            const D near = __builtin_convertvector(*reinterpret_cast<const Part*>(center + left), D);                  \
            D* to = reinterpret_cast<D*>(sum + left);                                                                  \
            D total = *to;                                                                                             \
            for (int64_t r = 0; r < count; ++r) {                                                                      \
                const Part values = *reinterpret_cast<const Part*>(rows[r] + column + left);                           \
                total += __builtin_convertvector(values, D) - near;                                                    \
            }                                                                                                          \
            *to = total;                                                                                               \
        }                                                                                                              \
    }
LOFT_CENTER(center_portable, )
#if LOFT_X86
LOFT_CENTER(center_avx2, __attribute__((target("avx2"))))
LOFT_CENTER(center_avx512, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif
#undef LOFT_CENTER

template <typename T, int Bytes>
LOFT_INLINE void center_panel(const T* const* rows, int64_t column, int64_t count, const T* center, double* sum,
                              T* out) {
#if LOFT_X86
    if constexpr (Bytes == 64) return center_avx512<T, Bytes>(rows, column, count, center, sum, out);
    if constexpr (Bytes == 32) return center_avx2<T, Bytes>(rows, column, count, center, sum, out);
#endif
    center_portable<T, Bytes>(rows, column, count, center, sum, out);
}
#endif

// The upper halves of two float32 numbers.
inline Pair upper_halves(float first, float second) {
    uint32_t low, high;
    std::memcpy(&low, &first, sizeof low);
    std::memcpy(&high, &second, sizeof high);
    return static_cast<Pair>(low >> 16 | (high & 0xffff0000u));
}

#if LOFT_X86
__attribute__((target("avx512f"))) LOFT_INLINE __m512i upper_halves(__m512 first, __m512 second) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16),
                           _mm512_and_si512(_mm512_castps_si512(second), upper));
}

__attribute__((target("avx512f"))) LOFT_INLINE void add_up(__m512 values, __m512d (&totals)[2]) {
    const __m512d rest = _mm512_shuffle_f64x2(_mm512_castps_pd(values), _mm512_castps_pd(values), 0xee);
    const __m256 halves[] = {_mm512_castps512_ps256(values), _mm512_castps512_ps256(_mm512_castpd_ps(rest))};
    for (int i = 0; i < 2; ++i) totals[i] = _mm512_add_pd(totals[i], _mm512_cvtps_pd(halves[i]));
}

// What center_panel does, for an even number of bfloat16 rows, in pairs. Every difference is a bfloat16 number.
template <int Width>
__attribute__((target("avx512f,avx512bw"))) LOFT_NOINLINE void center_pairs(const BFloat16* const* rows, int64_t column,
                                                                            int64_t count, const float* center,
                                                                            double* sum, Pair* out) {
    for (int left = 0; left < Width; left += 16) {
        const __m512 near = _mm512_loadu_ps(center + left);
        __m512d totals[] = {_mm512_loadu_pd(sum + left), _mm512_loadu_pd(sum + left + 8)};
        for (int64_t r = 0; r < count; r += 2) {
            const auto* first = reinterpret_cast<const __m256i*>(rows[r] + column + left);
            const auto* second = reinterpret_cast<const __m256i*>(rows[r + 1] + column + left);
            const __m512i a = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(first)), 16);
            const __m512i b = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(second)), 16);
            const __m512 low = _mm512_sub_ps(_mm512_castsi512_ps(a), near);
            const __m512 high = _mm512_sub_ps(_mm512_castsi512_ps(b), near);
            for (const __m512 values : {low, high}) add_up(values, totals);
            _mm512_storeu_si512(out + r / 2 * Width + left, upper_halves(low, high));
        }
        for (int i = 0; i < 2; ++i) _mm512_storeu_pd(sum + left + 8 * i, totals[i]);
    }
}
#endif

}  // namespace loft_fast
