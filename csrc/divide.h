// Eigenvectors of a tridiagonal matrix by divide and conquer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "panels.h"
#include "phases.h"
#include "secular.h"

namespace loft_fast {

// Eigenvalues and eigenvectors of a small tridiagonal matrix by QL steps with implicit shifts (LAPACK's steqr).
// d: the diagonal, then the eigenvalues; e: what is beside it, n numbers of which the last does not count, destroyed;
// rows: (n, n), an eigenvector each. False if it takes too long.
LOFT_INLINE bool small_tridiagonal(int64_t n, double* d, double* e, double* rows) {
    std::fill_n(rows, n * n, 0.0);
    for (int64_t i = 0; i < n; ++i) rows[i * n + i] = 1;
    for (int64_t l = 0; l < n; ++l) {
        for (int step = 0;; ++step) {
            int64_t m = l;
            while (m < n - 1 && std::fabs(e[m]) > 1e-16 * (std::fabs(d[m]) + std::fabs(d[m + 1]))) ++m;
            if (m == l) break;
            if (step == 60) return false;
            double g = (d[l + 1] - d[l]) / (2 * e[l]);
            g = d[m] - d[l] + e[l] / (g + std::copysign(std::sqrt(g * g + 1), g));
            double s = 1, c = 1, p = 0;
            int64_t i = m - 1;
            for (; i >= l; --i) {
                double f = s * e[i];
                const double b = c * e[i], r = std::sqrt(f * f + g * g);  // of numbers of float32: no square is too small
                e[i + 1] = r;
                if (r == 0) {
                    d[i + 1] -= p;
                    e[m] = 0;
                    break;
                }
                s = f / r;
                c = g / r;
                g = d[i + 1] - p;
                const double t = (d[i] - g) * s + 2 * c * b;
                p = s * t;
                d[i + 1] = g + p;
                g = c * t - b;
                double *low = rows + i * n, *high = low + n;
                for (int64_t k = 0; k < n; ++k) {
                    f = high[k];
                    high[k] = s * low[k] + c * f;
                    low[k] = c * low[k] - s * f;
                }
            }
            if (i >= l) continue;
            d[l] -= p;
            e[l] = g;
            e[m] = 0;
        }
    }
    return true;
}

// Halves are solved and put together (Cuppen 1981; Gu and Eisenstat 1995), from pieces of at most kLeaf on. The numbers
// that decide are float64, eigenvectors float32, a row each.
template <int Bytes>
class Divide {
    using Block = Panels<float, Bytes>;
    static constexpr int64_t kWidth = Block::width, kLeaf = 32;
    static constexpr double kNothing = 6e-8;  // of the largest number: what float32 rounds it by

  public:
    // d: the diagonal; e: what is beside it, n numbers of which the last does not count. rows, spare: (n, n) in rows of
    // `stride`, all zeros.
    Divide(std::vector<double> d, std::vector<double> e, float* rows, float* spare, int64_t stride, int threads)
        : d_(std::move(d)), e_(std::move(e)), rows_(rows), spare_(spare), stride_(stride), threads_(threads) {}

    // False if it does not converge.
    bool solve() {
        const auto n = static_cast<int64_t>(d_.size());
        int depth = 0;
        while (n >> depth > kLeaf) ++depth;
        std::vector<int64_t> bounds;
        for (int64_t i = 0; i <= int64_t{1} << depth; ++i) bounds.push_back((n * i) >> depth);
        for (size_t i = 1; i + 1 < bounds.size(); ++i) {
            const double beside = std::fabs(e_[at(bounds[i] - 1)]);
            d_[at(bounds[i] - 1)] -= beside;
            d_[at(bounds[i])] -= beside;
        }
        std::atomic<bool> fine{true};
        each<Bytes>(static_cast<int64_t>(bounds.size()) - 1, n > 512 ? threads_ : 1, [&](int64_t i) LOFT_LAMBDA {
            if (!leaf(bounds[at(i)], bounds[at(i + 1)])) fine = false;
        });
        for (; fine && bounds.size() > 2; std::swap(rows_, spare_)) {
            const auto pairs = static_cast<int64_t>(bounds.size() / 2);
            const bool alone = pairs >= threads_;  // a pair for each thread, or all threads for each pair
            const int inner = alone || bounds[2] < 256 ? 1 : threads_;
            each<Bytes>(pairs, alone ? threads_ : 1, [&](int64_t i) LOFT_LAMBDA {
                merge(bounds[at(2 * i)], bounds[at(2 * i + 1)], bounds[at(2 * i + 2)], inner);
            });
            for (size_t i = 0; i < bounds.size(); i += 2) bounds[i / 2] = bounds[i];
            bounds.resize(bounds.size() / 2 + 1);
        }
        return fine;
    }

    // Eigenvalues, in no order, and the eigenvector of each.
    const std::vector<double>& values() const { return d_; }
    const float* row(int64_t i) const { return rows_ + i * stride_; }

