#pragma once

#include <cstdint>

#include "../grpo_options.h"

namespace r1v3 {

// Rows of a [outer, inner, width] tensor; strides in elements. Row r starts at
// (r / inner) * stride_outer + (r % inner) * stride_inner.
struct RowLayout {
  void* data;
  int64_t inner, stride_outer, stride_inner;
};

// Device memory of n tokens; null means absent for old_logprobs, weights, ref_logprobs and
// temperatures, which else take the place of the one temperature.
// `loss_scale` is what each token's loss is multiplied with in the total, 0 for tokens that do not count.
struct GrpoTokens {
  const int64_t* labels;
  const float *loss_scale, *old_logprobs, *advantages, *weights, *ref_logprobs;
  const double* temperatures;
};

// Blocks per cluster with which the current device can keep a row of `vocab` logits of this dtype
// (0 float32, 1 bfloat16) in shared memory, and 0 where it cannot: an architecture
// before sm_90, a row that is too long, or no driver. To be asked before the first launch on a
// device, which it prepares.
int logits_grpo_loss_cluster(int dtype, int64_t vocab);

// Log-probability [n], entropy [n] and the gradient of the loss with respect to the logits from one
// read of each logit and one write of each gradient, on `stream`. `gradient` may be the logits, or
// its data null for no gradient, with the same bits in the rest; columns from `vocab` to `width`
// get 0. `blocks` is what logits_grpo_loss_cluster said. Returns
// null, or why nothing was launched.
const char* logits_grpo_loss_cuda(const RowLayout& logits, const RowLayout& gradient, int dtype,
                                  int64_t n_rows, int64_t width, int64_t vocab,
                                  const GrpoTokens& tokens, double temperature,
                                  const GrpoOptions& options, float* logprobs, float* entropy,
                                  int blocks, void* stream);

}  // namespace r1v3
