// A symmetric matrix brought to tridiagonal form by reflections.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "panels.h"
#include "phases.h"

namespace loft_fast {

// Columns and rows that a matrix of n takes here: whole tiles, and rows that do not lie a power of two apart.
template <int Bytes>
constexpr int64_t padded(int64_t n) {
    constexpr int64_t kWidth = Panels<float, Bytes>::width;
    const int64_t whole = (n + kWidth - 1) / kWidth * kWidth;
    return whole % 512 == 0 ? whole + kWidth : whole;
}

// A = Q T Q^T with Q = H_0 H_1 ..., H_i = I - tau_i v_i v_i^T. Half of the work are products of the matrix with a vector,
// half products of `kPanel` reflectors at a time (Dongarra, Sorensen, Hammarling 1989, as LAPACK's sytrd). Of the matrix
// only the upper half is read and kept up to date, in whole squares of a vector's width on the diagonal.
template <int Bytes>
class Tridiagonal {
    using V = Vector<float, Bytes>;
    using Block = Panels<float, Bytes>;
    static constexpr int kLanes = Shape<float, Bytes>::lanes, kWidth = Block::width;
    static constexpr int64_t kPanel = 32;

  public:
    struct Scratch {
        explicit Scratch(Tridiagonal& team) : me(team.arrived_.fetch_add(1)) {}
        const int me;
    };

    // a: (n, n), no number larger than one, in rows of padded(n), with zeros beyond, rows of them, too; destroyed.
    // reflectors: as large, zeros; v_i comes into row i. diagonal, beside, tau: n numbers each.
    Tridiagonal(float* a, int64_t n, float* reflectors, double* diagonal, double* beside, double* tau, int members)
        : a_(a),
          n_(n),
          stride_(padded<Bytes>(n)),
          reflectors_(reflectors),
          diagonal_(diagonal),
          beside_(beside),
          tau_(tau),
          phases_(members),
          blocks_(Block::count_of(n)),
          panels_(2 * blocks_, 2 * kPanel),
          other_(kPanel * stride_),
          image_(members * stride_),
          vector_(members * stride_),
          slivers_(members * kWidth * 2 * kPanel),
          first_(static_cast<size_t>(n)),
          norms_(static_cast<size_t>(n * members)),
          dots_(static_cast<size_t>(members * kDots)) {
        std::fill_n(other_.get(), kPanel * stride_, 0.0f);
        std::fill_n(image_.get(), members * stride_, 0.0f);
        std::fill_n(vector_.get(), members * stride_, 0.0f);
    }

    // Every member calls it.
    LOFT_INLINE void work(Scratch& own) {
        int64_t phase = 0;
        for (int64_t start = 0; start < n_; start += kPanel) {
            const int64_t end = std::min(n_, start + kPanel);
            for (int64_t i = start; i < end; ++i) {
                phases_.run(++phase, own.me, [&](int t) LOFT_LAMBDA { column(start, i, t); });
                if (i < n_ - 1) phases_.run(++phase, own.me, [&](int t) LOFT_LAMBDA { image(start, i, t); });
            }
            if (end < n_) {
                phases_.run(++phase, own.me, [&](int t) LOFT_LAMBDA { close(start, end - 1, t); });
                phases_.run(++phase, own.me, [&](int t) LOFT_LAMBDA { pack(start, end, t); });
                phases_.run(++phase, own.me, [&](int t) LOFT_LAMBDA { update(end, t); });
            }
        }
        phases_.run(++phase, own.me, [&](int t) LOFT_LAMBDA {
            if (t == 0)
                for (int64_t i = 0; i < n_ - 1; ++i) v(i)[i + 1] = static_cast<float>(reflection(i).top);
        });
    }

  private:
    static constexpr double kNothing = 1e-24;  // squares of numbers that rounding the largest one outweighs by far
    static constexpr int64_t kDots = 2 * kPanel + 8;  // of a member: v with every v and w of the panel; and v^T A v