  private:
    LOFT_INLINE bool leaf(int64_t low, int64_t high) {
        const int64_t n = high - low;
        std::vector<double> e(e_.begin() + low, e_.begin() + high), rows(at(n * n));
        if (!small_tridiagonal(n, &d_[at(low)], e.data(), rows.data())) return false;
        for (int64_t i = 0; i < n; ++i) {
            float* to = rows_ + (low + i) * stride_ + low;
            for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(rows[at(i * n + j)]);
        }
        return true;
    }

    // What of the eigenvectors of the halves makes those of the whole. The order of `joined` is that of the d, of
    // `rows` that of the halves: of the upper one, of both (after a rotation), of the lower one.
    struct Plan {
        std::vector<int64_t> joined, rows, alone;
        int64_t upper = 0, both = 0, lower = 0;
    };

    void merge(int64_t low, int64_t middle, int64_t high, int threads) {
        const int64_t n = high - low;
        const double beside = e_[at(middle - 1)];
        std::vector<double> z(at(n));
        for (int64_t i = 0; i < n; ++i)
            z[at(i)] = i < middle - low ? rows_[(low + i) * stride_ + middle - 1]
                                        : std::copysign(1.0, beside) * rows_[(low + i) * stride_ + middle];
        const Plan plan = deflate(low, middle, high, 2 * std::fabs(beside), z);
        std::vector<double> d, weights;
        for (const int64_t i : plan.joined) d.push_back(d_[at(low + i)]), weights.push_back(z[at(i)]);
        Secular<Bytes> secular(std::move(d), std::move(weights), 2 * std::fabs(beside));
        join(low, middle, high, plan, secular, threads);
        std::vector<double> values;
        for (int64_t j = 0; j < secular.count(); ++j) values.push_back(secular.root(j));
        for (const int64_t i : plan.alone) {
            float* to = spare_ + (low + static_cast<int64_t>(values.size())) * stride_ + low;
            std::copy_n(rows_ + (low + i) * stride_ + low, n, to);
            values.push_back(d_[at(low + i)]);
        }
        std::copy(values.begin(), values.end(), d_.begin() + low);
    }

