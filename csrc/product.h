// The innermost product of the kernels, and the choice of instructions it is compiled for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "half.h"
#include "instructions.h"

#if defined(__GNUC__)
#define LOFT_INLINE inline __attribute__((always_inline))
#define LOFT_LAMBDA __attribute__((always_inline))
#define LOFT_NOINLINE __attribute__((noinline))
#define LOFT_PREFETCH(address, write) __builtin_prefetch(address, write)
#else
#define LOFT_INLINE inline
#define LOFT_LAMBDA
#define LOFT_NOINLINE
#define LOFT_PREFETCH(address, write)
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define LOFT_X86 1
#if defined(__clang__) || __GNUC__ >= 11
#define LOFT_BF16 1  // the compiler knows these instructions
#if defined(__linux__)
#define LOFT_AMX 1  // and these, for which the system has to be asked
#endif
#endif
#endif

namespace loft_fast {

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

// One strip of a product: `height` rows of sums, Count vectors wide. A macro, since a template cannot choose the
// instructions it is compiled for.
//     left: a sliver, (rows, height); right: a panel, (rows, width), from the strip's first column on
//     out: the strip's corner in a tile; what is there is added to or overwritten
#define LOFT_STRIP(name, attributes, step)                                                                             \
    template <typename Packed, typename Sum, int Bytes, int Count>                                                     \
    attributes LOFT_NOINLINE void name(const Packed* left, const Packed* right, int64_t rows, bool add, Sum* out) {    \
        using V = Vector<Packed, Bytes>;                                                                               \
        using S = Vector<Sum, Bytes>;                                                                                  \
        constexpr int kWidth = Shape<Packed, Bytes>::width, kHeight = Shape<Packed, Bytes>::height;                    \
        S sum[kHeight][Count]; /* in registers, which a list of zeros would not be */                                  \
        for (int i = 0; i < kHeight; ++i)                                                                              \
            for (int v = 0; v < Count; ++v) sum[i][v] = S{};                                                           \
        for (int64_t r = 0; r < rows; ++r, left += kHeight, right += kWidth)                                           \
            for (int i = 0; i < kHeight; ++i)                                                                          \
                for (int v = 0; v < Count; ++v)                                                                        \
                    sum[i][v] = step(sum[i][v], (left[i] - V{}), reinterpret_cast<const V*>(right)[v]);                \
        for (int i = 0; i < kHeight; ++i) {                                                                            \
            S* to = reinterpret_cast<S*>(out + i * kWidth);                                                            \
            for (int v = 0; v < Count; ++v) to[v] = add ? to[v] + sum[i][v] : sum[i][v];                               \
        }                                                                                                              \
    }

#define LOFT_MULTIPLY_ADD(sum, a, b) (sum) + (a) * (b)
LOFT_STRIP(strip_portable, , LOFT_MULTIPLY_ADD)
#if LOFT_X86
LOFT_STRIP(strip_avx2, __attribute__((target("avx2,fma"))), LOFT_MULTIPLY_ADD)
LOFT_STRIP(strip_avx512, __attribute__((target("avx512f,prefer-vector-width=512"))), LOFT_MULTIPLY_ADD)
#endif
#undef LOFT_MULTIPLY_ADD

// How panels of plain numbers are multiplied. Others (pair_product.h) have the same members.
template <typename T, int Bytes>
struct Numbers {
    using Packed = T;
    using Sum = T;
    static constexpr int bytes = Bytes;
    static constexpr int64_t chain = 256;  // rows added up in one register: a panel of them fits the first cache

    template <int Count>
    static LOFT_INLINE void strip(const T* left, const T* right, int64_t rows, bool add, T* out) {
#if LOFT_X86
        if constexpr (Bytes == 64) return strip_avx512<T, T, Bytes, Count>(left, right, rows, add, out);
        if constexpr (Bytes == 32) return strip_avx2<T, T, Bytes, Count>(left, right, rows, add, out);
#endif
        strip_portable<T, T, Bytes, Count>(left, right, rows, add, out);
    }
};

// The part of a tile that is wanted: its first rows and columns; of one on the diagonal, only the upper half.
struct Extent {
    int64_t height, width;
    bool diagonal;
};

// acc[i][j] = sum over rows r of left[r][i] * right[r][j], and where it is not wanted, anything. right: a panel,
// (rows, width). left: another one, cut into slivers of `height` columns, (rows, height) each.
template <typename Kernel>
LOFT_INLINE void multiply(const typename Kernel::Packed* left, const typename Kernel::Packed* right, int64_t rows,
                          const Extent& extent, typename Kernel::Sum* acc) {
    using Form = Shape<typename Kernel::Packed, Kernel::bytes>;
    const auto vectors = static_cast<int>((extent.width + Form::lanes - 1) / Form::lanes);
    for (int64_t start = 0; start < rows; start += Kernel::chain) {
        const int64_t chain = std::min(Kernel::chain, rows - start);
        for (int top = 0; top < extent.height; top += Form::height) {
            const int skipped = extent.diagonal ? top / Form::lanes : 0, offset = skipped * Form::lanes;
            const auto* a = left + top * rows + start * Form::height;
            const auto* b = right + start * Form::width + offset;
            auto* out = acc + top * Form::width + offset;
            switch (vectors - skipped) {
                case 3: Kernel::template strip<3>(a, b, chain, start > 0, out); break;
                case 2: Kernel::template strip<2>(a, b, chain, start > 0, out); break;
                case 1: Kernel::template strip<1>(a, b, chain, start > 0, out); break;
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

// Bytes of the vectors to use: 64, 32 or 16.
inline int vector_bytes() {
    const Instructions has = instructions();
    return has >= Instructions::avx512 ? 64 : has == Instructions::avx2 ? 32 : 16;
}

}  // namespace loft_fast
