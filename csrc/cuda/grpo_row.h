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
#include <cstring>

#include "../grpo_options.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define R1V3_BOTH __host__ __device__ __forceinline__
#else
#define R1V3_BOTH inline
#endif

namespace r1v3::grpo {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
// Loads in flight are waited for in this many groups, so that sums start before the row is here.
constexpr int kGroups = 4;
constexpr int kVectorBytes = 16;
constexpr float kLowest = -3.4028234e38f;
// exp2 of this is 0, and 0 times it is 0: what -inf becomes, so that 0 * -inf never appears.
constexpr float kFloor = -1.0e4f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int64_t kIgnored = -100;

struct bf16 { uint16_t bits; };
struct alignas(kVectorBytes) Vector { uint32_t words[4]; };

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// ---- numbers -------------------------------------------------------------------------------

R1V3_BOTH float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

R1V3_BOTH float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return (a != a || a > b) ? a : b;
#endif
}

R1V3_BOTH float max_number(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return (b != b || a > b) ? a : b;
#endif
}

R1V3_BOTH float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return std::exp2(x);
#endif
}

R1V3_BOTH bool finite(float x) { return x - x == 0.0f; }

R1V3_BOTH uint32_t pack_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
#else
  const auto rounded = [](float x) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
#endif
}

R1V3_BOTH void unpack_pair(uint32_t bits, float& low, float& high) {
  low = as_float(bits << 16);
  high = as_float(bits & 0xffff0000u);
}

template <typename T>
R1V3_BOTH void unpack(const Vector& vector, float (&x)[kLanes<T>]) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) x[i] = as_float(vector.words[i]);
  } else {
    for (int i = 0; i < 4; ++i) unpack_pair(vector.words[i], x[2 * i], x[2 * i + 1]);
  }
}

template <typename T>
R1V3_BOTH Vector pack(const float (&x)[kLanes<T>]) {
  Vector vector;
  if constexpr (sizeof(T) == 4) {
    std::memcpy(vector.words, x, sizeof vector.words);
  } else {
    for (int i = 0; i < 4; ++i) vector.words[i] = pack_pair(x[2 * i], x[2 * i + 1]);
  }
  return vector;
}

template <typename T>
R1V3_BOTH float to_float(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    float low, high;
    unpack_pair(x.bits, low, high);
    return low;
  }
}

template <typename T>
R1V3_BOTH T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pack_pair(x, 0.0f) & 0xffffu)};
  }
}

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

// ---- the loss of one token -----------------------------------------------------------------

// Of GrpoOptions, what a token's loss depends on.
struct TokenOptions {
  float clip_low, clip_high, dual_clip, kl_coef;  // dual_clip 0 is none
  RatioClip ratio_clip;
  KL kl;
};

inline TokenOptions single_precision(const GrpoOptions& options) {
  const auto narrow = [](double x) { return static_cast<float>(x); };
  return {narrow(options.clip_low), narrow(options.clip_high), narrow(options.dual_clip),
          narrow(options.kl_coef), options.ratio_clip, options.kl};
}

// What is known of a token before its logits are read. loss_scale is the factor of its loss in the
// total, 0 where the mask is False.
struct Token {
  int64_t label;
  float loss_scale, old_logprob, advantage, weight, ref_logprob;
  bool has_old, has_ref;
};

R1V3_BOTH float clamped(float x) {
  return x != x ? x : fminf(fmaxf(x, -kMaximumLogRatio), kMaximumLogRatio);
}

// The derivative of the policy term by the log-probability, without the token's weight.
R1V3_BOTH float policy_slope(float raw, float a, const TokenOptions& options) {
  const float ratio = expf(clamped(raw));
  const float low = 1.0f - options.clip_low, high = 1.0f + options.clip_high;
  if (options.ratio_clip == RatioClip::kCispo) {
    return -(ratio > high ? high : ratio < low ? low : ratio) * a;  // NaN stays
  }
  const float free = ratio * a;
  const float bounded = fminf(fmaxf(ratio, low), high) * a;
  const bool constant = free > bounded;
  const float loss = -(constant ? bounded : free);
  bool flat = constant || fabsf(raw) > kMaximumLogRatio;
  if (options.dual_clip > 0.0f) flat = flat || (a < 0.0f && loss > -options.dual_clip * a);
  return flat ? 0.0f : -free;
}

// The derivative of the token's loss by its log-probability.
R1V3_BOTH float grad_logprob(float logprob, const Token& token, const TokenOptions& options) {
  const float raw = logprob - (token.has_old ? token.old_logprob : logprob);
  float grad = policy_slope(raw, token.advantage, options) * token.weight;
  if (token.has_ref && options.kl_coef != 0.0f) {
    const float raw_gap = token.ref_logprob - logprob;
    const float gap = clamped(raw_gap);
    const float slope = options.kl == KL::kK1   ? 1.0f
                            : options.kl == KL::kK2 ? -gap
                                                    : -expm1f(gap);
    grad += options.kl_coef * (fabsf(raw_gap) > kMaximumLogRatio ? 0.0f : slope);
  }
  return grad;
}

struct Result {
  float logprob, entropy;
  float m, log2_s;
  float pull;  // dlogits = pull * (1[v = label] - p); exactly 0 where no gradient may appear
};

R1V3_BOTH Result finish(const State& state, const Token& token, int64_t vocab, float temperature,
                        const TokenOptions& options) {
  const float scale = kLog2E / temperature;
  const bool dead = state.s == 0.0f;
  const float s = dead ? 1.0f : state.s;
  Result result;
  result.m = state.m;
  result.log2_s = log2f(s);
  result.entropy = dead ? 0.0f : kLn2 * (result.log2_s - state.w / s);
  // Not through log2 units: the label's distance keeps the digits of x - m.
  result.logprob = (state.t - state.m) / temperature - kLn2 * result.log2_s;
  if (dead) result.logprob = -INFINITY;
  if (token.label < 0 || token.label >= vocab) result.logprob = NAN;
  const float grad = grad_logprob(result.logprob, token, options) * token.loss_scale;
  result.pull = dead || grad == 0.0f ? 0.0f : grad * scale * kLn2;
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
