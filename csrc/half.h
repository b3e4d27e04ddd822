// 16-bit floats as 32-bit ones, in portable code.
#pragma once

#include <cstdint>
#include <cstring>

namespace loft_fast {

struct BFloat16 {
    uint16_t bits;
    explicit BFloat16(float value) {
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        const uint32_t nearest = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;  // ties to even
        bits = static_cast<uint16_t>(value == value ? nearest : (wide >> 16) | 0x40u);
    }
    explicit operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

struct Float16 {
    uint16_t bits;
    explicit Float16(float value) {
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        const uint32_t sign = (wide >> 16) & 0x8000u, magnitude = wide & 0x7fffffffu;
        float size;
        std::memcpy(&size, &magnitude, sizeof size);
        // Below 2^-14 the last bit is worth 2^-24, as in a float of 0.5: adding that rounds, ties to even.
        size += 0.5f;
        uint32_t small;
        std::memcpy(&small, &size, sizeof small);
        small -= 0x3f000000u;
        const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        uint32_t nearest = magnitude < 0x38800000u ? small : normal;
        nearest = magnitude < 0x477ff000u ? nearest : 0x7c00u;  // 65520 and more: infinity
        bits = static_cast<uint16_t>(sign | (magnitude <= 0x7f800000u ? nearest : 0x7e00u));
    }
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
