#include "moments_update.h"

#include <algorithm>
#include <functional>
#include <system_error>
#include <thread>
#include <type_traits>

#include "half.h"

namespace loft_fast {
namespace {

#if defined(__GNUC__)
#define LOFT_INLINE inline __attribute__((always_inline))
#else
#define LOFT_INLINE inline
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define LOFT_X86 1
#endif

constexpr int64_t kBlock = 512;   // rows multiplied before their sum goes to float64: float32 sums stay short
constexpr int kPanel = 16;        // columns packed together; a tile is kPanel x kPanel
constexpr int64_t kSmall = 1 << 21;  // multiply-adds below which a thread costs more than it brings

// `Bytes` of one panel row as a vector register, so that no optimiser has to find the parallelism.
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

// acc[i][j] = sum over rows r of left[r][i] * right[r][j]; both panels are (rows, kPanel), zero-padded.
// `Height` rows of the tile are kept in registers at a time.
template <typename T, int Bytes, int Height>
LOFT_INLINE void multiply(const T* left, const T* right, int64_t rows, T* acc) {
    using V = Vector<T, Bytes>;
    constexpr int kLanes = sizeof(V) / sizeof(T), kParts = kPanel / kLanes;
    for (int top = 0; top < kPanel; top += Height) {
        V sum[Height][kParts] = {};
        for (int64_t r = 0; r < rows; ++r) {
            const T* a = left + r * kPanel + top;
            const V* b = reinterpret_cast<const V*>(right + r * kPanel);
            for (int i = 0; i < Height; ++i)
                for (int p = 0; p < kParts; ++p) sum[i][p] += a[i] * b[p];
        }
        for (int i = 0; i < Height; ++i)
            for (int p = 0; p < kParts; ++p) reinterpret_cast<V*>(acc + (top + i) * kPanel)[p] = sum[i][p];
    }
}

template <typename T>
using Multiply = void (*)(const T*, const T*, int64_t, T*);

// Heights: as many sums as leave a few of the 16 (AVX-512: 32) registers free for the operands.
template <typename T>
void multiply_portable(const T* left, const T* right, int64_t rows, T* acc) {
    multiply<T, 16, sizeof(T) == 4 ? 2 : 1>(left, right, rows, acc);
}
#if LOFT_X86
template <typename T>
__attribute__((target("avx2,fma"))) void multiply_avx2(const T* left, const T* right, int64_t rows, T* acc) {
    multiply<T, 32, sizeof(T) == 4 ? 4 : 2>(left, right, rows, acc);
}
template <typename T>
__attribute__((target("avx512f,avx512vl,prefer-vector-width=512"))) void multiply_avx512(const T* left, const T* right,
                                                                                       int64_t rows, T* acc) {
    multiply<T, 64, sizeof(T) == 4 ? 16 : 8>(left, right, rows, acc);
}
#endif

template <typename T>
Multiply<T> pick_multiply() {
#if LOFT_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return multiply_avx512<T>;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return multiply_avx2<T>;
#endif
    return multiply_portable<T>;
}

// One worker's share of one group: all rows, but only the tile rows first, first + step, ... of the upper triangle.
// Every worker packs the rows for itself: that is n d work beside n d^2, and saves all waiting for each other.
template <typename In, typename T>
class Worker {
  public:
    Worker(const Rows& x, int first, int step)
        : x_(x), first_(first), step_(step), panels_((x.d + kPanel - 1) / kPanel), packed_(panels_ * kPanel * kBlock) {}

    void run(const int64_t* order, int64_t n, const double* shift, double* total, double* scatter) {
        static const Multiply<T> multiply_tile = pick_multiply<T>();
        for (int64_t start = 0; start < n; start += kBlock) {
            const int64_t rows = std::min(kBlock, n - start);
            pack(order, start, rows, shift, first_ == 0 ? total : nullptr);
            for (int64_t p = first_; p < panels_; p += step_)
                for (int64_t q = p; q < panels_; ++q) {
                    T acc[kPanel * kPanel];
                    multiply_tile(panel(p), panel(q), rows, acc);
                    add(p, q, acc, scatter);
                }
        }
    }