    // What column i's reflection is made of: v is the column but for its first number, `top`.
    struct Reflection {
        double beside, top, tau;
    };

    LOFT_INLINE Reflection reflection(int64_t i) const {
        double rest = 0;
        for (int t = 0; t < phases_.members(); ++t) rest += norms_[static_cast<size_t>(i * phases_.members() + t)];
        const double x = first_[static_cast<size_t>(i)];
        if (rest < kNothing) return {x, 0, 0};
        const double length = std::sqrt(x * x + rest), beside = x > 0 ? -length : length;
        return {beside, x - beside, 2 / ((x - beside) * (x - beside) + rest)};
    }

    // Vectors first .. last of the rows after `i` that are member t's.
    struct Span {
        int64_t first, last;
    };
    LOFT_INLINE Span span(int64_t i, int t) const {
        const int64_t begin = (i + 1) / kLanes, count = stride_ / kLanes - begin, members = phases_.members();
        return {begin + count * t / members, begin + count * (t + 1) / members};
    }

    LOFT_INLINE static const V& load(const float* from, int64_t vector) {
        return *reinterpret_cast<const V*>(from + vector * kLanes);
    }
    LOFT_INLINE static void store(float* to, int64_t vector, const V& value) {
        *reinterpret_cast<V*>(to + vector * kLanes) = value;
    }
    LOFT_INLINE static float sum(const V& value) {
        float total = 0;
        for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
        return total;
    }
    LOFT_INLINE float* v(int64_t i) const { return reflectors_ + i * stride_; }
    LOFT_INLINE float* w(int64_t start, int64_t i) const { return other_.get() + (i - start) * stride_; }

    // What turns A v_i into w_i: w = tau (A - V W^T - W V^T) v - less v.
    struct Turn {
        float tau, less, top;
        float with_v[kPanel], with_w[kPanel];
    };
    LOFT_INLINE Turn turn(int64_t start, int64_t i) const {
        Turn turn;
        const Reflection found = reflection(i);
        double form = 0, twice = 0;
        for (int t = 0; t < phases_.members(); ++t) form += dots_[static_cast<size_t>(t * kDots + 2 * kPanel)];
        for (int64_t k = 0; k < i - start; ++k) {
            double with_v = 0, with_w = 0;
            for (int t = 0; t < phases_.members(); ++t) {
                with_v += dots_[static_cast<size_t>(t * kDots + k)];
                with_w += dots_[static_cast<size_t>(t * kDots + kPanel + k)];
            }
            turn.with_v[k] = static_cast<float>(with_v);
            turn.with_w[k] = static_cast<float>(with_w);
            twice += 2 * with_v * with_w;
        }
        turn.tau = static_cast<float>(found.tau);
        turn.less = static_cast<float>(found.tau * found.tau / 2 * (form - twice));
        turn.top = static_cast<float>(found.top);
        return turn;
    }

    // Number r of w_i; it is v_i that has a number of its own at i + 1.
    LOFT_INLINE float w_at(const Turn& turn, int64_t start, int64_t i, int64_t r) const {
        float image = 0;
        for (int t = 0; t < phases_.members(); ++t) image += image_.get()[t * stride_ + r];
        for (int64_t k = 0; k < i - start; ++k)
            image -= v(start + k)[r] * turn.with_w[k] + w(start, start + k)[r] * turn.with_v[k];
        return turn.tau * image - turn.less * (r == i + 1 ? turn.top : v(i)[r]);
    }
    LOFT_INLINE void w_vector(const Turn& turn, int64_t start, int64_t i, int64_t vector, V& image) const {
        image = load(image_.get(), vector);
        for (int t = 1; t < phases_.members(); ++t) image += load(image_.get() + t * stride_, vector);
        for (int64_t k = 0; k < i - start; ++k) {
            image -= load(v(start + k), vector) * turn.with_w[k];
            image -= load(w(start, start + k), vector) * turn.with_v[k];
        }
        image = image * turn.tau - load(v(i), vector) * turn.less;
    }

