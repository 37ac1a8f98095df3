#include "eigh.cuh"
#include "kernels.h"

namespace fastmtl::cuda {

namespace {

// Eigenvalues (ascending) and vectors (columns); the lower triangle is read. NaN where an entry is not finite.
__global__ __launch_bounds__(kMaxJacobiThreads, 2) void eigh(
    const double* M, // [B, T, T]
    int T,
    bool vectors_shared,  // else they are rotated where they lie
    double* eigenvalues,  // [B, T]
    double* eigenvectors, // [B, T, T]
    double* scratch) {    // [B, T, T] where the vectors do not fit shared memory
  FASTMTL_DYNAMIC_SHARED(shared);
  const int64_t b = blockIdx.x;
  const int ld = jacobi_stride(T);
  double* A = reinterpret_cast<double*>(shared); // [T, ld]
  double* cosine = A + T * ld;
  double* sine = cosine + jacobi_array(T) / 2;
  double* sorted = sine + jacobi_array(T) / 2;
  int* place = reinterpret_cast<int*>(sorted + jacobi_array(T));
  double* V = vectors_shared ? sorted + 2 * jacobi_array(T) : scratch + b * T * T;
  const int next_row = vectors_shared ? ld : T;
  M += b * T * T;
  double poison = 0.0, largest = 0.0;
  for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
    const int i = k / T, j = k % T;
    if (j <= i) {
      const double x = M[k];
      A[j * ld + i] = x;
      poison += x * 0.0;
    }
  }
  const bool finite = !__syncthreads_or(poison != 0.0);
  if (finite) {
    for (int i = 0; i < T; ++i) { // by all threads alike, which is cheaper than telling each other
      for (int j = int(threadIdx.x) % 32; j < T; j += 32) {
        largest = j >= i ? fmax(largest, fabs(A[i * ld + j])) : largest;
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    double down, up;
    power_of_two(largest, down, up);
    __syncthreads();
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      if (k % T >= k / T) {
        A[k / T * ld + k % T] *= down;
      }
    }
    jacobi(A, ld, V, next_row, T, cosine, sine);
    sort(A, ld, T, false, sorted, place);
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      eigenvectors[b * T * T + k] = V[k / T * next_row + place[k % T]];
    }
    for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
      eigenvalues[b * T + i] = sorted[i] * up;
    }
    return;
  }
  const double nan = poison != 0.0 ? poison : 0.0 / 0.0;
  for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
    eigenvectors[b * T * T + k] = nan;
  }
  for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
    eigenvalues[b * T + i] = nan;
  }
}

} // namespace

void launch_eigh(
    const double* M,
    int64_t B,
    int64_t T,
    double* eigenvalues,
    double* eigenvectors,
    double* scratch,
    cudaStream_t stream) {
  FASTMTL_LAUNCH(
      eigh,
      dim3(unsigned(B)),
      dim3(unsigned(jacobi_threads(T))),
      jacobi_shared(T, !scratch),
      stream,
      M,
      int(T),
      !scratch,
      eigenvalues,
      eigenvectors,
      scratch);
}

} // namespace fastmtl::cuda
