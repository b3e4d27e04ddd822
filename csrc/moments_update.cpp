#include "moments_update.h"

#include "bfloat16_centers.h"
#include "merge.h"

namespace loft_fast {
namespace {

template <typename In, typename T>
void merge_numbers(const Rows& x, const Sorted& sorted, int64_t* count, const Running& state, int threads) {
    switch (vector_bytes()) {
        case 64: return run_pipeline<MergeNumbers<In, T, 64>>(x, sorted, count, state, threads);
        case 32: return run_pipeline<MergeNumbers<In, T, 32>>(x, sorted, count, state, threads);
        default: return run_pipeline<MergeNumbers<In, T, 16>>(x, sorted, count, state, threads);
    }
}

void merge_bfloat16(const Rows& x, const Sorted& sorted, int64_t* count, Running state, int threads) {
    if (instructions() >= Instructions::avx512_bf16) {
        constexpr int kWidth = Shape<Pair, BFloat16Pairs<kLongChain>::bytes>::width;
        const auto centers = bfloat16_centers(x, sorted, panels_of(x.d, kWidth) * kWidth, threads);
        state.center = centers.values.data();  // empty where no chain serves
        switch (centers.chain) {
            case kLongChain: return run_pipeline<MergeBFloat16<kLongChain>>(x, sorted, count, state, threads);
            case kShortChain: return run_pipeline<MergeBFloat16<kShortChain>>(x, sorted, count, state, threads);
        }
    }
    merge_numbers<BFloat16, float>(x, sorted, count, state, threads);
}

}  // namespace

void moments_update(const Rows& x, const int64_t* group, int64_t* count, double* mean,
                    const std::vector<double*>& scatter, int threads) {
    const Running state{mean, scatter, nullptr};
    const Sorted sorted = sort_rows(x.n, group, static_cast<int64_t>(scatter.size()));
    switch (x.dtype) {
        case DType::float64: return merge_numbers<double, double>(x, sorted, count, state, threads);
        case DType::float32: return merge_numbers<float, float>(x, sorted, count, state, threads);
        case DType::float16: return merge_numbers<Float16, float>(x, sorted, count, state, threads);
        case DType::bfloat16: return merge_bfloat16(x, sorted, count, state, threads);
    }
}

}  // namespace loft_fast
