// Eigenvalues of a diagonal matrix plus one of rank one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "product.h"

namespace loft_fast {

// D + rho z z^T: d ascending and no two the same, no z zero, rho > 0. Its eigenvalues are the roots of
// 1 + rho sum z_i^2 / (d_i - x), one right of each d. Distances to d are what is needed of them, and kept: each root as
// a distance from the nearest d (Gu and Eisenstat 1995).
template <int Bytes>
class Secular {
    using V = Vector<double, Bytes>;
    static constexpr int64_t kLanes = Shape<double, Bytes>::lanes;

  public:
    Secular(std::vector<double> d, std::vector<double> z, double rho)
        : count_(static_cast<int64_t>(d.size())), inverse_(1 / rho), d_(std::move(d)), z_(std::move(z)) {
        span_ = 0;
        for (const double one : z_) span_ += rho * one * one;  // the last root is no further from the last d
        const auto whole = static_cast<size_t>((count_ + kLanes - 1) / kLanes * kLanes);
        d_.resize(whole, d_.empty() ? 0 : d_.back() + 2 * span_ + 1);  // beyond all roots, at no weight
        z_.resize(whole, 0);
        nearest_.resize(whole, d_.empty() ? 0 : d_.back());
        offset_.resize(whole, 0);
        weight_.resize(whole, 0);
    }

    int64_t count() const { return count_; }
    double root(int64_t j) const { return nearest_[at(j)] + offset_[at(j)]; }

    // The d nearest to root j, and how far beyond it the root lies.
    const double* nearest() const { return nearest_.data(); }
    const double* offset() const { return offset_.data(); }
    double d(int64_t i) const { return d_[at(i)]; }
    // z such that the roots that were found are exact: the eigenvectors, z_i / (d_i - x), are then orthogonal.
    double weight(int64_t i) const { return weight_[at(i)]; }

    LOFT_INLINE void find_root(int64_t j) {
        const bool last = j == count_ - 1;
        const double gap = last ? span_ : d_[at(j + 1)] - d_[at(j)];
        double shift = d_[at(j)], low = 0, high = gap, x = gap / 2;
        Value found = value(shift, x);
        if (found.sum < 0 && !last) {  // nearer to the next d
            shift = d_[at(j + 1)];
            low = x = -gap / 2;
            high = 0;
        } else {
            (found.sum < 0 ? low : high) = x;
        }
        // The sum as its two nearest poles and a constant, with its value and slope; the last one with one pole.
        for (int step = 0; step < kSteps; ++step) {
            const double here = d_[at(j)] - shift - x, there = last ? 0 : d_[at(j + 1)] - shift - x;
            double move;
            if (last) {
                const double constant = found.sum - found.slope * here;
                move = here + found.slope * here * here / constant;
            } else {
                const bool left = shift == d_[at(j)];
                const double z = left ? z_[at(j)] / here : z_[at(j + 1)] / there;
                const double constant = left ? found.sum - there * found.slope - z * z * (here - there)
                                             : found.sum - here * found.slope - z * z * (there - here);
                const double a = (here + there) * found.sum - here * there * found.slope;
                const double b = here * there * found.sum;
                const double root = std::sqrt(std::fabs(a * a - 4 * b * constant));
                move = a > 0 ? 2 * b / (a + root) : (a - root) / (2 * constant);
            }
            double next = x + move;
            if (!(next > low && next < high)) next = middle(low, high);
            const bool done = std::fabs(next - x) <= kClose * std::fabs(next);
            x = next;
            if (done || !(low < high)) break;
            found = value(shift, x);
            if (found.sum == 0) break;
            (found.sum > 0 ? high : low) = x;
        }
        nearest_[at(j)] = shift;
        offset_[at(j)] = x;
    }

    // Weights of i .. i + lanes - 1; all roots are known.
    static constexpr int64_t together = kLanes;
    LOFT_INLINE void find_weights(int64_t i) {
        const V own = *reinterpret_cast<const V*>(&d_[at(i)]);
        V product = V{} + 1.0;
        const int64_t end = std::min(i + kLanes, count_);
        for (int64_t j = 0; j < i; ++j) product *= ((nearest_[at(j)] - own) + offset_[at(j)]) / (d_[at(j)] - own);
        for (int64_t j = end; j < count_ - 1; ++j)
            product *= ((nearest_[at(j)] - own) + offset_[at(j)]) / (d_[at(j + 1)] - own);
        for (int64_t lane = 0; i + lane < end; ++lane) {
            const double from = d_[at(i + lane)];
            double whole = product[lane];
            for (int64_t j = i; j < end; ++j) {
                const double distance = (nearest_[at(j)] - from) + offset_[at(j)];
                const bool unpaired = j == count_ - 1;
                whole *= j < i + lane ? distance / (d_[at(j)] - from)
                                      : unpaired ? distance : distance / (d_[at(j + 1)] - from);
            }
            if (end < count_) whole *= (nearest_[at(count_ - 1)] - from) + offset_[at(count_ - 1)];
            weight_[at(i + lane)] = std::copysign(std::sqrt(std::fabs(whole)), z_[at(i + lane)]);
        }
    }

  private:
    static constexpr int kSteps = 100;      // halving alone gets there
    static constexpr double kClose = 1e-9;  // a step so small leaves an error of its square

    struct Value {
        double sum, slope;
    };

    // 1 / rho + sum z^2 / (d - x) and its slope, at shift + x.
    LOFT_INLINE Value value(double shift, double x) const {
        V sum{}, slope{};
        for (int64_t i = 0; i < static_cast<int64_t>(d_.size()); i += kLanes) {
            const V z = *reinterpret_cast<const V*>(&z_[at(i)]);
            const V part = z / (*reinterpret_cast<const V*>(&d_[at(i)]) - shift - x);
            sum += z * part;
            slope += part * part;
        }
        Value total{inverse_, 0};
        for (int64_t lane = 0; lane < kLanes; ++lane) total.sum += sum[lane], total.slope += slope[lane];
        return total;
    }

    // Between two numbers of one sign, or zero: by size where they are far apart, for the root may be close to zero.
    static double middle(double low, double high) {
        const double one = std::fabs(low), other = std::fabs(high);
        const double small = std::min(one, other), large = std::max(one, other);
        if (small > large / 8) return (low + high) / 2;
        const double size = small > 0 ? std::sqrt(small) * std::sqrt(large) : large / 64;
        return high > 0 ? size : -size;
    }

    static size_t at(int64_t i) { return static_cast<size_t>(i); }

    const int64_t count_;
    const double inverse_;
    double span_;
    std::vector<double> d_, z_, nearest_, offset_, weight_;
};

}  // namespace loft_fast
