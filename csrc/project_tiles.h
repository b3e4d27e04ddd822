// Projection of bfloat16 rows on processors that multiply matrices (Intel AMX).
#pragma once

#include <cstdint>

#include "rows.h"

namespace loft_fast {

// As `project`, of bfloat16 rows: less the center, and their coordinates, they are rounded to bfloat16, as is the basis.
void project_tiles(const Rows& x, const float* basis, const float* center, int64_t s, void* out, int threads);

}  // namespace loft_fast
