// The GRPO loss of a block of tokens, in the vectors F of kWidth floats of the including
// file. No library templates here, see rows_impl.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "grpo.h"
#include "grpo_numbers.h"

#include "../grpo_terms.h"  // of these numbers, which are declared before

namespace r1v3 {
namespace {

// Vectors whose float32 sums are taken before they are added to the block's in double.
constexpr int64_t kRun = 32;

inline F load_floats(const float* values, int64_t n) {
  F x = {};
  if (n == kWidth) {
    memcpy(&x, values, sizeof x);  // one instruction
  } else {
    memcpy(&x, values, n * sizeof(float));
  }
  return x;
}

// One value per token, or the same for all tokens of a sequence.
struct TokenValues {
  const float* each;  // null: `shared`
  F shared;

  F load_at(int64_t t, int64_t n, Lanes valid) const {
    return only(valid, each ? load_floats(each + t, n) : shared);
  }
};

inline TokenValues token_values(const float* values, bool per_token, int64_t sequence) {
  if (values && per_token) return {values, F{}};
  return {nullptr, broadcast(values ? values[sequence] : 1.0f)};
}

// The block's inputs and options in the form that the loop over its tokens wants.
struct Terms {
  const float *logprobs, *old_logprobs, *ref_logprobs;
  TokenValues advantages, weights;
  F low, high, dual_clip, kl_coef, coefficient;
  KL kl;
  bool penalized;  // kl_coef is not 0
};

struct Difference {
  F value;
  Lanes clamped;   // no gradient flows
  F infinity;  // 0, or NaN where the difference was not finite
};

// a - b of the valid tokens.
inline Difference clamped_difference(F a, F b, Lanes valid) {
  const F d = only(valid, a - b), limit = broadcast(kMaximumLogRatio);
  const Lanes above = d > limit, below = d < -limit;
  return {choose(above, limit, choose(below, -limit, d)), above | below, d * 0.0f};
}

struct LaneSums {
  F loss, approx_kl, ref_kl, ratio;
  F ratio_max;
  Lanes clip_low, clip_high, dual_clip, tokens, nonfinite;  // negative counts
};

// Adds to `sums` and returns the derivative of the policy term by the log-prob.
template <Policy kPolicy>
inline F surrogate(const Terms& terms, F logprob, const Difference& log_ratio, F ratio,
                   F advantage, F weight, Lanes valid, LaneSums& sums) {
  const auto term =
      policy_term(kPolicy, only(valid, logprob), ratio, log_ratio.clamped, advantage, terms.low,
                  terms.high, terms.dual_clip);
  sums.clip_low += term.clip_low;
  sums.clip_high += term.clip_high;
  sums.dual_clip += term.dual_clip;
  sums.loss += weight * term.loss;
  sums.approx_kl -= log_ratio.value;
  const F counted = only(valid, ratio);
  sums.ratio += counted;
  sums.ratio_max = choose(counted > sums.ratio_max, counted, sums.ratio_max);
  return weight * term.slope;
}

enum class Penalty { kNone, kPlain, kUnbiased };

// Adds to `sums` and returns the derivative of the penalty by the log-prob.
template <Penalty kPenalty>
inline F kl_penalty(const Terms& terms, const Difference& d, const Difference& log_ratio, F ratio,
                    LaneSums& sums) {
  auto term = kl_term(terms.kl, d.value);
  if constexpr (kPenalty == Penalty::kUnbiased) {
    term.slope = choose(d.clamped, F{}, term.slope);
    term = times_ratio(term, ratio, log_ratio.clamped);
  }
  sums.ref_kl += term.value;
  if (!terms.penalized) return F{};
  sums.loss += terms.kl_coef * term.value;
  if constexpr (kPenalty == Penalty::kUnbiased) return terms.kl_coef * term.slope;
  return choose(d.clamped, F{}, terms.kl_coef * term.slope);
}

template <Policy kPolicy, Penalty kPenalty>
inline F token_slopes(const Terms& terms, int64_t t, int64_t n, Lanes valid, LaneSums& sums) {
  const F logprob = load_floats(terms.logprobs + t, n);
  const F old = terms.old_logprobs ? load_floats(terms.old_logprobs + t, n) : logprob;
  const Difference log_ratio = clamped_difference(logprob, old, valid);
  const F advantage = terms.advantages.load_at(t, n, valid);
  const F weight = terms.weights.load_at(t, n, valid);
  F infinities = log_ratio.infinity + advantage * 0.0f + weight * 0.0f;
  const F ratio = exponential(log_ratio.value).value;
  F slope = surrogate<kPolicy>(terms, logprob, log_ratio, ratio, advantage, weight, valid, sums);
  if constexpr (kPenalty != Penalty::kNone) {
    const F reference = load_floats(terms.ref_logprobs + t, n);
    const Difference d = clamped_difference(logprob, reference, valid);
    infinities += d.infinity;
    slope += kl_penalty<kPenalty>(terms, d, log_ratio, ratio, sums);
  }
  sums.tokens += valid;
  sums.nonfinite += ~(infinities == F{});
  return slope;
}

inline double lane_count(Lanes mask) {
  int64_t result = 0;
  for (int i = 0; i < kWidth; ++i) result -= mask[i];
  return static_cast<double>(result);
}

inline Lanes load_mask(const uint8_t* mask, int64_t n) {
  Bytes bytes = {};
  if (n == kWidth) {
    memcpy(&bytes, mask, sizeof bytes);
  } else {
    memcpy(&bytes, mask, n);
  }
  // In two steps: GCC converts bytes to 32 bits one by one.
  const Halves halves = __builtin_convertvector(bytes, Halves);
  return __builtin_convertvector(halves, Lanes) != 0;
}

template <Policy kPolicy, Penalty kPenalty>
__attribute__((always_inline)) inline void add_tokens(const Terms& terms, const uint8_t* mask,
                                                      int64_t t, int64_t n, float* grad,
                                                      LaneSums& sums) {
  const Lanes valid = load_mask(mask + t, n);
  const F slope = token_slopes<kPolicy, kPenalty>(terms, t, n, valid, sums);
  const F slopes = only(valid, terms.coefficient * slope);
  memcpy(grad + t, &slopes, n * sizeof(float));
}

inline void add_run(LaneSums& sums, GrpoSums* out) {
  out->loss += lane_sum(sums.loss);
  out->approx_kl += lane_sum(sums.approx_kl);
  out->ref_kl += lane_sum(sums.ref_kl);
  out->ratio += lane_sum(sums.ratio);
  sums.loss = sums.approx_kl = sums.ref_kl = sums.ratio = F{};
}

template <Policy kPolicy, Penalty kPenalty>
void block_sums(const Terms& given, const uint8_t* mask, const GrpoBlock& block, float* grad,
                GrpoSums* out) {
  const Terms terms = given;  // nothing else points to it, so it can stay in registers
  LaneSums sums = {};
  *out = {};
  int64_t t = block.begin;
  while (t + kWidth <= block.end) {
    const int64_t vectors = (block.end - t) / kWidth;
    const int64_t stop = t + (vectors < kRun ? vectors : kRun) * kWidth;
    for (; t < stop; t += kWidth) {
      add_tokens<kPolicy, kPenalty>(terms, mask, t, kWidth, grad, sums);
    }
    add_run(sums, out);
  }
  if (t < block.end) {
    add_tokens<kPolicy, kPenalty>(terms, mask, t, block.end - t, grad, sums);
    add_run(sums, out);
  }
  out->clip_low = lane_count(sums.clip_low);
  out->clip_high = lane_count(sums.clip_high);
  out->dual_clip = lane_count(sums.dual_clip);
  out->tokens = lane_count(sums.tokens);
  out->nonfinite = lane_count(sums.nonfinite);
  double top = 0.0;
  for (int i = 0; i < kWidth; ++i) top = sums.ratio_max[i] > top ? sums.ratio_max[i] : top;
  // A sum of ratios is NaN where one is; a maximum that hides it would look healthy.
  out->ratio_max = out->ratio == out->ratio ? top : out->ratio;
}

// The losses of the block's tokens, 0 where the mask is.
template <Policy kPolicy, Penalty kPenalty>
void token_losses(const Terms& terms, const uint8_t* mask, const GrpoBlock& block, float* losses) {
  for (int64_t t = block.begin; t < block.end; t += kWidth) {
    const int64_t n = block.end - t < kWidth ? block.end - t : kWidth;
    const Lanes valid = load_mask(mask + t, n);
    LaneSums one = {};
    token_slopes<kPolicy, kPenalty>(terms, t, n, valid, one);
    const F loss = only(valid, one.loss);
    memcpy(losses + t, &loss, n * sizeof(float));
  }
}

template <Policy kPolicy, Penalty kPenalty>
void block_results(const Terms& terms, const uint8_t* mask, const GrpoBlock& block, float* losses,
                   float* grad, GrpoSums* out) {
  block_sums<kPolicy, kPenalty>(terms, mask, block, grad, out);
  if (losses) token_losses<kPolicy, kPenalty>(terms, mask, block, losses);
}

template <Policy kPolicy>
auto results_of(Penalty penalty) {
  return penalty == Penalty::kUnbiased ? block_results<kPolicy, Penalty::kUnbiased>
         : penalty == Penalty::kPlain  ? block_results<kPolicy, Penalty::kPlain>
                                       : block_results<kPolicy, Penalty::kNone>;
}

void grpo_block(const GrpoInputs& in, const GrpoOptions& options,
                  const GrpoBlock& block, double coefficient, float* losses, float* grad,
                  GrpoSums* out) {
  const Terms terms = {
      in.logprobs,
      in.old_logprobs,
      in.ref_logprobs,
      token_values(in.advantages, in.advantage_is_per_token, block.sequence),
      token_values(in.weights, in.weights_is_per_token, block.sequence),
      broadcast(static_cast<float>(1.0 - options.clip_low)),
      broadcast(static_cast<float>(1.0 + options.clip_high)),
      broadcast(static_cast<float>(options.dual_clip)),
      broadcast(static_cast<float>(options.kl_coef)),
      broadcast(static_cast<float>(coefficient)),
      options.kl,
      options.kl_coef != 0.0,
  };
  const Penalty penalty = !in.ref_logprobs        ? Penalty::kNone
                          : options.unbiased_kl ? Penalty::kUnbiased
                                                : Penalty::kPlain;
  const Policy policy = policy_of(options);
  const auto results = policy == Policy::kCispo         ? results_of<Policy::kCispo>(penalty)
                       : policy == Policy::kDualClipped ? results_of<Policy::kDualClipped>(penalty)
                                                        : results_of<Policy::kClipped>(penalty);
  results(terms, in.mask, block, losses, grad, out);
}

}  // namespace
}  // namespace r1v3
