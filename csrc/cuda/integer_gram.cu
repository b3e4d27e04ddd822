// Exact moments on integer matrix units: rows as 16-bit integers, their sums and products in 64 bits.
//
// An integer q = 256 h + l has a signed byte h and an unsigned byte l, so that q q' = 65536 h h' + 256 (h l' + l h') +
// l l': four byte products, summed in 32 bits over the rows of a piece, at most kMostRows, then in 64. Integers add up to
// the same bits in any order: atomic additions are as good as others.
//
// `limbs` writes the bytes with the rows of a column one after another, as the matrix units want them; `integer_gram`
// multiplies tiles of 64 columns.

#include "device.h"

#ifndef LOFT_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#endif

namespace loft_fast {

constexpr int kTile = 64;          // columns of a tile, and rows that a block splits or multiplies at a time
constexpr double kLargest = 32767; // magnitude of a quantised number, as on the CPU
constexpr int kMostRows = 16384;   // of a piece: 2 * 255 * 128 * 16384 < 2^31
constexpr int kWords = kTile / 4;  // of one column in a block of rows
constexpr int kPitch = kWords + 4; // so that the lanes of a warp read from different banks

// Rows order[start[p]] to order[end[p] - 1] of the piece p, or rows start[p] to end[p] - 1 without an order; they go to
// bytes p * length on. Columns of the planes are `stride` bytes apart.
struct Pieces {
  const std::int64_t* order;
  const std::int64_t* start;
  const std::int64_t* end;
  const std::int64_t* group;
  int length;
  std::int64_t stride;
};

template <class T>
__device__ inline double widened(T x) {
  return static_cast<double>(static_cast<float>(x));
}
template <>
__device__ inline double widened(double x) {
  return x;
}

__device__ inline void add(std::int64_t* where, std::int64_t more) {
  atomicAdd(reinterpret_cast<unsigned long long*>(where), static_cast<unsigned long long>(more));
}

// grid: (rows of a piece / 64, columns / 64, pieces), 256 threads. total: (G, d), clipped: (G).
template <class T>
__global__ void __launch_bounds__(256) limbs(const T* x, std::int64_t row_stride, std::int64_t col_stride, int d,
                                             double inverse_scale, Pieces pieces, std::uint8_t* high, std::uint8_t* low,
                                             std::int64_t* total, std::int64_t* clipped) {
  SHARED_MEMORY(int, shared);
  short* block = reinterpret_cast<short*>(shared);  // [column][row], of 64 + 2 rows
  constexpr int kRows = kTile + 2;
  const std::int64_t start = pieces.start[blockIdx.z], end = pieces.end[blockIdx.z];
  const std::int64_t first = start + static_cast<std::int64_t>(blockIdx.x) * kTile;
  if (start == end || static_cast<std::int64_t>(blockIdx.x) * kTile >= pieces.length) return;
  const int column = blockIdx.y * kTile + threadIdx.x % kTile;
  std::int64_t outside = 0;
  for (int r = threadIdx.x / kTile; r < kTile; r += 4) {
    int q = 0;
    if (first + r < end && column < d) {
      const std::int64_t row = pieces.order ? pieces.order[first + r] : first + r;
      const double scaled = widened(x[row * row_stride + column * col_stride]) * inverse_scale;
      const double bounded = fmin(fmax(scaled, -kLargest), kLargest);
      outside += bounded != scaled;
      q = static_cast<int>(rint(bounded));
    }
    block[threadIdx.x % kTile * kRows + r] = static_cast<short>(q);
  }
  __syncthreads();
  const std::int64_t group = pieces.group[blockIdx.z];
  if (threadIdx.x < kTile && column < d) {
    std::int64_t sum = 0;
    for (int r = 0; r < kTile; ++r) sum += block[threadIdx.x * kRows + r];
    add(total + group * d + column, sum);
  }
  if (outside) add(clipped + group, outside);
  // Four rows a word: 16 words of each of 64 columns, 4 to a thread.
  const std::int64_t place = blockIdx.z * static_cast<std::int64_t>(pieces.length) + blockIdx.x * kTile;
  for (int k = threadIdx.x; k < kTile * kWords; k += 256) {
    const int c = k / kWords, word = k % kWords;
    if (blockIdx.y * kTile + c >= static_cast<unsigned>(d)) continue;
    std::uint32_t upper = 0, lower = 0;
    for (int b = 0; b < 4; ++b) {
      const int q = block[c * kRows + 4 * word + b];
      lower |= static_cast<std::uint32_t>(q & 255) << (8 * b);
      upper |= static_cast<std::uint32_t>((q >> 8) & 255) << (8 * b);
    }
    const std::int64_t at = (blockIdx.y * kTile + c) * pieces.stride + place + 4 * word;
    *reinterpret_cast<std::uint32_t*>(high + at) = upper;
    *reinterpret_cast<std::uint32_t*>(low + at) = lower;
  }
}

// The words of 64 columns and 64 rows, of both planes, into shared memory [plane][column][kPitch].
__device__ inline void fetch(std::uint32_t* to, const std::uint8_t* high, const std::uint8_t* low, int first_column, int d,
                             std::int64_t stride, std::int64_t place) {
  for (int k = threadIdx.x; k < kTile * kWords; k += 128) {
    const int c = k / kWords, word = k % kWords;
    std::uint32_t upper = 0, lower = 0;
    if (first_column + c < d) {
      const std::int64_t at = (first_column + c) * stride + place + 4 * word;
      upper = *reinterpret_cast<const std::uint32_t*>(high + at);
      lower = *reinterpret_cast<const std::uint32_t*>(low + at);
    }
    to[c * kPitch + word] = upper;
    to[(kTile + c) * kPitch + word] = lower;
  }
}

// grid: (tiles of the upper triangle, pieces), 128 threads: four warps of 32 x 32. product: addresses of G (d, d) matrices.
__global__ void __launch_bounds__(128) integer_gram(const std::uint8_t* high, const std::uint8_t* low, int d, Pieces pieces,
                                                    std::int64_t* const* product) {
  SHARED_MEMORY(std::uint32_t, shared);
  const std::int64_t rows = pieces.end[blockIdx.y] - pieces.start[blockIdx.y];
  if (rows == 0) return;
  int j = 0;
  while ((j + 1) * (j + 2) / 2 <= static_cast<int>(blockIdx.x)) ++j;
  const int i = blockIdx.x - j * (j + 1) / 2;
  std::uint32_t* left = shared;
  std::uint32_t* right = i == j ? left : shared + 2 * kTile * kPitch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / 2 * 32 + lane / 4, column = warp % 2 * 32 + lane / 4, part = lane % 4;
  int upper[2][4][4] = {}, middle[2][4][4] = {}, lower[2][4][4] = {};

  const std::int64_t place = blockIdx.y * static_cast<std::int64_t>(pieces.length);
  for (std::int64_t k = 0; k < rows; k += kTile) {
    __syncthreads();
    fetch(left, high, low, i * kTile, d, pieces.stride, place + k);
    if (i != j) fetch(right, high, low, j * kTile, d, pieces.stride, place + k);
    __syncthreads();
    LOFT_UNROLL
    for (int step = 0; step < kWords; step += 8) {  // 32 rows
      std::uint32_t a[2][2][4], b[2][4][2];         // [plane]
      LOFT_UNROLL
      for (int plane = 0; plane < 2; ++plane) {
        LOFT_UNROLL
        for (int m = 0; m < 2; ++m)
          LOFT_UNROLL
          for (int e = 0; e < 4; ++e)
            a[plane][m][e] = left[(plane * kTile + row + 16 * m + 8 * (e % 2)) * kPitch + step + 4 * (e / 2) + part];
        LOFT_UNROLL
        for (int n = 0; n < 4; ++n)
          LOFT_UNROLL
          for (int e = 0; e < 2; ++e)
            b[plane][n][e] = right[(plane * kTile + column + 8 * n) * kPitch + step + 4 * e + part];
      }
      LOFT_UNROLL
      for (int m = 0; m < 2; ++m)
        LOFT_UNROLL
        for (int n = 0; n < 4; ++n) {
          mma_bytes<std::int8_t, std::int8_t>(upper[m][n], a[0][m], b[0][n]);
          mma_bytes<std::int8_t, std::uint8_t>(middle[m][n], a[0][m], b[1][n]);
          mma_bytes<std::uint8_t, std::int8_t>(middle[m][n], a[1][m], b[0][n]);
          mma_bytes<std::uint8_t, std::uint8_t>(lower[m][n], a[1][m], b[1][n]);
        }
    }
  }
  std::int64_t* matrix = product[pieces.group[blockIdx.y]];
  LOFT_UNROLL
  for (int m = 0; m < 2; ++m)
    LOFT_UNROLL
    for (int n = 0; n < 4; ++n)
      LOFT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int r = i * kTile + row + 16 * m + 8 * (e / 2);
        const int c = j * kTile + warp % 2 * 32 + 8 * n + 2 * part + e % 2;
        const std::int64_t value = static_cast<std::int64_t>(upper[m][n][e]) * 65536 +
                                   static_cast<std::int64_t>(middle[m][n][e]) * 256 + lower[m][n][e];
        if (r <= c && c < d) {
          add(matrix + static_cast<std::int64_t>(r) * d + c, value);
          if (r < c) add(matrix + static_cast<std::int64_t>(c) * d + r, value);
        }
      }
}

}  // namespace loft_fast

