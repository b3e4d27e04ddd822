// Work that a team of threads does in phases, a part for each.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "parallel.h"
#include "product.h"

namespace loft_fast {

// Phases 1, 2, ... of `members` parts each: none begins before the one before it is done. The part of a member that has
// not come yet, or never does, is taken by another one, so a part must depend on nothing but what phases before it left.
class Phases {
  public:
    explicit Phases(int members) : members_(members), taken_(static_cast<size_t>(members)) {}

    int members() const { return members_; }

    // part(i) for the parts of this phase that fall to `me`; returns when all are done.
    template <typename Part>
    LOFT_INLINE void run(int64_t phase, int me, const Part& part) {
        constexpr int kPatience = 500;  // looks: about as long as it takes another thread to come from the phase before
        const int64_t wanted = phase * members_;
        for (int turn = 0;; ++turn) {
            auto& taken = taken_[static_cast<size_t>((me + turn) % members_)].number;
            int64_t before = phase - 1;
            if (taken.load() == before && taken.compare_exchange_strong(before, phase)) {
                part((me + turn) % members_);
                done_.fetch_add(1);
            }
            for (int looks = 0; done_.load() < wanted && looks < kPatience;) ++looks;
            if (done_.load() >= wanted) return;
            if (turn >= members_) std::this_thread::yield();  // there may be more threads than cores
        }
    }

  private:
    struct alignas(64) Padded {
        std::atomic<int64_t> number{0};
    };

    const int members_;
    std::vector<Padded> taken_;
    alignas(64) std::atomic<int64_t> done_{0};
};

// task(0), ..., task(count - 1), in up to `threads` threads, compiled for vectors of so many bytes.
template <int Bytes, typename Task>
void each(int64_t count, int threads, const Task& task) {
    struct Team {
        struct Scratch {};
        const int64_t count;
        const Task& task;
        std::atomic<int64_t> next{0};

        LOFT_INLINE void work(Scratch&) {
            for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
        }
    } team{count, task};
    in_parallel(static_cast<int>(std::min<int64_t>(threads, count)), [&] {
        typename Team::Scratch none;
        work<Bytes>(team, none);
    });
}

}  // namespace loft_fast
