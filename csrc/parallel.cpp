#include "parallel.h"

#include <exception>
#include <functional>
#include <mutex>
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

// A task, and the first exception that it threw in any thread: none may leave a region of OpenMP, or a thread.
class Guarded {
  public:
    explicit Guarded(const std::function<void()>& task) : task_(task) {}

    void operator()() noexcept {
        try {
            task_();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    void rethrow() const {
        if (failure_) std::rethrow_exception(failure_);
    }

  private:
    const std::function<void()>& task_;
    std::mutex mutex_;
    std::exception_ptr failure_;
};

void in_threads(int threads, Guarded& task) {
    std::vector<std::thread> team;
    team.reserve(static_cast<size_t>(threads));
    try {
        while (static_cast<int>(team.size()) < threads - 1) team.emplace_back(std::ref(task));
    } catch (const std::exception&) {  // no more to be had
    }
    task();
    for (auto& thread : team) thread.join();
}

}  // namespace

void in_parallel(int threads, const std::function<void()>& task) {
    if (threads <= 1) return task();
    static const StartRegion start_region = find_openmp();
    Guarded guarded(task);
    if (start_region)
        start_region([](void* data) { (*static_cast<Guarded*>(data))(); }, &guarded, static_cast<unsigned>(threads), 0);
    else
        in_threads(threads, guarded);
    guarded.rethrow();
}

}  // namespace loft_fast
