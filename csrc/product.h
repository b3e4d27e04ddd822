// The innermost product of the kernels, and the choice of instructions it is compiled for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "half.h"

#if defined(__GNUC__)
#define LOFT_INLINE inline __attribute__((always_inline))
#define LOFT_LAMBDA __attribute__((always_inline))
#define LOFT_PREFETCH(address, write) __builtin_prefetch(address, write)
#else
#define LOFT_INLINE inline
#define LOFT_LAMBDA
#define LOFT_PREFETCH(address, write)
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define LOFT_X86 1
#endif

namespace loft_fast {

constexpr int64_t kChain = 256;  // rows added up in one register: a panel of them fits the first cache

// `Bytes` as a vector register, so that no optimiser has to find the parallelism.
#if defined(__GNUC__)
template <typename T, int Bytes>
struct VectorOf {
    typedef T type __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
};
template <typename T, int Bytes>
using Vector = typename VectorOf<T, Bytes>::type;
#else
template <typename T, int Bytes>
using Vector = T;
#endif

// The shape of the innermost product for a vector width: `height` x 3 vectors of sums, 3 of one operand and one of the
// other fill the 16 registers (32 with AVX-512), and hide the latency of the multiply-adds.
template <typename T, int Bytes>
struct Shape {
    static constexpr int lanes = sizeof(Vector<T, Bytes>) / sizeof(T);
    static constexpr int width = 3 * lanes;  // columns of a panel; a tile is width x width
    static constexpr int height = lanes <= 2 ? 3 : Bytes == 64 ? 8 : 4;
    static_assert(width % height == 0);
};

// acc[i][j] = sum over rows r of left[r][i] * right[r][j]. right: a panel, (rows, width). left: another one, cut into
// slivers of `height` columns, (rows, height) each.
template <typename T, int Bytes>
LOFT_INLINE void multiply(const T* left, const T* right, int64_t rows, T* acc) {
    using V = Vector<T, Bytes>;
    constexpr int kWidth = Shape<T, Bytes>::width, kHeight = Shape<T, Bytes>::height;
    for (int64_t start = 0; start < rows; start += kChain) {
        const int64_t chain = std::min(kChain, rows - start);
        for (int top = 0; top < kWidth; top += kHeight) {
            const T* a = left + top * rows + start * kHeight;
            const T* b = right + start * kWidth;
            V sum[kHeight][3] = {};
            for (int64_t r = 0; r < chain; ++r, a += kHeight, b += kWidth)
                for (int i = 0; i < kHeight; ++i)
                    for (int v = 0; v < 3; ++v) sum[i][v] += a[i] * reinterpret_cast<const V*>(b)[v];
            for (int i = 0; i < kHeight; ++i) {
                V* out = reinterpret_cast<V*>(acc + (top + i) * kWidth);
                for (int v = 0; v < 3; ++v) out[v] = start ? out[v] + sum[i][v] : sum[i][v];
            }
        }
    }
}

template <typename In>
LOFT_INLINE auto value_of(In value) {
    if constexpr (std::is_same_v<In, Float16> || std::is_same_v<In, BFloat16>)
        return static_cast<float>(value);
    else
        return value;
}

// team.work(own). Everything in it is inlined into one of these, and so compiled for its instructions.
template <typename Team>
void work_portable(Team& team, typename Team::Scratch& own) {
    team.work(own);
}
#if LOFT_X86
template <typename Team>
__attribute__((target("avx2,fma,f16c"))) void work_avx2(Team& team, typename Team::Scratch& own) {
    team.work(own);
}
template <typename Team>
__attribute__((target("avx512f,avx512vl,avx512bw,prefer-vector-width=512"))) void work_avx512(Team& team,
                                                                                     typename Team::Scratch& own) {
    team.work(own);
}
#endif

// The same for vectors of so many bytes, which `vector_bytes` allows.
template <int Bytes, typename Team>
void work(Team& team, typename Team::Scratch& own) {
#if LOFT_X86
    if constexpr (Bytes == 64) return work_avx512(team, own);
    if constexpr (Bytes == 32) return work_avx2(team, own);
#endif
    work_portable(team, own);
}

// The widest vectors of this machine, of those that kernels are compiled for: 64, 32 or 16 bytes.
inline int vector_bytes() {
#if LOFT_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return 64;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 32;
#endif
    return 16;
}

}  // namespace loft_fast
