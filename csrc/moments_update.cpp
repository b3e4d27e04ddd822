#include "moments_update.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>

#include "half.h"

namespace loft_fast {
namespace {

#if defined(__GNUC__)
#define LOFT_INLINE inline __attribute__((always_inline))
#define LOFT_PREFETCH(address) __builtin_prefetch(address, 1)
#else
#define LOFT_INLINE inline
#define LOFT_PREFETCH(address)
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define LOFT_X86 1
#endif

constexpr int64_t kChain = 256;      // rows added up in one register: a panel of them fits the first cache
constexpr int64_t kBlock = 512;      // rows packed, and merged into the float64 state, at a time
constexpr int64_t kSmall = 1 << 21;  // multiply-adds below which a thread costs more than it brings

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

// Memory for vectors: a load of a whole one never straddles two cache lines.
template <typename T>
class Aligned {
  public:
    explicit Aligned(int64_t size)
        : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t(64)))) {}
    T* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(T* data) const { ::operator delete(data, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> data_;
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

struct Job {
    const Rows& x;
    const int64_t *begin, *order;  // group g has the rows begin[g] .. begin[g + 1] of `order`; null: as they come
    const int64_t* count;
    const double* mean;
    const std::vector<double*>& scatter;
    int workers;
    // Where there are many groups of like size, a worker takes the next one and does it alone. Null: every worker does
    // its share of every group.
    std::atomic<int64_t>* next;
};

template <typename In>
LOFT_INLINE auto value_of(In value) {
    if constexpr (std::is_same_v<In, Float16> || std::is_same_v<In, BFloat16>)
        return static_cast<float>(value);
    else
        return value;
}

// One worker's share: all rows, but only some of the tile rows of the upper triangle. Every worker reads and packs the
// rows for itself: that is n d work beside n d^2, and saves all waiting for each other.
template <typename In, typename T, int Bytes>
class Worker {
    static constexpr int kWidth = Shape<T, Bytes>::width, kHeight = Shape<T, Bytes>::height;

  public:
    Worker(const Job& job, int first)
        : job_(job),
          first_(first),
          d_(job.x.d),
          panels_((d_ + kWidth - 1) / kWidth),
          block_(std::min(kBlock, job.x.n)),
          packed_(panels_ * kWidth * block_),
          slivers_(kWidth * block_),
          center_(d_),
          rows_(block_),
          origin_(d_),
          mean_(d_),
          sum_(d_),
          within_(d_),
          between_(d_) {}

    // Merge everything into the scatters; the counts and means that come of it go to `counts` and `means`.
    LOFT_INLINE void run(int64_t* counts, double* means) {
        const auto groups = static_cast<int64_t>(job_.scatter.size());
        const auto following = [&](int64_t g) { return job_.next ? job_.next->fetch_add(1) : g + 1; };
        for (int64_t g = following(-1); g < groups; g = following(g)) {
            const int64_t end = job_.begin[g + 1];
            if (job_.begin[g] == end) continue;
            count_ = job_.count[g];
            locate(job_.begin[g], 1);
            for (int64_t j = 0; j < d_; ++j) {
                origin_[j] = value_of(rows_[0][j * job_.x.col_stride]);
                mean_[j] = count_ ? job_.mean[g * d_ + j] - origin_[j] : 0.0;
            }
            for (int64_t start = job_.begin[g]; start < end; start += kBlock) {
                locate(start, std::min(kBlock, end - start));
                center();
                pack();
                for (int64_t p = 0; p < panels_; ++p) {
                    if (!mine(p)) continue;
                    cut(p);
                    for (int64_t q = p; q < panels_; ++q) add_tile(p, q, job_.scatter[g], start + kBlock >= end);
                }
            }
            if (first_ == 0 || job_.next) {
                counts[g] = count_;
                for (int64_t j = 0; j < d_; ++j) means[g * d_ + j] = origin_[j] + mean_[j];
            }
        }
    }

  private:
    // Dealt to and fro: a tile row is shorter than the one above it, and everyone is to have as much.
    bool mine(int64_t p) const {
        if (job_.next) return true;
        const int64_t turn = p % (2 * job_.workers);
        return first_ == std::min(turn, 2 * job_.workers - 1 - turn);
    }

    LOFT_INLINE void locate(int64_t start, int64_t n) {
        n_ = n;
        for (int64_t r = 0; r < n; ++r)
            rows_[r] = static_cast<const In*>(job_.x.data) +
                       job_.x.row_stride * (job_.order ? job_.order[start + r] : start + r);
    }

    // The block's mean, which rounded as T is the reference of its products: whatever the mean, they keep their digits.
    // The scatter about the state's mean is that about the reference less `within` plus `between`, each a vector times
    // itself (Chan, Golub and LeVeque). Means are offsets from the first row until the end, for the same reason.
    LOFT_INLINE void center() {
        const int64_t step = job_.x.col_stride;
        double* sum = sum_.data();
        std::fill_n(sum, d_, 0.0);
        for (int64_t r = 0; r < n_; ++r) {
            const In* row = rows_[r];
            if (step == 1) {
                for (int64_t j = 0; j < d_; ++j) sum[j] += value_of(row[j]) - origin_[j];
            } else {
                for (int64_t j = 0; j < d_; ++j) sum[j] += value_of(row[j * step]) - origin_[j];
            }
        }
        const auto n = static_cast<double>(n_), before = static_cast<double>(count_), total = before + n;
        for (int64_t j = 0; j < d_; ++j) {
            const double mean = sum[j] / n;
            center_[j] = static_cast<T>(origin_[j] + mean);
            const double delta = count_ ? mean - mean_[j] : 0.0;
            within_[j] = (mean - (center_[j] - origin_[j])) * std::sqrt(n);
            between_[j] = delta * std::sqrt(before * n / total);
            mean_[j] = count_ ? mean_[j] + delta * (n / total) : mean;
        }
        count_ += n_;
    }

    LOFT_INLINE T* panel(int64_t p) { return packed_.get() + p * kWidth * block_; }

    LOFT_INLINE void pack() {
        const int64_t step = job_.x.col_stride;
        for (int64_t r = 0; r < n_; ++r)
            for (int64_t p = 0; p < panels_; ++p) {
                const int64_t left = p * kWidth, width = std::min<int64_t>(kWidth, d_ - left);
                const In* row = rows_[r] + left * step;
                const T* center = center_.data() + left;
                T* out = panel(p) + r * kWidth;
                if (step == 1 && width == kWidth) {
                    for (int j = 0; j < kWidth; ++j) out[j] = static_cast<T>(value_of(row[j])) - center[j];
                } else {
                    for (int64_t j = 0; j < width; ++j) out[j] = static_cast<T>(value_of(row[j * step])) - center[j];
                    std::fill_n(out + width, kWidth - width, T(0));
                }
            }
    }

    LOFT_INLINE void cut(int64_t p) {
        const T* from = panel(p);
        T* to = slivers_.get();
        for (int s = 0; s < kWidth; s += kHeight)
            for (int64_t r = 0; r < n_; ++r)
                for (int i = 0; i < kHeight; ++i) *to++ = from[r * kWidth + s + i];
    }

    LOFT_INLINE void add_tile(int64_t p, int64_t q, double* scatter, bool last) {
        const int64_t top = p * kWidth, left = q * kWidth;
        const int64_t height = std::min<int64_t>(kWidth, d_ - top), width = std::min<int64_t>(kWidth, d_ - left);
        double* corner = scatter + top * d_ + left;
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; j += 8) LOFT_PREFETCH(corner + i * d_ + j);
        alignas(64) T acc[kWidth * kWidth];
        multiply<T, Bytes>(slivers_.get(), panel(q), n_, acc);
        for (int64_t i = 0; i < height; ++i)
            for (int64_t j = 0; j < width; ++j)
                corner[i * d_ + j] += acc[i * kWidth + j] - within_[top + i] * within_[left + j] +
                                      between_[top + i] * between_[left + j];
        if (!last) return;
        double* mirror = scatter + left * d_ + top;  // on the diagonal its own upper half: that goes to the lower one
        for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < (p == q ? j : height); ++i) mirror[j * d_ + i] = corner[i * d_ + j];
    }

    const Job& job_;
    const int first_;
    const int64_t d_, panels_, block_;
    Aligned<T> packed_, slivers_;
    std::vector<T> center_;
    std::vector<const In*> rows_;
    std::vector<double> origin_, mean_, sum_, within_, between_;
    int64_t n_ = 0, count_ = 0;
};

