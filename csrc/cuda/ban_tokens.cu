// Sampling calls this once per generated token on a few hundred kilobytes, where the time is all
// launch overhead; a direct launch skips the Triton launcher. Stores only: logits are never read.
#include <cuda_runtime.h>

#include "ban_tokens.h"

namespace r1v3 {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaximumBlocks = 1 << 16;

template <typename T>
__global__ void ban_tokens_kernel(T* __restrict__ logits, T minus_infinity, int64_t n_rows,
                                  int64_t row_stride, int64_t vocab,
                                  const int64_t* __restrict__ ids, int64_t n_ids,
                                  const uint8_t* __restrict__ enabled, int64_t vocab_start) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < n_rows * n_ids; i += step) {
    const int64_t row = i / n_ids;
    if (enabled != nullptr && !enabled[row]) continue;
    const int64_t column = ids[i - row * n_ids] - vocab_start;
    if (column >= 0 && column < vocab) logits[row * row_stride + column] = minus_infinity;
  }
}

}  // namespace

const char* ban_tokens_cuda(void* logits, int dtype, int64_t n_rows, int64_t row_stride,
                            int64_t vocab, const int64_t* ids, int64_t n_ids,
                            const uint8_t* enabled, int64_t vocab_start, void* stream) {
  const int64_t work = n_rows * n_ids;
  if (work <= 0) return nullptr;
  const int64_t wanted = (work + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < kMaximumBlocks ? wanted : kMaximumBlocks);
  auto* queue = static_cast<cudaStream_t>(stream);
  if (dtype == 0) {
    ban_tokens_kernel<uint32_t><<<blocks, kThreads, 0, queue>>>(
        static_cast<uint32_t*>(logits), 0xff800000u, n_rows, row_stride, vocab, ids, n_ids,
        enabled, vocab_start);
  } else {
    const uint16_t minus_infinity = dtype == 1 ? 0xff80 : 0xfc00;
    ban_tokens_kernel<uint16_t><<<blocks, kThreads, 0, queue>>>(
        static_cast<uint16_t*>(logits), minus_infinity, n_rows, row_stride, vocab, ids, n_ids,
        enabled, vocab_start);
  }
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace r1v3
