// What the kernels need of CUDA beyond the language: launches that report errors, and byte products of the matrix units.

#pragma once

#ifdef LOFT_EMULATE
#include "emulate.h"
#define LOFT_UNROLL
#else

// Arrays stay in registers only where every index is known.
#define LOFT_UNROLL _Pragma("unroll")

#include <cuda_runtime.h>

#include <cstdint>

#define SHARED_MEMORY(type, name)                  \
  extern __shared__ __align__(16) char shared_[]; \
  type* name = reinterpret_cast<type*>(shared_)

// Returns a cudaError_t.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared, cudaStream_t stream,
           Arguments... arguments) {
  if (shared > (48 << 10)) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

// D (16 x 8) += A (16 x 32) B (32 x 8) with bytes, signed (int8_t) or not (uint8_t).
template <class TA, class TB>
__device__ __forceinline__ void mma_bytes(int (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#define LOFT_MMA(ta, tb)                                                                     \
  asm("mma.sync.aligned.m16n8k32.row.col.s32." ta "." tb                                     \
      ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  constexpr bool signed_a = static_cast<TA>(-1) < 0, signed_b = static_cast<TB>(-1) < 0;
  if constexpr (signed_a && signed_b) LOFT_MMA("s8", "s8");
  if constexpr (signed_a && !signed_b) LOFT_MMA("s8", "u8");
  if constexpr (!signed_a && signed_b) LOFT_MMA("u8", "s8");
  if constexpr (!signed_a && !signed_b) LOFT_MMA("u8", "u8");
#undef LOFT_MMA
}

#endif
