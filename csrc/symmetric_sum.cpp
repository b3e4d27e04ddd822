#include "symmetric_sum.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"
#include "product.h"

namespace loft_fast {
namespace {

constexpr int64_t kLine = 8;         // numbers of a cache line
constexpr int64_t kBand = 1 << 14;   // bytes of the result that stay in the cache while all matrices are added
constexpr int64_t kSmall = 1 << 18;  // additions below which a thread costs more than it brings

}  // namespace

void symmetric_sum(double* out, const std::vector<const double*>& matrices, int64_t d, int threads) {
    if (d == 0) return;
    const int64_t height = std::max<int64_t>(1, kBand / (8 * d)), bands = (d + height - 1) / height;
    const int64_t additions = static_cast<int64_t>(matrices.size()) * d * d / 2;
    std::atomic<int64_t> next{0};
    in_parallel(static_cast<int>(std::min<int64_t>({threads, bands, 1 + additions / kSmall})), [&] {
        for (int64_t band; (band = next.fetch_add(1)) < bands;) {
            const int64_t top = band * height, bottom = std::min(d, top + height);
            for (size_t m = 0; m < matrices.size(); ++m) {
                // No hardware guesses where the next matrix lies.
                const double *matrix = matrices[m], *later = matrices[std::min(m + 1, matrices.size() - 1)];
                for (int64_t i = top; i < bottom; ++i) {
                    for (int64_t j = i; j < d; j += kLine) LOFT_PREFETCH(later + i * d + j, 0);
                    for (int64_t j = i; j < d; ++j) out[i * d + j] += matrix[i * d + j];
                }
            }
            for (int64_t j = top; j < d; ++j)
                for (int64_t i = top; i < std::min(bottom, j); ++i) out[j * d + i] = out[i * d + j];
        }
    });
}

}  // namespace loft_fast