template <typename In, typename T, int Bytes>
using Run = void (*)(Worker<In, T, Bytes>&, int64_t*, double*);

// Everything in a worker is inlined into one of these, and so compiled for its instructions.
template <typename In, typename T, int Bytes>
void run_portable(Worker<In, T, Bytes>& worker, int64_t* counts, double* means) {
    worker.run(counts, means);
}
#if LOFT_X86
template <typename In, typename T, int Bytes>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(Worker<In, T, Bytes>& worker, int64_t* counts, double* means) {
    worker.run(counts, means);
}
template <typename In, typename T, int Bytes>
__attribute__((target("avx512f,avx512vl,prefer-vector-width=512"))) void run_avx512(Worker<In, T, Bytes>& worker,
                                                                                   int64_t* counts, double* means) {
    worker.run(counts, means);
}
#endif

template <typename In, typename T, int Bytes>
void merge(const Rows& x, const int64_t* group, int64_t* count, double* mean, const std::vector<double*>& scatter,
           int threads, Run<In, T, Bytes> run) {
    const auto groups = static_cast<int64_t>(scatter.size());
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
    int64_t largest = 0;
    for (int64_t g = 0; g < groups; ++g) largest = std::max(largest, begin[g + 1] - begin[g]);
    const int64_t tile_rows = (x.d + Shape<T, Bytes>::width - 1) / Shape<T, Bytes>::width;
    const int64_t affordable = std::min<int64_t>(threads, 1 + x.n * x.d * x.d / kSmall);
    const bool by_group = largest * affordable * 2 <= x.n;
    const int workers =
        static_cast<int>(std::max<int64_t>(1, by_group ? affordable : std::min(affordable, tile_rows)));
    std::atomic<int64_t> next{0};
    const Job job{x, begin.data(), group ? order.data() : nullptr, count, mean, scatter, workers,
                  by_group ? &next : nullptr};
    // All memory is allocated before the state is touched. Counts and means are written when no worker reads them.
    std::vector<int64_t> counts(count, count + groups);
    std::vector<double> means(mean, mean + groups * x.d);
    std::vector<Worker<In, T, Bytes>> team;
    team.reserve(workers);
    for (int first = 0; first < workers; ++first) team.emplace_back(job, first);
    const auto work = [&](int first) { run(team[first], counts.data(), means.data()); };
    std::vector<std::thread> pool;
    pool.reserve(workers);
    for (int first = 1; first < workers; ++first) {
        try {
            pool.emplace_back(work, first);
        } catch (const std::system_error&) {  // no more threads to be had
            work(first);
        }
    }
    work(0);
    for (auto& thread : pool) thread.join();
    std::copy(counts.begin(), counts.end(), count);
    std::copy(means.begin(), means.end(), mean);
}

template <typename In, typename T>
void dispatch(const Rows& x, const int64_t* group, int64_t* count, double* mean, const std::vector<double*>& scatter,
              int threads) {
#if LOFT_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
        return merge<In, T, 64>(x, group, count, mean, scatter, threads, run_avx512<In, T, 64>);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return merge<In, T, 32>(x, group, count, mean, scatter, threads, run_avx2<In, T, 32>);
#endif
    merge<In, T, 16>(x, group, count, mean, scatter, threads, run_portable<In, T, 16>);
}

}  // namespace

void moments_update(const Rows& x, const int64_t* group, int64_t* count, double* mean,
                    const std::vector<double*>& scatter, int threads) {
    switch (x.dtype) {
        case DType::float64: return dispatch<double, double>(x, group, count, mean, scatter, threads);
        case DType::float32: return dispatch<float, float>(x, group, count, mean, scatter, threads);
        case DType::float16: return dispatch<Float16, float>(x, group, count, mean, scatter, threads);
        case DType::bfloat16: return dispatch<BFloat16, float>(x, group, count, mean, scatter, threads);
    }
}

}  // namespace loft_fast
