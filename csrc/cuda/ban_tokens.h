#pragma once

#include <cstdint>

namespace r1v3 {

// ban_tokens on device memory, enqueued on `stream` (a cudaStream_t; null is the default stream).
// Returns null, or CUDA's description of why the launch failed.
const char* ban_tokens_cuda(void* logits, int dtype, int64_t n_rows, int64_t row_stride,
                            int64_t vocab, const int64_t* ids, int64_t n_ids,
                            const uint8_t* enabled, int64_t vocab_start, void* stream);

}  // namespace r1v3