    // Which eigenvectors of the halves are eigenvectors of the whole, to float32: z, normalised here, has nothing of
    // them, or a rotation with another one of (nearly) the same eigenvalue gives it all to that one.
    Plan deflate(int64_t low, int64_t middle, int64_t high, double rho, std::vector<double>& z) {
        const int64_t n = high - low;
        double largest = 0;
        for (double& one : z) {
            one /= std::sqrt(2.0);
            largest = std::max(largest, std::fabs(one));
        }
        double* d = &d_[at(low)];
        for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(d[i]));
        const double small = kNothing * largest;
        std::vector<int64_t> order(at(n));
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return d[i] < d[j]; });
        std::vector<int8_t> of(at(n));  // 0: of the upper half, 1: of both, 2: of the lower half
        for (int64_t i = 0; i < n; ++i) of[at(i)] = i < middle - low ? 0 : 2;
        Plan plan;
        int64_t before = -1;
        for (const int64_t i : order) {
            if (rho * std::fabs(z[at(i)]) <= small) {
                plan.alone.push_back(i);
                continue;
            }
            if (before >= 0) {
                const double length = std::sqrt(z[at(i)] * z[at(i)] + z[at(before)] * z[at(before)]);
                const double c = z[at(i)] / length, s = -z[at(before)] / length;
                if (std::fabs((d[i] - d[before]) * c * s) <= small) {
                    rotate(low + before, low + i, low, high, static_cast<float>(c), static_cast<float>(s));
                    const double one = d[before] * c * c + d[i] * s * s, other = d[before] * s * s + d[i] * c * c;
                    d[before] = one;
                    d[i] = other;
                    z[at(i)] = length;
                    z[at(before)] = 0;
                    if (of[at(i)] != of[at(before)]) of[at(i)] = of[at(before)] = 1;
                    plan.alone.push_back(before);
                } else {
                    plan.joined.push_back(before);
                }
            }
            before = i;
        }
        if (before >= 0) plan.joined.push_back(before);
        for (int8_t half = 0; half < 3; ++half)
            for (int64_t j = 0; j < static_cast<int64_t>(plan.joined.size()); ++j)
                if (of[at(plan.joined[at(j)])] == half) {
                    plan.rows.push_back(j);
                    ++(half == 0 ? plan.upper : half == 1 ? plan.both : plan.lower);
                }
        return plan;
    }

    void rotate(int64_t i, int64_t j, int64_t low, int64_t high, float c, float s) {
        float *x = rows_ + i * stride_, *y = rows_ + j * stride_;
        for (int64_t k = low; k < high; ++k) {
            const float old = x[k];
            x[k] = c * old + s * y[k];
            y[k] = c * y[k] - s * old;
        }
    }

    // The joined eigenvectors, into `spare`: each a combination of the old ones.
    void join(int64_t low, int64_t middle, int64_t high, const Plan& plan, Secular<Bytes>& secular, int threads) {
        const int64_t count = secular.count();
        constexpr int64_t kChunk = 16;
        each<Bytes>((count + kChunk - 1) / kChunk, threads, [&](int64_t i) LOFT_LAMBDA {
            for (int64_t j = i * kChunk; j < std::min(count, (i + 1) * kChunk); ++j) secular.find_root(j);
        });
        constexpr int64_t kTogether = Secular<Bytes>::together;
        each<Bytes>((count + kTogether - 1) / kTogether, threads,
                    [&](int64_t i) LOFT_LAMBDA { secular.find_weights(i * kTogether); });
        const int64_t left = Block::count_of(middle - low), right = Block::count_of(high - middle);
        const Block upper(left, plan.upper + plan.both), lower(right, plan.both + plan.lower);
        each<Bytes>(left + right, threads, [&](int64_t i) LOFT_LAMBDA {
            if (i < left)
                pack(upper, i, plan.upper + plan.both, 0, low, middle, low, plan);
            else
                pack(lower, i - left, plan.both + plan.lower, plan.upper, middle, high, low, plan);
        });
        each<Bytes>(Block::count_of(count), threads, [&](int64_t i) LOFT_LAMBDA {
            const int64_t wide = std::min<int64_t>(kWidth, count - i * kWidth);
            const Block weights(1, count);
            alignas(64) float inverse[kWidth];
            find_vectors(i * kWidth, wide, plan, secular, weights, inverse);
            float* to = spare_ + (low + i * kWidth) * stride_;
            combine(weights, 0, plan.upper + plan.both, upper, wide, inverse, to + low, middle - low);
            combine(weights, plan.upper, plan.both + plan.lower, lower, wide, inverse, to + middle, high - middle);
        });
    }

    // Columns first .. end of `count` old eigenvectors, those that are not zero there.
    LOFT_INLINE void pack(const Block& to, int64_t panel, int64_t count, int64_t skipped, int64_t first, int64_t end,
                          int64_t low, const Plan& plan) const {
        const int64_t left = first + panel * kWidth, wide = std::min<int64_t>(kWidth, end - left);
        for (int64_t p = 0; p < count; ++p) {
            const int64_t row = low + plan.joined[at(plan.rows[at(skipped + p)])];
            std::copy_n(rows_ + row * stride_ + left, wide, to.at(panel, p));
            std::fill(to.at(panel, p) + wide, to.at(panel, p + 1), 0.0f);
        }
    }

    // What of each old eigenvector makes up the new ones from `first` on, and by what their length is to be divided.
    LOFT_INLINE void find_vectors(int64_t first, int64_t wide, const Plan& plan, const Secular<Bytes>& secular,
                                  const Block& weights, float* inverse) const {
        alignas(64) double nearest[kWidth], offset[kWidth], squares[kWidth];
        for (int64_t j = 0; j < kWidth; ++j) {
            nearest[j] = j < wide ? secular.nearest()[first + j] : 0;
            offset[j] = j < wide ? secular.offset()[first + j] : HUGE_VAL;
            squares[j] = 0;
        }
        for (int64_t p = 0; p < secular.count(); ++p) {
            const double d = secular.d(plan.rows[at(p)]), weight = secular.weight(plan.rows[at(p)]);
            float* to = weights.at(0, p);
            for (int64_t j = 0; j < kWidth; ++j) {
                const double part = weight / ((d - nearest[j]) - offset[j]);
                squares[j] += part * part;
                to[j] = static_cast<float>(part);
            }
        }
        for (int64_t j = 0; j < kWidth; ++j) inverse[j] = static_cast<float>(1 / std::sqrt(squares[j]));
    }

    LOFT_INLINE void combine(const Block& weights, int64_t skipped, int64_t count, const Block& old, int64_t tall,
                             const float* inverse, float* out, int64_t columns) const {
        const Aligned<float> slivers(kWidth * std::max<int64_t>(count, 1));
        alignas(64) float acc[kWidth * kWidth];
        weights.cut(0, skipped, count, slivers.get());
        for (int64_t panel = 0, left = 0; left < columns; ++panel, left += kWidth) {
            old.multiply_by(slivers.get(), panel, 0, count, acc);
            const int64_t wide = std::min<int64_t>(kWidth, columns - left);
            for (int64_t i = 0; i < tall; ++i)
                for (int64_t c = 0; c < wide; ++c) out[i * stride_ + left + c] = acc[i * kWidth + c] * inverse[i];
        }
    }

    static size_t at(int64_t i) { return static_cast<size_t>(i); }

    std::vector<double> d_, e_;
    float *rows_, *spare_;
    const int64_t stride_;
    const int threads_;
};

}  // namespace loft_fast
