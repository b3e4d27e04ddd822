// Many problems, and a team of threads for each, or a thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>

#include "parallel.h"
#include "product.h"

namespace loft_fast {

// Solve problems 0 .. many - 1 of `size` multiply-adds each: several at a time by a thread each, or, where there are not
// enough, one after another by all threads. make(i): the team of problem i, which can neither be copied nor moved.
template <int Bytes, typename Make>
void run_teams(int64_t many, int64_t size, int threads, const Make& make) {
    using Team = decltype(make(0));
    const bool alone = many >= threads;
    const auto affordable = static_cast<int>(std::min<int64_t>(threads, 1 + (alone ? many : 1) * size / kWorthAThread));
    if (alone) {
        std::atomic<int64_t> next{0};
        return in_parallel(affordable, [&] {
            for (int64_t i; (i = next.fetch_add(1)) < many;) {
                Team team = make(i);
                typename Team::Scratch own(team);
                work<Bytes>(team, own);
            }
        });
    }
    for (int64_t i = 0; i < many; ++i) {
        Team team = make(i);
        std::deque<typename Team::Scratch> scratch;
        for (int k = 0; k < affordable; ++k) scratch.emplace_back(team);
        std::atomic<int> arrived{0};
        in_parallel(affordable, [&] { work<Bytes>(team, scratch[arrived.fetch_add(1)]); });
    }
}

}  // namespace loft_fast
