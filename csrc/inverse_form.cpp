#include "inverse_form.h"

#include <cmath>
#include <vector>

#include "panels.h"
#include "teams.h"

namespace loft_fast {
namespace {

// With N = R^T R, R upper triangular, U^T N^-1 U is H^T H with R^T H = U. Rows of R and H come out together, `width` at a
// time: those of the bordered matrix [N U], less the products with all rows that are there already (so every number is
// written once), divided by the root of the block on the diagonal.
template <int Bytes>
class Elimination {
    using Block = Panels<double, Bytes>;
    static constexpr int kWidth = Block::width;

  public:
    // Of the step that its owner is at: slivers of the panel, and the root of the block on the diagonal.
    struct Scratch {
        explicit Scratch(const Elimination& team) : slivers(kWidth * kWidth * team.inner_) {}
        Aligned<double> slivers;
        double root[kWidth * kWidth], inverse[kWidth];
    };

    Elimination(const double* matrix, const double* border, int64_t d, int64_t s, double* out, bool* positive)
        : matrix_(matrix),
          border_(border),
          d_(d),
          s_(s),
          out_(out),
          positive_(positive),
          inner_(Block::count_of(d)),
          panels_(inner_ + Block::count_of(s), inner_ * kWidth) {
        for (int64_t p = 0; p < inner_; ++p) first_.push_back(first_.back() + panels_.count() - 1 - p);
    }

    // Work until nothing is left to take; every member calls it.
    LOFT_INLINE void work(Scratch& own) {
        const int64_t total = first_.back();
        int64_t step = -1, later = 0;
        for (int64_t id; (id = taken_.fetch_add(1)) < total; done_.fetch_add(1)) {
            while (id >= first_[later + 1]) ++later;
            if (later != step) {
                wait_for(done_, first_[step = later]);
                if (!failed_.load() && !open(step, own)) failed_ = true;
            }
            if (!failed_.load()) fill(step, step + 1 + id - first_[step], own);
        }
        wait_for(done_, total);
        if (!told_.exchange(true)) *positive_ = !failed_.load();
        if (!failed_.load()) panels_.multiply_all(inner_, s_, next_, own.slivers.get(), out_);
    }

  private:
    // Slivers and root of a step; false where there is none. Everyone makes its own, which takes less than to wait for it.
    LOFT_INLINE bool open(int64_t p, Scratch& own) {
        double* root = own.root;
        alignas(64) double acc[kWidth * kWidth];
        panels_.cut(p, 0, p * kWidth, own.slivers.get());
        panels_.multiply_by(own.slivers.get(), p, 0, p * kWidth, acc);
        load(p, p, root);
        for (int i = 0; i < kWidth * kWidth; ++i) root[i] -= acc[i];
        for (int k = 0; k < kWidth; ++k) {
            const double pivot = root[k * kWidth + k];
            if (!(pivot > 0) || !std::isfinite(pivot)) return false;
            own.inverse[k] = 1 / std::sqrt(pivot);
            for (int j = k; j < kWidth; ++j) root[k * kWidth + j] *= own.inverse[k];
            for (int i = k + 1; i < kWidth; ++i)
                for (int j = i; j < kWidth; ++j) root[i * kWidth + j] -= root[k * kWidth + i] * root[k * kWidth + j];
        }
        return true;
    }

    // The rows of step p in panel q.
    LOFT_INLINE void fill(int64_t p, int64_t q, const Scratch& own) {
        alignas(64) double acc[kWidth * kWidth];
        double* to = panels_.at(q, p * kWidth);
        panels_.multiply_by(own.slivers.get(), q, 0, p * kWidth, acc);
        load(p, q, to);
        for (int i = 0; i < kWidth; ++i) {
            double row[kWidth];
            for (int j = 0; j < kWidth; ++j) row[j] = to[i * kWidth + j] - acc[i * kWidth + j];
            for (int k = 0; k < i; ++k)
                for (int j = 0; j < kWidth; ++j) row[j] -= own.root[k * kWidth + i] * to[k * kWidth + j];
            for (int j = 0; j < kWidth; ++j) to[i * kWidth + j] = row[j] * own.inverse[i];
        }
    }

    // A block of [N U]; past the edges of N that of the identity, which eliminates nothing.
    LOFT_INLINE void load(int64_t p, int64_t q, double* to) const {
        const bool bordered = q >= inner_;
        const double* from = bordered ? border_ : matrix_;
        const int64_t columns = bordered ? s_ : d_, top = p * kWidth, left = (q - (bordered ? inner_ : 0)) * kWidth;
        const int64_t tall = std::min<int64_t>(kWidth, d_ - top), wide = std::min<int64_t>(kWidth, columns - left);
        for (int64_t i = 0; i < kWidth; ++i, to += kWidth) {
            std::fill_n(to, kWidth, 0.0);
            if (i < tall) std::copy_n(from + (top + i) * columns + left, wide, to);
            if (p == q && i >= tall) to[i] = 1;
        }
    }

    const double *matrix_, *border_;
    const int64_t d_, s_;
    double* out_;
    bool* positive_;
    const int64_t inner_;
    Block panels_;
    std::vector<int64_t> first_{0};  // tile of each step
    std::atomic<int64_t> taken_{0}, done_{0}, next_{0};
    std::atomic<bool> failed_{false}, told_{false};
};

template <int Bytes>
void run(const double* matrix, const double* border, int64_t many, int64_t d, int64_t s, double* out, bool* positive,
         int threads) {
    run_teams<Bytes>(many, d * d * (d / 6 + s / 2 + 1), threads, [&](int64_t i) {
        return Elimination<Bytes>(matrix + i * d * d, border + i * d * s, d, s, out + i * s * s, positive + i);
    });
}

}  // namespace

void inverse_form(const double* matrix, const double* border, int64_t many, int64_t d, int64_t s, double* out,
                  bool* positive, int threads) {
    switch (vector_bytes()) {
        case 64: return run<64>(matrix, border, many, d, s, out, positive, threads);
        case 32: return run<32>(matrix, border, many, d, s, out, positive, threads);
        default: return run<16>(matrix, border, many, d, s, out, positive, threads);
    }
}

}  // namespace loft_fast
