#include "instructions.h"

#include <atomic>
#include <stdexcept>

#include "product.h"

#if LOFT_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace loft_fast {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

// Whether tiles of bfloat16 numbers and of bytes can be multiplied. The system keeps their registers for a process that
// has asked for it.
bool has_amx() {
#if LOFT_AMX
    constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat16 | kTile | kInt8;
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
    return false;
#endif
}

Instructions widest() {
#if LOFT_X86
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
        return Instructions::portable;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512bw")))
        return Instructions::avx2;
    if (!__builtin_cpu_supports("avx512vnni")) return Instructions::avx512;
#if LOFT_BF16
    if (__builtin_cpu_supports("avx512bf16")) return has_amx() ? Instructions::amx : Instructions::avx512_bf16;
#endif
    return Instructions::avx512_vnni;
#else
    return Instructions::portable;
#endif
}

std::atomic<Instructions>& chosen() {
    static std::atomic<Instructions> value{widest()};
    return value;
}

}  // namespace

Instructions instructions() { return chosen().load(std::memory_order_relaxed); }

std::vector<std::string> known_instructions() {
    return {kNames, kNames + static_cast<int>(widest()) + 1};
}

std::string instructions_name() { return kNames[static_cast<int>(instructions())]; }

void use_instructions(const std::string& name) {
    std::string known;
    for (int i = 0; i <= static_cast<int>(widest()); ++i) {
        if (name == kNames[i]) return chosen().store(static_cast<Instructions>(i));
        known += (i ? ", " : "") + std::string(kNames[i]);
    }
    throw std::invalid_argument("name: got '" + name + "', expected one of " + known);
}

}  // namespace loft_fast
