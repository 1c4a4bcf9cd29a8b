// The policy loss of a block of tokens, in vectors of kWidth / 2 doubles, kWidth being the floats in
// a vector of the including file. No library templates here, see rows_impl.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "policy.h"

namespace r1v3 {
namespace {

constexpr int kTokens = kWidth / 2;
typedef double V __attribute__((vector_size(8 * kTokens)));
typedef int64_t M __attribute__((vector_size(8 * kTokens)));
typedef float V32 __attribute__((vector_size(4 * kTokens)));

constexpr double kMaximumLogRatio = 20.0;  // differences of log-probs are clamped to +-20

inline V select(M mask, V a, V b) { return mask ? a : b; }
inline V only(M mask, V a) { return mask ? a : V{}; }
inline V all(double value) { return value - V{}; }

// exp for |x| <= 20, relative error below 1e-11; NaN stays.
inline V exp_small(V x) {
  const V magic = all(0x1.8p52);  // adding it rounds to an integer, left in the low bits
  const V shifted = x * 1.4426950408889634 + magic;
  const V n = shifted - magic;
  const V r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  V p = all(1.0 / 362880);
  constexpr double kFactorials[] = {40320, 5040, 720, 120, 24, 6, 2, 1, 1};
  for (double factorial : kFactorials) p = p * r + 1.0 / factorial;
  const M exponent = ((M)shifted - (M)magic + 1023) << 52;
  return p * (V)exponent;
}

// Lane i is all ones where byte i of `bytes` is not 0.
inline M lanes_of(uint64_t bytes) {
  M lanes;
  for (int i = 0; i < kTokens; ++i) lanes[i] = 8 * i;
  return ((((int64_t)bytes - M{}) >> lanes) & 0xff) != 0;
}

struct TokenValues {
  M valid;
  V logprob = {}, old_logprob = {}, ref_logprob = {}, advantage = {}, weight = {};
};

inline V load_tokens(const float* values, int64_t n, M valid) {
  V32 x = {};
  if (n == kTokens) {
    memcpy(&x, values, sizeof x);  // one instruction
  } else {
    memcpy(&x, values, n * sizeof(float));
  }
  return only(valid, __builtin_convertvector(x, V));
}

inline V load_or_spread(const float* values, bool per_token, const PolicyBlock& block, int64_t t,
                        int64_t n, M valid) {
  return per_token ? load_tokens(values + t, n, valid) : only(valid, all(values[block.sequence]));
}

struct Difference {
  V value;
  M clamped;  // no gradient flows
};

inline Difference clamped_difference(V a, V b) {
  const V d = a - b, limit = all(kMaximumLogRatio);
  const M above = d > limit, below = d < -limit;
  return {select(above, limit, select(below, -limit, d)), above | below};
}

struct LaneSums {
  V loss, approx_kl, ref_kl, ratio, ratio_max;
  M clip_low, clip_high, dual_clip, tokens, nonfinite;  // negative counts
};

// The clipped surrogate: adds to `sums` and returns the derivative by the log-prob. Comparisons are
// written so that NaN takes the free branch and stays visible.
template <bool DualClip>
inline V surrogate(const TokenValues& token, const PolicyLossOptions& options, LaneSums& sums) {
  const Difference log_ratio = clamped_difference(token.logprob, token.old_logprob);
  const V ratio = exp_small(log_ratio.value), advantage = token.advantage, zero = {};
  const V low = all(1.0 - options.clip_low), high = all(1.0 + options.clip_high);
  const V free = ratio * advantage;
  const V within = select(ratio > high, high, select(ratio < low, low, ratio));
  const V clipped = within * advantage;
  const M flat = clipped < free;
  V loss = -select(flat, clipped, free);
  V slope = select(log_ratio.clamped | flat, zero, -free);
  if constexpr (DualClip) {
    const V bound = -options.dual_clip * advantage;
    const M dual = (advantage < zero) & (loss > bound);
    loss = select(dual, bound, loss);
    slope = select(dual, zero, slope);
    sums.dual_clip += dual;
  }
  sums.loss += only(token.valid, token.weight * loss);
  sums.clip_low += (advantage < zero) & (ratio < low);
  sums.clip_high += (advantage > zero) & (ratio > high);
  sums.approx_kl -= log_ratio.value;
  const V counted = only(token.valid, ratio);
  sums.ratio += counted;
  sums.ratio_max = select(counted > sums.ratio_max, counted, sums.ratio_max);
  return token.weight * slope;
}

// Estimates of KL(policy || reference) from one sample (J. Schulman, "Approximating KL Divergence").
inline V kl_penalty(const TokenValues& token, const PolicyLossOptions& options, LaneSums& sums) {
  const Difference d = clamped_difference(token.logprob, token.ref_logprob);
  V value = d.value, slope = all(1.0);
  if (options.kl == KL::kK2) {
    value = 0.5 * d.value * d.value;
    slope = d.value;
  } else if (options.kl == KL::kK3) {
    const V excess = exp_small(-d.value) - 1.0;
    value = excess + d.value;
    slope = -excess;
  }
  sums.ref_kl += value;
  if (options.kl_coef == 0.0) return V{};
  sums.loss += options.kl_coef * value;
  return select(d.clamped, V{}, options.kl_coef * slope);
}

template <bool DualClip, bool Reference>
inline V token_slopes(const PolicyLossInputs& in, const PolicyLossOptions& options,
                      const PolicyBlock& block, int64_t t, int64_t n, M valid, LaneSums& sums) {
  TokenValues token = {valid};
  token.logprob = load_tokens(in.logprobs + t, n, valid);
  token.old_logprob = in.old_logprobs ? load_tokens(in.old_logprobs + t, n, valid) : token.logprob;
  token.weight = only(valid, all(1.0));
  token.advantage = load_or_spread(in.advantages, in.advantage_is_per_token, block, t, n, valid);
  if (in.weights) {
    token.weight = load_or_spread(in.weights, in.weights_is_per_token, block, t, n, valid);
  }
  V slope = surrogate<DualClip>(token, options, sums);
  if constexpr (Reference) {
    token.ref_logprob = load_tokens(in.ref_logprobs + t, n, valid);
    slope += kl_penalty(token, options, sums);
  }
  // Sums of float32 values cannot overflow in double: not finite exactly where a term is not.
  const V total =
      token.logprob + token.old_logprob + token.ref_logprob + token.advantage + token.weight;
  sums.tokens += valid;
  sums.nonfinite += ~((total - total) == V{});
  return slope;
}

inline double lane_total(V value) {
  double result = 0.0;
  for (int i = 0; i < kTokens; ++i) result += value[i];
  return result;
}

inline double lane_count(M mask) {
  int64_t result = 0;
  for (int i = 0; i < kTokens; ++i) result -= mask[i];
  return static_cast<double>(result);
}

template <bool DualClip, bool Reference>
__attribute__((always_inline)) inline void add_tokens(
    const PolicyLossInputs& in, const PolicyLossOptions& options, const PolicyBlock& block,
    int64_t t, int64_t n, double coefficient, float* grad, LaneSums& sums) {
  uint64_t mask = 0;
  memcpy(&mask, in.mask + t, n);
  V32 slopes = {};
  if (mask != 0) {
    const M valid = lanes_of(mask);
    const V slope = token_slopes<DualClip, Reference>(in, options, block, t, n, valid, sums);
    slopes = __builtin_convertvector(only(valid, coefficient * slope), V32);
  }
  memcpy(grad + t, &slopes, n * sizeof(float));
}

template <bool DualClip, bool Reference>
void block_sums(const PolicyLossInputs& in, const PolicyLossOptions& options,
                const PolicyBlock& block, double coefficient, float* grad, PolicySums* out) {
  LaneSums sums = {};
  int64_t t = block.begin;
  for (; t + kTokens <= block.end; t += kTokens) {
    add_tokens<DualClip, Reference>(in, options, block, t, kTokens, coefficient, grad, sums);
  }
  if (t < block.end) {
    add_tokens<DualClip, Reference>(in, options, block, t, block.end - t, coefficient, grad, sums);
  }
  out->loss = lane_total(sums.loss);
  out->clip_low = lane_count(sums.clip_low);
  out->clip_high = lane_count(sums.clip_high);
  out->dual_clip = lane_count(sums.dual_clip);
  out->approx_kl = lane_total(sums.approx_kl);
  out->ref_kl = lane_total(sums.ref_kl);
  out->ratio = lane_total(sums.ratio);
  out->tokens = lane_count(sums.tokens);
  out->nonfinite = lane_count(sums.nonfinite);
  double top = 0.0;
  for (int i = 0; i < kTokens; ++i) top = sums.ratio_max[i] > top ? sums.ratio_max[i] : top;
  // A sum of ratios is NaN where one is; a maximum that hides it would look healthy.
  out->ratio_max = out->ratio == out->ratio ? top : out->ratio;
}

void policy_block(const PolicyLossInputs& in, const PolicyLossOptions& options,
                  const PolicyBlock& block, double coefficient, float* grad, PolicySums* out) {
  const bool dual_clip = options.dual_clip > 0.0, reference = in.ref_logprobs != nullptr;
  const auto sums = dual_clip ? (reference ? block_sums<true, true> : block_sums<true, false>)
                              : (reference ? block_sums<false, true> : block_sums<false, false>);
  sums(in, options, block, coefficient, grad, out);
}

}  // namespace
}  // namespace r1v3
