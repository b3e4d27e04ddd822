// Which of the processor's instructions the kernels use: chosen when the library is loaded, or asked for by tests.
#pragma once

#include <string>
#include <vector>

namespace loft_fast {

// Each can do what those before it can.
enum class Instructions { portable, avx2, avx512, avx512_vnni, avx512_bf16, amx };

Instructions instructions();

std::vector<std::string> known_instructions();  // names of those that this machine has
std::string instructions_name();

// Throws std::invalid_argument for a name that this machine does not know.
void use_instructions(const std::string& name);

}  // namespace loft_fast
