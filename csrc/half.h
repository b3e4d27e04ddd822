// 16-bit floats as 32-bit ones, in portable code.
#pragma once

#include <cstdint>
#include <cstring>

namespace loft_fast {

struct BFloat16 {
    uint16_t bits;
    explicit operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

struct Float16 {
    uint16_t bits;
    explicit operator float() const {
        // Shifted into place, the exponent is 112 too small; a product by 2^112 mends normal and subnormal numbers
        // alike. Infinity and NaN keep all exponent bits. No branches: a loop of these runs in vector registers.
        const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
        const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
        float value;
        std::memcpy(&value, &magnitude, sizeof value);
        value *= 0x1p112f;
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        wide = sign | ((bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : wide);
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

}  // namespace loft_fast