    // Column i of the matrix as all reflections before leave it, into v_i; and w_(i-1), which it takes.
    LOFT_INLINE void column(int64_t start, int64_t i, int t) {
        Turn last;
        float of_v[kPanel], of_w[kPanel];
        const int64_t known = i - start;
        if (known) {
            last = turn(start, i - 1);
            for (int64_t k = 0; k < known - 1; ++k) of_v[k] = v(start + k)[i], of_w[k] = w(start, start + k)[i];
            of_v[known - 1] = last.top;
            of_w[known - 1] = w_at(last, start, i - 1, i);
        }
        if (t == 0) {
            float own = a_[i * stride_ + i];
            for (int64_t k = 0; k < known; ++k) own -= 2 * of_v[k] * of_w[k];
            diagonal_[i] = own;
        }
        if (i == n_ - 1) return;
        double norm = 0;
        const Span mine = span(i, t);
        for (int64_t at = mine.first; at < mine.last; ++at) {
            V value = load(a_ + i * stride_, at);
            if (known) {
                V other;
                w_vector(last, start, i - 1, at, other);
                store(w(start, i - 1), at, other);
                value -= load(v(i - 1), at) * of_w[known - 1] + other * of_v[known - 1];
            }
            for (int64_t k = 0; k < known - 1; ++k) {
                value -= load(v(start + k), at) * of_w[k];
                value -= load(w(start, start + k), at) * of_v[k];
            }
            for (int lane = 0; lane < kLanes && at * kLanes + lane <= i + 1; ++lane) {
                if (at * kLanes + lane == i + 1) first_[static_cast<size_t>(i)] = value[lane];
                value[lane] = 0;
            }
            store(v(i), at, value);
            norm += sum(value * value);
        }
        norms_[static_cast<size_t>(i * phases_.members() + t)] = norm;
    }

    // Member t's share of A v_i, and of the products of v_i with the panel's v and w.
    LOFT_INLINE void image(int64_t start, int64_t i, int t) {
        const Reflection found = reflection(i);
        if (t == 0) beside_[i] = found.beside, tau_[i] = found.tau;
        float* x = vector_.get() + t * stride_;
        float* y = image_.get() + t * stride_;
        double* dots = dots_.data() + t * kDots;
        const int64_t begin = (i + 1) / kLanes * kLanes;
        std::copy(v(i) + begin, v(i) + stride_, x + begin);
        x[i + 1] = static_cast<float>(found.top);
        std::fill(y + begin, y + stride_, 0.0f);
        if (found.tau != 0)
            for (int64_t block = begin / kWidth; block < blocks_; ++block) {
                if (block % phases_.members() != t) continue;
                for (int64_t r = std::max(begin, block * kWidth); r < (block + 1) * kWidth; r += kLanes) rows(r, x, y);
            }
        const Span mine = span(i, t);
        for (int64_t k = 0; k < i - start; ++k) {
            V with_v{}, with_w{};
            for (int64_t at = mine.first; at < mine.last; ++at) {
                with_v += load(v(start + k), at) * load(x, at);
                with_w += load(w(start, start + k), at) * load(x, at);
            }
            dots[k] = sum(with_v);
            dots[kPanel + k] = sum(with_w);
        }
        V form{};
        for (int64_t at = begin / kLanes; at < stride_ / kLanes; ++at) form += load(x, at) * load(y, at);
        dots[2 * kPanel] = sum(form);
    }

