#include "eigh.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <numeric>
#include <utility>
#include <vector>

#include "divide.h"
#include "tridiagonal.h"

namespace loft_fast {
#if defined(__GNUC__)  // vectors by the lane are its extension
namespace {

template <int Bytes>
class Eigenproblem {
    using Block = Panels<float, Bytes>;
    using Kernel = Numbers<float, Bytes>;
    static constexpr int64_t kWidth = Block::width, kHeight = Block::height;

  public:
    Eigenproblem(int64_t n, int threads)
        : n_(n),
          stride_(padded<Bytes>(n)),
          threads_(threads),
          matrix_(stride_ * stride_),
          reflectors_(stride_ * stride_),
          spare_(stride_ * stride_) {}

    bool solve(const float* matrix, float* values, float* vectors) {
        const int power = load(matrix);
        if (power == kNothing) return false;
        std::vector<double> diagonal(size(n_)), beside(size(n_)), tau(size(n_));
        reduce(diagonal.data(), beside.data(), tau.data());
        std::fill_n(matrix_.get(), stride_ * stride_, 0.0f);
        std::fill_n(spare_.get(), stride_ * stride_, 0.0f);
        Divide<Bytes> halves(std::move(diagonal), std::move(beside), matrix_.get(), spare_.get(), stride_, threads_);
        if (!halves.solve()) return false;
        std::vector<int64_t> order(size(n_));
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(),
                  [&](int64_t i, int64_t j) { return halves.values()[size(i)] < halves.values()[size(j)]; });
        for (int64_t i = 0; i < n_; ++i)
            values[i] = static_cast<float>(std::ldexp(halves.values()[size(order[size(i)])], power));
        turn_back(halves, order, tau, vectors);
        return true;
    }

  private:
    static constexpr int kNothing = -100000;

    // The matrix over a power of two, so that no square is too large or too small; which power.
    int load(const float* matrix) {
        float largest = 0;
        bool finite = true;
        for (int64_t i = 0; i < n_ * n_; ++i) {
            largest = std::max(largest, std::fabs(matrix[i]));
            finite = finite && std::isfinite(matrix[i]);
        }
        if (!finite) return kNothing;
        int power = 0;
        std::frexp(largest, &power);
        power = std::max(power, -126);  // the largest one may be subnormal
        const float scale = std::ldexp(1.0f, -power);
        for (int64_t i = 0; i < stride_; ++i) {
            float* to = matrix_.get() + i * stride_;
            if (i < n_)
                for (int64_t j = 0; j < n_; ++j) to[j] = matrix[i * n_ + j] * scale;
            std::fill(to + (i < n_ ? n_ : 0), to + stride_, 0.0f);
        }
        std::fill_n(reflectors_.get(), stride_ * stride_, 0.0f);
        return power;
    }

    void reduce(double* diagonal, double* beside, double* tau) {
        const int64_t affordable = std::min(1 + n_ * n_ * n_ / 8 / kWorthAThread, 1 + n_ / 64);
        const int members = static_cast<int>(std::min<int64_t>(threads_, affordable));
        Tridiagonal<Bytes> team(matrix_.get(), n_, reflectors_.get(), diagonal, beside, tau, members);
        std::deque<typename Tridiagonal<Bytes>::Scratch> scratch;
        for (int k = 0; k < members; ++k) scratch.emplace_back(team);
        std::atomic<int> arrived{0};
        in_parallel(members, [&] { work<Bytes>(team, scratch[size(arrived.fetch_add(1))]); });
    }

    // Eigenvectors of the tridiagonal matrix, times all reflections: kWidth reflections at a time, I - V T V^T, on kWidth
    // eigenvectors, which stay in the cache.
    void turn_back(const Divide<Bytes>& halves, const std::vector<int64_t>& order, const std::vector<double>& tau,
                   float* vectors) {
        const int64_t blocks = n_ > 2 ? Block::count_of(n_ - 2) : 0, panels = Block::count_of(n_);
        std::deque<Aligned<float>> left, right;  // slivers of the columns of V, and of the rows of V T, negative
        for (int64_t b = 0; b < blocks; ++b) {
            left.emplace_back(rows_of(b) * kWidth);
            right.emplace_back(rows_of(b) * kWidth);
        }
        each<Bytes>(blocks, threads_,
                    [&](int64_t b) LOFT_LAMBDA { prepare(b, tau, left[size(b)].get(), right[size(b)].get()); });
        each<Bytes>(panels, threads_, [&](int64_t p) LOFT_LAMBDA {
            const Aligned<float> panel(kWidth * panels * kWidth);
            const int64_t first = p * kWidth, wide = std::min(kWidth, n_ - first);
            std::fill_n(panel.get(), kWidth * panels * kWidth, 0.0f);
            constexpr int64_t kTall = 64;  // rows that fit the first cache, a number of each vector at a time
            for (int64_t top = 0; top < n_; top += kTall)
                for (int64_t j = 0; j < wide; ++j) {
                    const float* from = halves.row(order[size(first + j)]);
                    for (int64_t r = top; r < std::min(n_, top + kTall); ++r) panel.get()[r * kWidth + j] = from[r];
                }
            alignas(64) float acc[kWidth * kWidth];
            for (int64_t b = blocks - 1; b >= 0; --b) {
                float* top = panel.get() + b * kWidth * kWidth;
                multiply<Kernel>(left[size(b)].get(), top, rows_of(b), {kWidth, kWidth, false}, acc);
                for (int64_t r = 0; r < rows_of(b); r += kHeight)
                    Kernel::template strip<3>(right[size(b)].get() + r * kWidth, acc, kWidth, true, top + r * kWidth);
            }
            for (int64_t r = 0; r < n_; ++r) std::copy_n(panel.get() + r * kWidth, wide, vectors + r * n_ + first);
        });
    }

