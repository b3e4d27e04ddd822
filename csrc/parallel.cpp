#include "parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace loft_fast {
namespace {

// How compilers start a parallel region of OpenMP: function, its argument, threads, flags.
using StartRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

// torch has an OpenMP runtime in the process, the threads of which go on spinning for a while after its operations.
// They are ready to work, and other threads would have to share the cores with them.
StartRegion find_openmp() {
#if defined(__linux__)
    return reinterpret_cast<StartRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

}  // namespace

void in_parallel(int threads, const std::function<void()>& task) {
    if (threads <= 1) return task();
    static const StartRegion start_region = find_openmp();
    if (start_region) {
        const auto run = [](void* data) { (*static_cast<const std::function<void()>*>(data))(); };
        return start_region(run, const_cast<void*>(static_cast<const void*>(&task)), static_cast<unsigned>(threads), 0);
    }
    std::vector<std::thread> team;
    team.reserve(static_cast<size_t>(threads));
    try {
        while (static_cast<int>(team.size()) < threads - 1) team.emplace_back(task);
    } catch (const std::system_error&) {  // no more to be had
    }
    task();
    for (auto& thread : team) thread.join();
}

}  // namespace loft_fast