    // y += A x for the rows from r on, as many as a vector has numbers, and for the columns that they stand for.
    LOFT_INLINE void rows(int64_t r, const float* x, float* y) const {
        constexpr int kTogether = 4;
        const int64_t at = r / kLanes;
        V own = load(y, at);
        for (int lane = 0; lane < kLanes; ++lane) own += load(a_ + (r + lane) * stride_, at) * x[r + lane];
        store(y, at, own);
        for (int lane = 0; lane < kLanes; lane += kTogether) {
            const float* from = a_ + (r + lane) * stride_;
            V total[kTogether]{};
            const V x0 = x[r + lane] - V{}, x1 = x[r + lane + 1] - V{}, x2 = x[r + lane + 2] - V{},
                    x3 = x[r + lane + 3] - V{};
            for (int64_t c = at + 1; c < stride_ / kLanes; ++c) {
                const V a0 = load(from, c), a1 = load(from + stride_, c), a2 = load(from + 2 * stride_, c),
                        a3 = load(from + 3 * stride_, c), other = load(x, c);
                store(y, c, load(y, c) + (a0 * x0 + a1 * x1) + (a2 * x2 + a3 * x3));
                total[0] += a0 * other;
                total[1] += a1 * other;
                total[2] += a2 * other;
                total[3] += a3 * other;
            }
            for (int k = 0; k < kTogether; ++k) y[r + lane + k] += sum(total[k]);
        }
    }

    // The panel's last w.
    LOFT_INLINE void close(int64_t start, int64_t i, int t) {
        const Turn last = turn(start, i);
        const Span mine = span(i, t);
        for (int64_t at = mine.first; at < mine.last; ++at) {
            V other;
            w_vector(last, start, i, at, other);
            if (at == (i + 1) / kLanes) other[(i + 1) % kLanes] = w_at(last, start, i, i + 1);
            store(w(start, i), at, other);
        }
    }

    // The panel's reflectors, v before w and w before v, for the blocks that are member t's.
    LOFT_INLINE void pack(int64_t start, int64_t end, int t) {
        for (int64_t block = end / kWidth; block < blocks_; ++block) {
            if (block % phases_.members() != t) continue;
            for (int64_t k = 0; k < kPanel; ++k) {
                const float *left = v(start + k) + block * kWidth, *right = w(start, start + k) + block * kWidth;
                std::copy_n(right, kWidth, panels_.at(block, k));
                std::copy_n(left, kWidth, panels_.at(block, kPanel + k));
                std::copy_n(left, kWidth, panels_.at(blocks_ + block, k));
                std::copy_n(right, kWidth, panels_.at(blocks_ + block, kPanel + k));
            }
            if (block * kWidth <= end && end < (block + 1) * kWidth) {  // the only one whose first number matters here
                const float top = static_cast<float>(reflection(end - 1).top);
                panels_.at(block, 2 * kPanel - 1)[end - block * kWidth] = top;
                panels_.at(blocks_ + block, kPanel - 1)[end - block * kWidth] = top;
            }
        }
    }

    // A less V W^T + W V^T, from row and column `end` on.
    LOFT_INLINE void update(int64_t end, int t) {
        float* slivers = slivers_.get() + t * kWidth * 2 * kPanel;
        alignas(64) float acc[kWidth * kWidth];
        for (int64_t top = end / kWidth; top < blocks_; ++top) {
            if (top % phases_.members() != t) continue;
            panels_.cut(blocks_ + top, 0, 2 * kPanel, slivers);
            for (int64_t left = top; left < blocks_; ++left) {
                panels_.multiply_by(slivers, left, 0, 2 * kPanel, acc);
                for (int64_t r = 0; r < kWidth; ++r) {
                    float* to = a_ + (top * kWidth + r) * stride_ + left * kWidth;
                    for (int c = 0; c < kWidth / kLanes; ++c) store(to, c, load(to, c) - load(acc + r * kWidth, c));
                }
            }
        }
    }

    float* a_;
    const int64_t n_, stride_;
    float* reflectors_;
    double *diagonal_, *beside_, *tau_;
    Phases phases_;
    std::atomic<int> arrived_{0};
    const int64_t blocks_;
    Block panels_;
    Aligned<float> other_, image_, vector_, slivers_;  // w of the panel; A v, v and slivers of each member
    std::vector<double> first_, norms_, dots_;
};

}  // namespace loft_fast
