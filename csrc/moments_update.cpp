#include "moments_update.h"

#include "bfloat16_centers.h"
#include "matrix_tiles.h"
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
    const auto centers_for = [&](int64_t width) {
        return bfloat16_centers(x, sorted, panels_of(x.d, width) * width, threads);
    };
    if (instructions() >= Instructions::amx) {
        const auto centers = centers_for(BFloat16Tiles::width);
        state.center = centers.values.data();  // empty where no chain serves
        // A block is one chain, but its 1024 rows come 32 at a time: 181 rows in a chain of pairs would round as much.
        if (centers.chain == kLongChain)
            return run_pipeline<MergeBFloat16<BFloat16Tiles>>(x, sorted, count, state, threads);
    }
    if (instructions() >= Instructions::avx512_bf16) {
        using Long = Strips<BFloat16Pairs<kLongChain>, 2>;
        using Short = Strips<BFloat16Pairs<kShortChain>, 2>;
        const auto centers = centers_for(Long::width);
        state.center = centers.values.data();
        switch (centers.chain) {
            case kLongChain: return run_pipeline<MergeBFloat16<Long>>(x, sorted, count, state, threads);
            case kShortChain: return run_pipeline<MergeBFloat16<Short>>(x, sorted, count, state, threads);
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
