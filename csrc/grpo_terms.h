// The terms of a token's GRPO loss and their derivatives by its log-probability: for the CPU kernels,
// where a number F is a vector of floats, and the CUDA kernel, where it is one float. A loss option
// is a case here and a number in grpo_options.h.
//
// choose(mask, a, b) and exponential(x) for the includer's F are declared before this is included.
#pragma once

#include "grpo_options.h"

namespace r1v3 {
namespace {

template <typename F, typename Mask>
struct PolicyTerm {
  F loss, slope;
  Mask clip_low, clip_high, dual_clip;  // which clip acts
};

// The policy term, see grpo_loss.py, between ratios of low and high. Where the log-ratio was
// clamped no gradient flows. Comparisons are written so that NaN takes the free branch and stays.
template <typename F, typename Mask>
R1V3_BOTH PolicyTerm<F, Mask> policy_term(Policy policy, F logprob, F ratio, Mask clamped,
                                          F advantage, F low, F high, F dual_clip) {
  const Mask below = ratio < low, above = ratio > high;
  const F clipped = choose(above, high, choose(below, low, ratio)) * advantage;
  if (policy == Policy::kCispo) return {-clipped * logprob, -clipped, below, above, Mask{}};
  const F free = ratio * advantage, zero = {};
  const Mask negative = advantage < zero, flat = clipped < free;
  PolicyTerm<F, Mask> term = {-choose(flat, clipped, free), choose(clamped | flat, zero, -free),
                              Mask{}, Mask{}, Mask{}};
  term.clip_low = negative & below;
  term.clip_high = (advantage > zero) & above;
  if (policy == Policy::kDualClipped) {
    const F bound = -dual_clip * advantage;
    term.dual_clip = negative & (term.loss > bound);
    term.loss = choose(term.dual_clip, bound, term.loss);
    term.slope = choose(term.dual_clip, zero, term.slope);
  }
  return term;
}

template <typename F>
struct KLTerm {
  F value, slope;
};

// Estimates of KL(policy || reference) from d = logprob - ref_logprob (J. Schulman, "Approximating
// KL Divergence").
template <typename F>
R1V3_BOTH KLTerm<F> kl_term(KL kl, F d) {
  if (kl == KL::kK1) return {d, F{} + 1.0f};
  if (kl == KL::kK2) return {0.5f * d * d, d};
  const auto inverse = exponential(-d);
  return {inverse.beyond, -inverse.excess};
}

// The estimate times the ratio of the policy to the one that sampled, with the gradient through both
// (DeepSeek-V3.2). Where the ratio was clamped it is a constant.
template <typename F, typename Mask>
R1V3_BOTH KLTerm<F> times_ratio(const KLTerm<F>& term, F ratio, Mask clamped) {
  const F zero = {};
  return {ratio * term.value, ratio * (term.slope + choose(clamped, zero, term.value))};
}

}  // namespace
}  // namespace r1v3