    // Rows that reflectors of block b have numbers in: from b * kWidth on.
    int64_t rows_of(int64_t b) const { return (Block::count_of(n_) - b) * kWidth; }

    LOFT_INLINE void prepare(int64_t b, const std::vector<double>& tau, float* left, float* right) const {
        const int64_t rows = rows_of(b), first = b * kWidth, count = std::min(kWidth, n_ - 2 - first);
        const Block v(1, rows);
        for (int64_t k = 0; k < kWidth; ++k)
            for (int64_t r = 0; r < rows; ++r)
                v.at(0, r)[k] = k < count && first + r < n_ ? reflectors_.get()[(first + k) * stride_ + first + r] : 0.0f;
        v.cut(0, 0, rows, left);
        alignas(64) float products[kWidth * kWidth], factor[kWidth * kWidth];
        v.multiply_by(left, 0, 0, rows, products);
        // T: the inverse of the upper triangle of V^T V with 1 / tau on the diagonal (Joffrain et al. 2006).
        std::fill_n(factor, kWidth * kWidth, 0.0f);
        for (int64_t j = 0; j < count; ++j) {
            const double own = tau[size(first + j)];
            factor[j * kWidth + j] = static_cast<float>(own);
            for (int64_t i = j - 1; i >= 0; --i) {
                double sum = 0;
                for (int64_t k = i; k < j; ++k) sum += factor[i * kWidth + k] * double{products[k * kWidth + j]};
                factor[i * kWidth + j] = static_cast<float>(-sum * own);
            }
        }
        const Aligned<float> sliver(kWidth * kHeight);
        alignas(64) float out[kHeight * kWidth];
        for (int64_t r = 0; r < rows; r += kHeight, right += kHeight * kWidth) {
            for (int64_t k = 0; k < kWidth; ++k)
                for (int64_t i = 0; i < kHeight; ++i) sliver.get()[k * kHeight + i] = v.at(0, r + i)[k];
            Kernel::template strip<3>(sliver.get(), factor, kWidth, false, out);
            for (int64_t k = 0; k < kWidth; ++k)
                for (int64_t i = 0; i < kHeight; ++i) right[k * kHeight + i] = -out[i * kWidth + k];
        }
    }

    static size_t size(int64_t i) { return static_cast<size_t>(i); }

    const int64_t n_, stride_;
    const int threads_;
    Aligned<float> matrix_, reflectors_, spare_;
};

template <int Bytes>
bool run(const float* matrix, int64_t many, int64_t d, float* values, float* vectors, int threads) {
    std::atomic<bool> fine{true};
    const bool alone = many >= threads;  // a problem for each thread, or all threads for each problem
    std::atomic<int64_t> next{0};
    in_parallel(alone ? threads : 1, [&] {
        Eigenproblem<Bytes> problem(d, alone ? 1 : threads);
        for (int64_t i; (i = next.fetch_add(1)) < many;)
            if (!problem.solve(matrix + i * d * d, values + i * d, vectors + i * d * d)) fine = false;
    });
    return fine;
}

}  // namespace

bool eigh(const float* matrix, int64_t many, int64_t d, float* values, float* vectors, int threads) {
    if (d == 0) return true;
    switch (vector_bytes()) {
        case 64: return run<64>(matrix, many, d, values, vectors, threads);
        case 32: return run<32>(matrix, many, d, values, vectors, threads);
        default: return run<16>(matrix, many, d, values, vectors, threads);
    }
}
#else
bool eigh(const float*, int64_t, int64_t, float*, float*, int) { return false; }
#endif

}  // namespace loft_fast
