// One row of logits -> log-probability, entropy, and the gradient of its GRPO loss.
//
// The arithmetic and the index arithmetic of logits_grpo_loss.cu, without anything that only a GPU
// has, so that a host compiler can run it: tests/kernels/emulate_grpo_row.cpp replaces threads,
// shared and distributed shared memory by loops and compares with float64.
//
// A row of T starts at any multiple of sizeof(T). Elements before the first 16-byte boundary (the
// head) and after the last one (the tail) are fewer than 16 bytes each: one thread keeps one of
// them in a register. The 16-byte vectors in between are cut into one contiguous slice per block
// of the cluster; a thread owns every kThreads-th vector of its block's slice, start to end, so
// that it alone reads what it loaded.
#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"

#include "../grpo_terms.h"  // of these numbers

namespace r1v3::grpo {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Loads in flight are waited for in this many groups, so that sums start before the row is here.
constexpr int kGroups = 4;
constexpr float kLowest = -3.4028234e38f;
// exp2 of this is 0, and 0 times it is 0: what -inf becomes, so that 0 * -inf never appears.
constexpr float kFloor = -1.0e4f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int64_t kIgnored = -100;

// ---- who owns what -------------------------------------------------------------------------

struct Split {
  int64_t head;        // elements before the first boundary: thread i of the first block has i
  int64_t vectors;     // whole 16-byte vectors
  int64_t per_block;   // vectors in every slice but the last ones
  int64_t tail;        // elements after the last vector: thread i of the last block has i
};

template <typename T>
R1V3_BOTH Split split_row(uintptr_t address, int64_t vocab, int blocks) {
  const int64_t past = static_cast<int64_t>(address % kVectorBytes / sizeof(T));
  int64_t head = past == 0 ? 0 : kLanes<T> - past;
  head = head < vocab ? head : vocab;
  const int64_t vectors = (vocab - head) / kLanes<T>;
  return {head, vectors, (vectors + blocks - 1) / blocks, vocab - head - vectors * kLanes<T>};
}

// The part of one block of the cluster.
struct Slice {
  int64_t column;   // of its first vector
  int count;        // of its vectors
  int steps;        // vectors of the busiest thread
  int64_t loose;    // column of the one loose element that this thread has, or -1
  int token_vector; // index of the vector with the label, -1 if it is not here
  int token_lane;
  bool loose_token; // the label is the loose element of this thread
};

template <typename T>
R1V3_BOTH Slice slice_of(const Split& split, int64_t token, int rank, int blocks, int thread) {
  Slice slice;
  const int64_t begin = rank * split.per_block;
  const int64_t first = begin < split.vectors ? begin : split.vectors;
  const int64_t rest = split.vectors - first;
  slice.column = split.head + first * kLanes<T>;
  slice.count = static_cast<int>(rest < split.per_block ? rest : split.per_block);
  slice.steps = (slice.count + kThreads - 1) / kThreads;
  slice.loose = -1;
  if (rank == 0 && thread < split.head) {
    slice.loose = thread;
  } else if (rank == blocks - 1 && thread >= kLanes<T> && thread - kLanes<T> < split.tail) {
    // Past the head's threads: with one block both ends are here.
    slice.loose = split.head + split.vectors * kLanes<T> + thread - kLanes<T>;
  }
  slice.loose_token = slice.loose >= 0 && slice.loose == token;
  const int64_t inside = token - slice.column;
  const bool here = inside >= 0 && inside < static_cast<int64_t>(slice.count) * kLanes<T>;
  slice.token_vector = here ? static_cast<int>(inside / kLanes<T>) : -1;
  slice.token_lane = here ? static_cast<int>(inside % kLanes<T>) : 0;
  return slice;
}

// First step of a group of loads; group kGroups is the end.
R1V3_BOTH int group_begin(int steps, int group) { return steps * group / kGroups; }

// ---- softmax statistics --------------------------------------------------------------------

// m = max x, s = sum 2^d, w = sum d 2^d with d = (x - m) * scale in units of log 2, scale =
// log2(e) / temperature; t is the label's logit where it is, 0 elsewhere.
struct State { float m, s, w, t; };

R1V3_BOTH State empty_state() { return {kLowest, 0.0f, 0.0f, 0.0f}; }

template <int kCount>
R1V3_BOTH void accumulate(State& state, const float (&x)[kCount], float scale) {
  float top = state.m;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = max_number(top, x[i]);
  const float gap = max_nan((state.m - top) * scale, kFloor);
  const float shrink = exp2_fast(gap);
  state.w = shrink * (state.w + gap * state.s);
  state.s *= shrink;
  state.m = top;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float d = max_nan((x[i] - top) * scale, kFloor);
    const float e = exp2_fast(d);
    state.s += e;
    state.w += e * d;
  }
}

