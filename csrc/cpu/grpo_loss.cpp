#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace r1v3 {
namespace {

constexpr int64_t kBlock = 4096;   // tokens; sums are taken per block, in block order
constexpr int64_t kTokenCost = 16;  // a token costs about as much as this many logits

void add(const GrpoSums& block, double coefficient, GrpoSums& sums) {
  sums.loss += coefficient * block.loss;
  sums.clip_low += block.clip_low;
  sums.clip_high += block.clip_high;
  sums.dual_clip += block.dual_clip;
  sums.approx_kl += block.approx_kl;
  sums.ref_kl += block.ref_kl;
  sums.ratio += block.ratio;
  // NaN stays: a maximum that hides it would look healthy.
  if (!std::isnan(sums.ratio_max) && !(block.ratio_max <= sums.ratio_max)) {
    sums.ratio_max = block.ratio_max;
  }
  sums.tokens += block.tokens;
  sums.nonfinite += block.nonfinite;
}

std::vector<GrpoBlock> make_blocks(const GrpoInputs& in) {
  std::vector<GrpoBlock> blocks;
  for (int64_t s = 0; s < in.n_seqs; ++s) {
    for (int64_t begin = in.seq_offsets[s]; begin < in.seq_offsets[s + 1]; begin += kBlock) {
      blocks.push_back({s, begin, std::min(begin + kBlock, in.seq_offsets[s + 1])});
    }
  }
  return blocks;
}

// Bytes that are not 0, counted in lanes of bytes for the compiler's vectors.
int64_t count_valid(const uint8_t* mask, int64_t n) {
  constexpr int64_t kLanes = 32, kMost = 255;  // what a lane can count
  int64_t total = 0, i = 0;
  while (i + kLanes <= n) {
    uint8_t lanes[kLanes] = {};
    const int64_t end = i + std::min(kMost, (n - i) / kLanes) * kLanes;
    for (; i < end; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += mask[i + k] != 0;
    }
    for (uint8_t lane : lanes) total += lane;
  }
  for (; i < n; ++i) total += mask[i] != 0;
  return total;
}

// What one token of each sequence counts in the loss.
std::vector<double> sequence_coefficients(const GrpoInputs& in,
                                          const GrpoOptions& options) {
  std::vector<double> coefficients(in.n_seqs, 0.0);
  std::vector<int64_t> lengths(in.n_seqs, 0);
  int64_t tokens = 0, sequences = 0;
  for (int64_t s = 0; s < in.n_seqs; ++s) {
    const int64_t begin = in.seq_offsets[s];
    lengths[s] = count_valid(in.mask + begin, in.seq_offsets[s + 1] - begin);
    tokens += lengths[s];
    sequences += lengths[s] > 0 ? 1 : 0;
  }
  double normalizer = options.aggregation == Aggregation::kNone ? 1.0 : in.normalizer;
  if (normalizer <= 0.0) {
    normalizer = static_cast<double>(options.aggregation == Aggregation::kTokenMean ? tokens
                                                                                    : sequences);
  }
  for (int64_t s = 0; s < in.n_seqs; ++s) {
    if (lengths[s] == 0) continue;
    const double own = options.aggregation == Aggregation::kSequenceMean
                           ? static_cast<double>(lengths[s])
                           : 1.0;
    coefficients[s] = 1.0 / (own * normalizer);
  }
  return coefficients;
}

}  // namespace

void grpo_loss(const Kernels& kernels, const GrpoInputs& inputs,
               const GrpoOptions& options, int num_threads, float* loss, float* grad,
               float* metrics) {
  const std::vector<GrpoBlock> blocks = make_blocks(inputs);
  const std::vector<double> coefficients = sequence_coefficients(inputs, options);
  std::vector<GrpoSums> partial(blocks.size());
  const int64_t tokens = inputs.seq_offsets[inputs.n_seqs];
  std::fill(grad + tokens, grad + inputs.n_tokens, 0.0f);
  float* losses = options.aggregation == Aggregation::kNone ? loss : nullptr;
  if (losses) std::fill(losses + tokens, losses + inputs.n_tokens, 0.0f);
  const int64_t n_blocks = static_cast<int64_t>(blocks.size());
  const int64_t cost = n_blocks > 0 ? kTokenCost * tokens / n_blocks : 0;
  parallel_for(n_blocks, cost, num_threads, [&](int64_t b) {
    kernels.grpo_block(inputs, options, blocks[b], coefficients[blocks[b].sequence], losses,
                       grad, &partial[b]);
  });
  GrpoSums sums = {};
  for (int64_t b = 0; b < n_blocks; ++b) add(partial[b], coefficients[blocks[b].sequence], sums);
  const double count = std::max(sums.tokens, 1.0);
  const double values[kGrpoMetrics] = {
      sums.clip_low / count, sums.clip_high / count, sums.dual_clip / count,
      sums.approx_kl / count, sums.ref_kl / count,   sums.ratio / count,
      sums.ratio_max,        sums.tokens,            sums.nonfinite};
  if (!losses) loss[0] = static_cast<float>(sums.loss);
  for (int i = 0; i < kGrpoMetrics; ++i) metrics[i] = static_cast<float>(values[i]);
}

}  // namespace r1v3