// Both return a cudaError_t. dtype as in csrc/rows.h: 0 float64, 1 float32, 2 float16, 3 bfloat16.
extern "C" int loft_fast_limbs(const void* x, int dtype, long long row_stride, long long col_stride, int d,
                               double inverse_scale, const void* order, const void* start, const void* end,
                               const void* group, int pieces, int length, long long stride, void* high, void* low,
                               void* total, void* clipped, void* stream) {
  using namespace loft_fast;
  if (length % kTile) return 1;  // cudaErrorInvalidValue
  const auto numbers = [](const void* p) { return static_cast<const std::int64_t*>(p); };
  const Pieces where{numbers(order), numbers(start), numbers(end), numbers(group), length, stride};
  const dim3 grid((length + kTile - 1) / kTile, (d + kTile - 1) / kTile, pieces);
  const auto run = [&](auto kernel, auto* rows) {
    return launch(kernel, grid, 256, kTile * (kTile + 2) * sizeof(short), static_cast<cudaStream_t>(stream), rows,
                  static_cast<std::int64_t>(row_stride), static_cast<std::int64_t>(col_stride), d, inverse_scale, where,
                  static_cast<std::uint8_t*>(high), static_cast<std::uint8_t*>(low), static_cast<std::int64_t*>(total),
                  static_cast<std::int64_t*>(clipped));
  };
  if (dtype == 0) return run(limbs<double>, static_cast<const double*>(x));
  if (dtype == 1) return run(limbs<float>, static_cast<const float*>(x));
#ifndef LOFT_EMULATE
  if (dtype == 2) return run(limbs<__half>, static_cast<const __half*>(x));
  if (dtype == 3) return run(limbs<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(x));
#endif
  return 1;
}

extern "C" int loft_fast_integer_gram(const void* high, const void* low, int d, const void* start, const void* end,
                                      const void* group, int pieces, int length, long long stride, const void* product,
                                      void* stream) {
  using namespace loft_fast;
  if (length > kMostRows || length % kTile) return 1;  // cudaErrorInvalidValue
  const auto numbers = [](const void* p) { return static_cast<const std::int64_t*>(p); };
  const Pieces where{nullptr, numbers(start), numbers(end), numbers(group), length, stride};
  const int tiles = (d + kTile - 1) / kTile;
  return launch(integer_gram, dim3(tiles * (tiles + 1) / 2, pieces), 128, 4 * kTile * kPitch * sizeof(std::uint32_t),
                static_cast<cudaStream_t>(stream), static_cast<const std::uint8_t*>(high),
                static_cast<const std::uint8_t*>(low), d, where, static_cast<std::int64_t* const*>(product));
}