R1V3_BOTH State merge(const State& a, const State& b, float scale) {
  const float top = max_number(a.m, b.m);
  const float gap_a = max_nan((a.m - top) * scale, kFloor);
  const float gap_b = max_nan((b.m - top) * scale, kFloor);
  const float shrink_a = exp2_fast(gap_a), shrink_b = exp2_fast(gap_b);
  return {top, shrink_a * a.s + shrink_b * b.s,
          shrink_a * (a.w + gap_a * a.s) + shrink_b * (b.w + gap_b * b.s), a.t + b.t};
}

// log2(e) / temperature: the largest number at 0, which sends every distance but 0 below kFloor, and
// NaN for what is no temperature.
R1V3_BOTH float scale_of(float temperature) {
  if (!(temperature >= 0.0f && temperature < INFINITY)) return NAN;
  return fminf(kLog2E / fabsf(temperature), -kLowest);
}

// ---- the loss of one token -----------------------------------------------------------------

// Of GrpoOptions, what a token's loss depends on.
struct TokenOptions {
  Policy policy;
  float clip_low, clip_high, dual_clip, kl_coef;
  KL kl;
  bool unbiased_kl;
};

inline TokenOptions single_precision(const GrpoOptions& options) {
  const auto narrow = [](double x) { return static_cast<float>(x); };
  return {policy_of(options), narrow(options.clip_low), narrow(options.clip_high),
          narrow(options.dual_clip), narrow(options.kl_coef), options.kl,
          options.unbiased_kl};
}

// What is known of a token before its logits are read. loss_scale is the factor of its loss in the
// total, 0 where the mask is False.
struct Token {
  int64_t label;
  float temperature;
  float loss_scale, old_logprob, advantage, weight, ref_logprob;
  bool has_old, has_ref;
};

R1V3_BOTH float clamped(float x) {
  return x != x ? x : fminf(fmaxf(x, -kMaximumLogRatio), kMaximumLogRatio);
}

// The derivative of the token's loss by its log-probability.
R1V3_BOTH float grad_logprob(float logprob, const Token& token, const TokenOptions& options) {
  const float raw = logprob - (token.has_old ? token.old_logprob : logprob);
  const float ratio = expf(clamped(raw));
  const bool constant = fabsf(raw) > kMaximumLogRatio;
  const auto policy = policy_term(options.policy, logprob, ratio, constant, token.advantage,
                                  1.0f - options.clip_low, 1.0f + options.clip_high,
                                  options.dual_clip);
  float grad = policy.slope * token.weight;
  if (token.has_ref && options.kl_coef != 0.0f) {
    const float d = logprob - token.ref_logprob;
    auto term = kl_term(options.kl, clamped(d));
    if (fabsf(d) > kMaximumLogRatio) term.slope = 0.0f;
    if (options.unbiased_kl) term = times_ratio(term, ratio, constant);
    grad += options.kl_coef * term.slope;
  }
  return grad;
}

struct Result {
  float logprob, entropy;
  float m, log2_s;
  float pull;  // dlogits = pull * (1[v = label] - p); exactly 0 where no gradient may appear
};

// (t - m) / temperature; at temperature 0, 0 for a maximum and -inf for the others.
R1V3_BOTH float distance(float t, float m, float temperature) {
  if (temperature != 0.0f) return (t - m) / temperature;
  return t < m ? -INFINITY : t - m;
}

R1V3_BOTH Result finish(const State& state, const Token& token, int64_t vocab,
                        const TokenOptions& options) {
  const float scale = scale_of(token.temperature);
  const bool dead = state.s == 0.0f;
  const float s = dead ? 1.0f : state.s;
  Result result;
  result.m = state.m;
  result.log2_s = log2f(s);
  result.entropy = dead ? 0.0f : kLn2 * (result.log2_s - state.w / s);
  // Not through log2 units: the label's distance keeps the digits of x - m.
  result.logprob = distance(state.t, state.m, token.temperature) - kLn2 * result.log2_s;
  if (dead) result.logprob = -INFINITY;
  if (token.label < 0 || token.label >= vocab) result.logprob = NAN;
  const float grad = grad_logprob(result.logprob, token, options) * token.loss_scale;
  const bool flat = dead || grad == 0.0f || token.temperature == 0.0f;
  result.pull = flat ? 0.0f : grad * scale * kLn2;
  return result;
}

// ---- gradient ------------------------------------------------------------------------------

R1V3_BOTH float gradient(float x, const Result& result, float scale, bool is_label) {
  const float p = exp2_fast(max_nan((x - result.m) * scale - result.log2_s, kFloor));
  return result.pull * ((is_label ? 1.0f : 0.0f) - p);
}

template <int kCount>
R1V3_BOTH void gradient(float (&x)[kCount], const Result& result, float scale, int label_lane) {
  if (result.pull == 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = 0.0f;
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = gradient(x[i], result, scale, i == label_lane);
}

}  // namespace r1v3::grpo
