// Eigenvectors of many small symmetric matrices: one block each, one-sided Jacobi rotations (Hestenes 1958) in shared
// memory.
//
// Of W = M / bound + 1.25 I, which is positive definite, columns are rotated in pairs until all are orthogonal: W V = U S
// with V = U, so that the columns are eigenvectors times eigenvalues of W. One matrix is enough. A round rotates d/2
// disjoint pairs, each by one warp; a round-robin of d - 1 rounds is a sweep.

#include "device.h"

#ifndef LOFT_EMULATE
#include <cstddef>
#endif

namespace loft_fast {

#ifdef LOFT_EMULATE
constexpr int kMostWarps = 3;  // of a block: several, and not as many as the pairs
#else
constexpr int kMostWarps = 16;
#endif
constexpr int kSweeps = 24;        // more than any matrix was seen to need
constexpr float kOrthogonal = 1e-6f;  // cosine of the angle between two columns that are left as they are

// Numbers of shared memory for norms: one for each column, and for each warp.
__host__ __device__ inline std::size_t norms_kept(int d) { return d > 16 ? d : 16; }

__device__ inline float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

// The partners in pair k of a round of the tournament of m (even) players.
__device__ inline void partners(int m, int round, int k, int& p, int& q) {
  const auto player = [&](int seat) { return seat == 0 ? 0 : 1 + (seat - 1 + round) % (m - 1); };
  p = player(k), q = player(m - 1 - k);
  if (p > q) {
    const int swap = p;
    p = q, q = swap;
  }
}

// matrices: (problems, d, d). values: (problems, d), ascending; vectors: (problems, d, d), a column each; sweeps: how many
// were needed, or -1 where it did not converge. workspace: (problems, d, d) where shared memory is too small, or null.
__global__ void __launch_bounds__(32 * kMostWarps) jacobi(const float* matrices, float* values, float* vectors, int* sweeps, int d,
                                              float* workspace) {
  SHARED_MEMORY(float, shared);
  const int problem = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const std::size_t size = static_cast<std::size_t>(d) * d;
  const float* matrix = matrices + problem * size;
  float* norms = shared;  // (d): of the columns, squared
  float* w = workspace ? workspace + problem * size : shared + norms_kept(d);  // column j is w[j d], ...
  vectors += problem * size;
  values += static_cast<std::size_t>(problem) * d;

  float squares = 0, longest = 0;
  for (int j = warp; j < d; j += warps) {
    float row = 0;
    for (int i = lane; i < d; i += 32) {
      const float element = matrix[static_cast<std::size_t>(j) * d + i];
      squares += element * element, row += fabsf(element);
    }
    longest = fmaxf(longest, warp_sum(row));
  }
  squares = warp_sum(squares);
  if (lane == 0) norms[warp] = squares;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < warps; ++i) total += norms[i];
  __syncthreads();
  if (lane == 0) norms[warp] = longest;
  __syncthreads();
  for (int i = 0; i < warps; ++i) longest = fmaxf(longest, norms[i]);
  __syncthreads();
  // Both norms are at least the largest eigenvalue, so that those of W lie between 0.25 and 2.25. Squares of very small
  // numbers are nothing.
  const float bound = total > 1e-30f ? fminf(sqrtf(total), longest) : longest > 0 ? longest : 1;
  for (std::size_t i = threadIdx.x; i < size; i += blockDim.x) {
    w[i] = matrix[i] / bound + (i % (d + 1) == 0 ? 1.25f : 0);
  }
  __syncthreads();

  const int players = d + d % 2;  // an odd one out plays against nobody
  int sweep = 0;
  for (bool rotated = true; rotated && sweep < kSweeps; ++sweep) {
    for (int j = warp; j < d; j += warps) {  // anew in every sweep: what rotations update drifts
      float norm = 0;
      for (int i = lane; i < d; i += 32) norm += w[j * d + i] * w[j * d + i];
      norm = warp_sum(norm);
      if (lane == 0) norms[j] = norm;
    }
    __syncthreads();
    int turned = 0;
    for (int round = 0; round < players - 1; ++round) {
      for (int k = warp; k < players / 2; k += warps) {
        int p, q;
        partners(players, round, k, p, q);
        if (q >= d) continue;
        float* x = w + static_cast<std::size_t>(p) * d;
        float* y = w + static_cast<std::size_t>(q) * d;
        const float a = norms[p], b = norms[q];  // before the sum, where all lanes wait: one of them writes them later
        float dot = 0;
        for (int i = lane; i < d; i += 32) dot += x[i] * y[i];
        dot = warp_sum(dot);
        if (!(fabsf(dot) > kOrthogonal * sqrtf(a * b))) continue;
        turned = 1;
        const float zeta = (b - a) / (2 * dot);
        const float t = copysignf(1.0f, zeta) / (fabsf(zeta) + sqrtf(1 + zeta * zeta));
        const float c = 1 / sqrtf(1 + t * t), s = c * t;
        for (int i = lane; i < d; i += 32) {
          const float u = x[i], v = y[i];
          x[i] = c * u - s * v;
          y[i] = s * u + c * v;
        }
        if (lane == 0) norms[p] = a - t * dot, norms[q] = b + t * dot;
      }
      __syncthreads();
    }
    rotated = __syncthreads_or(turned);
  }
  if (threadIdx.x == 0) sweeps[problem] = sweep < kSweeps ? sweep : -1;

  // u^T M u is good to second order in u, which the length of a column, most of it 1.25, is not.
  for (int j = warp; j < d; j += warps) {
    float* u = w + static_cast<std::size_t>(j) * d;
    float norm = 0;
    for (int i = lane; i < d; i += 32) norm += u[i] * u[i];
    norm = 1 / sqrtf(warp_sum(norm));
    for (int i = lane; i < d; i += 32) u[i] *= norm;
    __syncwarp();
    float value = 0;
    for (int i = lane; i < d; i += 32) {
      float image = 0;
      for (int k = 0; k < d; ++k) image += matrix[static_cast<std::size_t>(k) * d + i] * u[k];
      value += image * u[i];
    }
    value = warp_sum(value);
    if (lane == 0) norms[j] = value;
  }
  __syncthreads();
  for (int j = warp; j < d; j += warps) {
    const float value = norms[j];
    int place = 0;  // how many come before this one
    for (int i = lane; i < d; i += 32) place += norms[i] < value || (norms[i] == value && i < j);
    place = static_cast<int>(warp_sum(static_cast<float>(place)));
    if (lane == 0) values[place] = value;
    for (int i = lane; i < d; i += 32) {
      vectors[static_cast<std::size_t>(i) * d + place] = w[static_cast<std::size_t>(j) * d + i];
    }
  }
}

}  // namespace loft_fast

// Returns a cudaError_t. workspace as for the kernel.
extern "C" int loft_fast_jacobi(const float* matrices, float* values, float* vectors, int* sweeps, int problems, int d,
                                float* workspace, void* stream) {
  if (problems == 0 || d == 0) return 0;
  const int pairs = (d + 1) / 2, warps = pairs > loft_fast::kMostWarps ? loft_fast::kMostWarps : pairs;
  const std::size_t kept = loft_fast::norms_kept(d) + (workspace ? 0 : static_cast<std::size_t>(d) * d);
  return launch(loft_fast::jacobi, dim3(problems), 32 * warps, kept * sizeof(float), static_cast<cudaStream_t>(stream),
                matrices, values, vectors, sweeps, d, workspace);
}
