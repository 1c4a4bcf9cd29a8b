#include <cmath>
#include <cstdint>

#include "ops.h"
#include "parallel.h"

namespace r1v3 {
namespace {

int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

}  // namespace

void logprobs_and_entropy_forward(const RowKernels& kernels, const void* logits,
                                  const LogitsView& view, float* stats) {
  const int64_t row_bytes = view.row_stride * element_size(view.dtype);
  const auto* base = static_cast<const char*>(logits);
  parallel_for(view.n_rows, view.vocab, view.num_threads, [&](int64_t i) {
    const int64_t row = view.rows ? view.rows[i] : i;
    const int64_t target = view.token_ids ? view.token_ids[i] : -1;
    kernels.forward(base + row * row_bytes, view.dtype, view.vocab, target, view.temperature,
                    stats + 4 * i);
  });
}

void logprobs_and_entropy_backward(const RowKernels& kernels, const void* logits,
                                   const LogitsView& view, const BackwardInputs& inputs,
                                   void* grad_logits, int64_t grad_row_stride) {
  if (view.vocab == 0) return;
  const int64_t row_bytes = view.row_stride * element_size(view.dtype);
  const int64_t grad_row_bytes = grad_row_stride * element_size(view.dtype);
  const auto* base = static_cast<const char*>(logits);
  auto* grad_base = static_cast<char*>(grad_logits);
  parallel_for(view.n_rows, view.vocab, view.num_threads, [&](int64_t i) {
    const int64_t row = view.rows ? view.rows[i] : i;
    const int64_t target = view.token_ids ? view.token_ids[i] : -1;
    const RowGradient upstream = {inputs.lse[i], inputs.log_s ? inputs.log_s[i] : 0.0f,
                                  inputs.entropy[i],
                                  inputs.grad_logprobs ? inputs.grad_logprobs[i] : 0.0f,
                                  inputs.grad_entropy ? inputs.grad_entropy[i] : 0.0f};
    kernels.backward(base + row * row_bytes, view.dtype, view.vocab, target, view.temperature,
                     upstream, grad_base + row * grad_row_bytes);
  });
}

void ban_tokens(void* logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                const int64_t* ids, int64_t n_ids, const uint8_t* enabled, int64_t vocab_start) {
  const uint16_t half_infinity = dtype == kBFloat16 ? 0xff80 : 0xfc00;
  for (int64_t row = 0; row < n_rows; ++row) {
    if (enabled && !enabled[row]) continue;
    for (int64_t k = 0; k < n_ids; ++k) {
      const int64_t column = ids[k] - vocab_start;
      if (column < 0 || column >= vocab) continue;
      const int64_t place = row * row_stride + column;
      if (dtype == kFloat32) {
        static_cast<float*>(logits)[place] = -INFINITY;
      } else {
        static_cast<uint16_t*>(logits)[place] = half_infinity;
      }
    }
  }
}

}  // namespace r1v3
