#include "peak.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"
#include "product.h"

namespace loft_fast {
namespace {

constexpr int kSums = 12;          // enough of them hide the latency of an addition
constexpr int64_t kSteps = 10000;  // taken at a time: threads that are slowed down take fewer

template <int Bytes>
class Peak {
    using V = Vector<float, Bytes>;

  public:
    struct Scratch {
        float result;
    };

    explicit Peak(int64_t count) : steps_(count / (kSums * Shape<float, Bytes>::lanes) + 1) {}

    LOFT_INLINE void work(Scratch& own) {
        V sum[kSums] = {}, factor = V{} + 0.5f, more = V{} + own.result;
        while (taken_.fetch_add(kSteps) < steps_)
            for (int64_t step = 0; step < kSteps; ++step)
                for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * factor + more;
        for (const V& one : sum) own.result += *reinterpret_cast<const float*>(&one);
    }

  private:
    const int64_t steps_;
    std::atomic<int64_t> taken_{0};
};

template <int Bytes>
void run(int64_t count, int threads) {
    Peak<Bytes> peak(count);
    in_parallel(std::max(1, threads), [&] {
        volatile float start = 0.25f;  // or it could be worked out beforehand
        typename Peak<Bytes>::Scratch own{start};
        work<Bytes>(peak, own);
        volatile float kept = own.result;  // or nothing would have to be computed
        (void)kept;
    });
}

}  // namespace

void multiply_adds(int64_t count, int threads) {
    switch (vector_bytes()) {
        case 64: return run<64>(count, threads);
        case 32: return run<32>(count, threads);
        default: return run<16>(count, threads);
    }
}

}  // namespace loft_fast