  private:
    T* panel(int64_t p) { return packed_.data() + p * kPanel * kBlock; }

    void pack(const int64_t* order, int64_t start, int64_t rows, const double* shift, double* total) {
        const In* data = static_cast<const In*>(x_.data);
        for (int64_t r = 0; r < rows; ++r) {
            const In* row = data + x_.row_stride * (order ? order[start + r] : start + r);
            for (int64_t p = 0; p < panels_; ++p) {
                T* out = panel(p) + r * kPanel;
                const int64_t left = p * kPanel, width = std::min<int64_t>(kPanel, x_.d - left);
                for (int64_t j = 0; j < width; ++j) {
                    const double value = value_of(row[(left + j) * x_.col_stride]) - shift[left + j];
                    out[j] = static_cast<T>(value);
                    if (total) total[left + j] += value;
                }
                for (int64_t j = width; j < kPanel; ++j) out[j] = T(0);
            }
        }
    }

    static double value_of(In value) {
        if constexpr (std::is_same_v<In, Float16> || std::is_same_v<In, BFloat16>)
            return static_cast<float>(value);
        else
            return value;
    }

    void add(int64_t p, int64_t q, const T* acc, double* scatter) const {
        const int64_t d = x_.d, height = std::min<int64_t>(kPanel, d - p * kPanel),
                      width = std::min<int64_t>(kPanel, d - q * kPanel);
        for (int64_t i = 0; i < height; ++i) {
            double* out = scatter + (p * kPanel + i) * d + q * kPanel;
            for (int64_t j = 0; j < width; ++j) out[j] += acc[i * kPanel + j];
        }
    }

    const Rows& x_;
    const int first_, step_;
    const int64_t panels_;
    std::vector<T> packed_;
};

void mirror(double* scatter, int64_t d) {
    for (int64_t i = 1; i < d; ++i)
        for (int64_t j = 0; j < i; ++j) scatter[i * d + j] = scatter[j * d + i];
}

template <typename In, typename T>
void update(const Rows& x, const int64_t* group, const double* shift, double* total, const std::vector<double*>& scatter,
            int threads) {
    const auto groups = static_cast<int64_t>(scatter.size());
    // Counting sort of the row numbers by group: begin[g] .. begin[g + 1] in `order` are the rows of g.
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
    const int64_t tile_rows = (x.d + kPanel - 1) / kPanel;
    const int64_t useful = std::min<int64_t>(tile_rows, 1 + x.n * x.d * x.d / kSmall);
    const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
    std::vector<Worker<In, T>> team;  // all memory is allocated before the state is touched
    team.reserve(workers);
    for (int first = 0; first < workers; ++first) team.emplace_back(x, first, workers);
    const auto work = [&](Worker<In, T>& worker) {
        for (int64_t g = 0; g < groups; ++g)
            if (begin[g] < begin[g + 1])
                worker.run(group ? order.data() + begin[g] : nullptr, begin[g + 1] - begin[g], shift + g * x.d,
                           total + g * x.d, scatter[g]);
    };
    std::vector<std::thread> pool;
    pool.reserve(workers);
    for (int first = 1; first < workers; ++first) {
        try {
            pool.emplace_back(work, std::ref(team[first]));
        } catch (const std::system_error&) {  // no more threads to be had
            work(team[first]);
        }
    }
    work(team[0]);
    for (auto& thread : pool) thread.join();
    for (int64_t g = 0; g < groups; ++g)
        if (begin[g] < begin[g + 1]) mirror(scatter[g], x.d);
}

}  // namespace

void moments_update(const Rows& x, const int64_t* group, const double* shift, double* total,
                    const std::vector<double*>& scatter, int threads) {
    switch (x.dtype) {
        case DType::float64: return update<double, double>(x, group, shift, total, scatter, threads);
        case DType::float32: return update<float, float>(x, group, shift, total, scatter, threads);
        case DType::float16: return update<Float16, float>(x, group, shift, total, scatter, threads);
        case DType::bfloat16: return update<BFloat16, float>(x, group, shift, total, scatter, threads);
    }
}

}  // namespace loft_fast
