#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace r1v3 {
namespace {

constexpr int64_t kBlock = 4096;           // tokens; sums are taken per block, in block order
constexpr int64_t kTokenCost = 16;         // a token costs about as much as this many logits
constexpr double kMaximumLogRatio = 20.0;  // differences of log-probs are clamped to +-20

struct Block {
  int64_t sequence, begin, end;
};

struct Sums {
  double loss = 0.0, clip_low = 0.0, clip_high = 0.0, dual_clip = 0.0;
  double approx_kl = 0.0, ref_kl = 0.0, ratio = 0.0, ratio_max = 0.0, tokens = 0.0, nonfinite = 0.0;

  // NaN stays: a maximum that hides it would look healthy.
  void raise_ratio_max(double value) {
    if (!std::isnan(ratio_max) && !(value <= ratio_max)) ratio_max = value;
  }

  void add(const Sums& other, double coefficient) {
    loss += coefficient * other.loss;
    clip_low += other.clip_low;
    clip_high += other.clip_high;
    dual_clip += other.dual_clip;
    approx_kl += other.approx_kl;
    ref_kl += other.ref_kl;
    ratio += other.ratio;
    raise_ratio_max(other.ratio_max);
    tokens += other.tokens;
    nonfinite += other.nonfinite;
  }
};

struct Difference {
  double value;
  bool clamped;  // no gradient flows
};

Difference clamped_difference(double a, double b) {
  const double d = a - b;
  if (d > kMaximumLogRatio) return {kMaximumLogRatio, true};
  if (d < -kMaximumLogRatio) return {-kMaximumLogRatio, true};
  return {d, false};
}

// Adds the clipped surrogate of one token to `sums`; returns its derivative by the log-prob.
double surrogate(double logprob, double old_logprob, double advantage, double weight,
                 const PolicyLossOptions& options, Sums& sums) {
  const Difference log_ratio = clamped_difference(logprob, old_logprob);
  const double ratio = std::exp(log_ratio.value);
  const double low = 1.0 - options.clip_low, high = 1.0 + options.clip_high;
  const double free = ratio * advantage;
  const double clipped = std::min(std::max(ratio, low), high) * advantage;
  double loss = -free;
  // Comparisons are written so that NaN takes the free branch and stays visible.
  double slope = log_ratio.clamped ? 0.0 : -free;
  if (clipped < free) {
    loss = -clipped;
    slope = 0.0;
  }
  if (options.dual_clip > 0.0 && advantage < 0.0 && loss > -options.dual_clip * advantage) {
    loss = -options.dual_clip * advantage;
    slope = 0.0;
    sums.dual_clip += 1.0;
  }
  sums.loss += weight * loss;
  sums.clip_low += advantage < 0.0 && ratio < low ? 1.0 : 0.0;
  sums.clip_high += advantage > 0.0 && ratio > high ? 1.0 : 0.0;
  sums.approx_kl -= log_ratio.value;
  sums.ratio += ratio;
  sums.raise_ratio_max(ratio);
  return weight * slope;
}

struct Penalty {
  double value;
  double slope;
};

// Estimates of KL(policy || reference) from one sample (J. Schulman, "Approximating KL Divergence").
Penalty kl_penalty(double logprob, double ref_logprob, KL kl) {
  const Difference d = clamped_difference(logprob, ref_logprob);
  const double pass = d.clamped ? 0.0 : 1.0;
  if (kl == KL::kK1) return {d.value, pass};
  if (kl == KL::kK2) return {0.5 * d.value * d.value, pass * d.value};
  return {std::expm1(-d.value) + d.value, -pass * std::expm1(-d.value)};
}

Sums block_sums(const PolicyLossInputs& in, const PolicyLossOptions& options, const Block& block,
                double coefficient, float* grad) {
  Sums sums;
  for (int64_t t = block.begin; t < block.end; ++t) {
    if (!in.mask[t]) {
      grad[t] = 0.0f;
      continue;
    }
    const double logprob = in.logprobs[t];
    const double old_logprob = in.old_logprobs ? in.old_logprobs[t] : in.logprobs[t];
    const double advantage = in.advantages[in.advantage_is_per_token ? t : block.sequence];
    double weight = 1.0;
    if (in.weights) weight = in.weights[in.weights_is_per_token ? t : block.sequence];
    double slope = surrogate(logprob, old_logprob, advantage, weight, options, sums);
    bool finite = std::isfinite(logprob) && std::isfinite(old_logprob) &&
                  std::isfinite(advantage) && std::isfinite(weight);
    if (in.ref_logprobs) {
      finite = finite && std::isfinite(in.ref_logprobs[t]);
      const Penalty penalty = kl_penalty(logprob, in.ref_logprobs[t], options.kl);
      sums.ref_kl += penalty.value;
      if (options.kl_coef != 0.0) {
        sums.loss += options.kl_coef * penalty.value;
        slope += options.kl_coef * penalty.slope;
      }
    }
    sums.tokens += 1.0;
    sums.nonfinite += finite ? 0.0 : 1.0;
    grad[t] = static_cast<float>(coefficient * slope);
  }
  return sums;
}

std::vector<Block> make_blocks(const PolicyLossInputs& in) {
  std::vector<Block> blocks;
  for (int64_t s = 0; s < in.n_seqs; ++s) {
    for (int64_t begin = in.seq_offsets[s]; begin < in.seq_offsets[s + 1]; begin += kBlock) {
      blocks.push_back({s, begin, std::min(begin + kBlock, in.seq_offsets[s + 1])});
    }
  }
  return blocks;
}

// What one token of each sequence counts in the loss.
std::vector<double> sequence_coefficients(const PolicyLossInputs& in,
                                          const PolicyLossOptions& options) {
  std::vector<double> coefficients(in.n_seqs, 0.0);
  std::vector<int64_t> lengths(in.n_seqs, 0);
  int64_t tokens = 0, sequences = 0;
  for (int64_t s = 0; s < in.n_seqs; ++s) {
    for (int64_t t = in.seq_offsets[s]; t < in.seq_offsets[s + 1]; ++t) {
      lengths[s] += in.mask[t] ? 1 : 0;
    }
    tokens += lengths[s];
    sequences += lengths[s] > 0 ? 1 : 0;
  }
  double normalizer = options.normalizer;
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

void grpo_loss(const PolicyLossInputs& inputs, const PolicyLossOptions& options, float* loss,
               float* grad, float* metrics) {
  const std::vector<Block> blocks = make_blocks(inputs);
  const std::vector<double> coefficients = sequence_coefficients(inputs, options);
  std::vector<Sums> partial(blocks.size());
  const int64_t tokens = inputs.n_seqs > 0 ? inputs.seq_offsets[inputs.n_seqs] : 0;
  const int64_t n_blocks = static_cast<int64_t>(blocks.size());
  const int64_t cost = n_blocks > 0 ? kTokenCost * tokens / n_blocks : 0;
  parallel_for(n_blocks, cost, options.num_threads, [&](int64_t b) {
    partial[b] = block_sums(inputs, options, blocks[b], coefficients[blocks[b].sequence], grad);
  });
  Sums sums;
  for (int64_t b = 0; b < n_blocks; ++b) sums.add(partial[b], coefficients[blocks[b].sequence]);
  const double count = std::max(sums.tokens, 1.0);
  const double values[kPolicyLossMetrics] = {
      sums.clip_low / count, sums.clip_high / count, sums.dual_clip / count,
      sums.approx_kl / count, sums.ref_kl / count,   sums.ratio / count,
      sums.ratio_max,        sums.tokens,            sums.nonfinite};
  loss[0] = static_cast<float>(sums.loss);
  for (int i = 0; i < kPolicyLossMetrics; ++i) metrics[i] = static_cast<float>(values[i]);
}

}  // namespace r1v3
