// The row algorithms, written once over the vector type F of the including file.
//
// The including file defines, in an anonymous namespace: F, kWidth, set1, load<D>, store<D>, add,
// sub, mul, div, fma, max_keep_second (returns the second argument when either is NaN) and exp_clamped.
// Nothing here may instantiate a library template: the linker keeps one copy of an inline function,
// and a copy compiled for AVX-512 would then run on machines without it.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace r1v3 {
namespace {

constexpr int64_t kChunk = 4096;       // elements; at most 16 KiB, re-read from the L1 cache
constexpr float kUnderflow = -150.0f;  // exp(-150) is 0 in float32, and 0 * -150 is 0 as well
constexpr float kMinusInfinity = -INFINITY;

template <int D>
struct Element {
  using type = uint16_t;
  static constexpr uint16_t minus_infinity = D == kBFloat16 ? 0xff80 : 0xfc00;
};
template <>
struct Element<kFloat32> {
  using type = float;
  static constexpr float minus_infinity = kMinusInfinity;
};

template <int D>
F load_tail(const typename Element<D>::type* x, int64_t n) {
  typename Element<D>::type padded[kWidth];
  for (int i = 0; i < kWidth; ++i) padded[i] = Element<D>::minus_infinity;
  memcpy(padded, x, n * sizeof(padded[0]));
  return load<D>(padded);
}

template <int D>
void store_tail(typename Element<D>::type* x, F value, int64_t n) {
  typename Element<D>::type padded[kWidth];
  store<D>(padded, value);
  memcpy(x, padded, n * sizeof(padded[0]));
}

template <int D>
float load_scalar(const typename Element<D>::type* x) {
  float lanes[kWidth];
  store<kFloat32>(lanes, load_tail<D>(x, 1));
  return lanes[0];
}

float lane_max(F value) {
  float lanes[kWidth];
  store<kFloat32>(lanes, value);
  float result = lanes[0];
  for (int i = 1; i < kWidth; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

double lane_sum(F value) {
  float lanes[kWidth];
  store<kFloat32>(lanes, value);
  double result = 0.0;
  for (int i = 0; i < kWidth; ++i) result += lanes[i];
  return result;
}

// The largest element that is not NaN.
template <int D>
float chunk_max(const typename Element<D>::type* x, int64_t n) {
  F a0 = set1(kMinusInfinity), a1 = a0, a2 = a0, a3 = a0;
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    a0 = max_keep_second(load<D>(x + i), a0);
    a1 = max_keep_second(load<D>(x + i + kWidth), a1);
    a2 = max_keep_second(load<D>(x + i + 2 * kWidth), a2);
    a3 = max_keep_second(load<D>(x + i + 3 * kWidth), a3);
  }
  for (; i + kWidth <= n; i += kWidth) a0 = max_keep_second(load<D>(x + i), a0);
  if (i < n) a0 = max_keep_second(load_tail<D>(x + i, n - i), a0);
  return lane_max(max_keep_second(max_keep_second(a0, a1), max_keep_second(a2, a3)));
}

struct ChunkSums {
  double sum;
  double weighted;
};

// sum += exp(d) and weighted += exp(d) * d for d = (x - base) / temperature. A NaN reaches both.
inline void accumulate(F x, F base, F inv_temperature, F& sum, F& weighted) {
  F d = max_keep_second(set1(kUnderflow), mul(sub(x, base), inv_temperature));
  F e = exp_clamped(d);
  sum = add(sum, e);
  weighted = fma(e, d, weighted);
}

template <int D>
ChunkSums chunk_sums(const typename Element<D>::type* x, int64_t n, float base_value, float inv) {
  const F base = set1(base_value), scale = set1(inv);
  F s0 = set1(0.0f), s1 = s0, s2 = s0, s3 = s0, w0 = s0, w1 = s0, w2 = s0, w3 = s0;
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    accumulate(load<D>(x + i), base, scale, s0, w0);
    accumulate(load<D>(x + i + kWidth), base, scale, s1, w1);
    accumulate(load<D>(x + i + 2 * kWidth), base, scale, s2, w2);
    accumulate(load<D>(x + i + 3 * kWidth), base, scale, s3, w3);
  }
  for (; i + kWidth <= n; i += kWidth) accumulate(load<D>(x + i), base, scale, s0, w0);
  if (i < n) accumulate(load_tail<D>(x + i, n - i), base, scale, s0, w0);
  return {lane_sum(add(add(s0, s1), add(s2, s3))), lane_sum(add(add(w0, w1), add(w2, w3)))};
}

// FLT_MAX at temperature 0: it sends every difference but 0 below the underflow bound.
inline float inverse(double temperature) {
  const double value = 1.0 / temperature;
  return value < FLT_MAX ? static_cast<float>(value) : FLT_MAX;
}

// Differences are taken before the division by the temperature, so that a large common offset of
// the logits costs no precision.
template <int D>
void forward_row(const void* logits, int64_t vocab, int64_t target, double temperature,
                 float* stats) {
  const auto* x = static_cast<const typename Element<D>::type*>(logits);
  const float inv = inverse(temperature);
  float m = kMinusInfinity;
  double s = 0.0, w = 0.0;
  for (int64_t start = 0; start < vocab; start += kChunk) {
    const int64_t n = vocab - start < kChunk ? vocab - start : kChunk;
    const float top = chunk_max<D>(x + start, n);
    if (top > m) {
      if (m > kMinusInfinity) {
        const double shift = (static_cast<double>(m) - top) / temperature;
        const double alpha = exp(shift);
        w = alpha == 0.0 ? 0.0 * s : alpha * (w + shift * s);
        s *= alpha;
      }
      m = top;
    }
    const ChunkSums part = chunk_sums<D>(x + start, n, m == kMinusInfinity ? 0.0f : m, inv);
    s += part.sum;
    w += part.weighted;
  }
  const float t = temperature == 0.0 ? 1.0f : static_cast<float>(temperature);
  stats[0] = m / t;
  stats[1] = static_cast<float>(s);
  stats[2] = static_cast<float>(w);
  stats[3] = target >= 0 && target < vocab ? load_scalar<D>(x + target) / t : 0.0f;
}

struct GradientTerms {
  F temperature, inv_temperature, lse, log_s, entropy, minus_grad_logprob, minus_grad_entropy;
};

// -p * (g_lp + g_H * (log p + H)) / T; exactly 0 where p is. A division, as in the forward's m: with
// a rounded reciprocal the largest logit would not cancel against it.
inline F gradient(F x, const GradientTerms& k) {
  F z = sub(sub(div(x, k.temperature), k.lse), k.log_s);
  z = max_keep_second(set1(kUnderflow), z);
  F slope = fma(k.minus_grad_entropy, add(z, k.entropy), k.minus_grad_logprob);
  return mul(mul(exp_clamped(z), slope), k.inv_temperature);
}

template <int D>
void backward_row(const void* logits, int64_t vocab, int64_t target, double temperature,
                  const RowGradient& up, void* grad_logits) {
  const auto* x = static_cast<const typename Element<D>::type*>(logits);
  auto* dx = static_cast<typename Element<D>::type*>(grad_logits);
  const bool unused = up.grad_logprob == 0.0f && up.grad_entropy == 0.0f;
  if (unused || up.lse == kMinusInfinity || temperature == 0.0) {
    memset(grad_logits, 0, vocab * sizeof(*dx));
    return;
  }
  const bool has_target = target >= 0 && target < vocab;
  const float target_logit = has_target ? load_scalar<D>(x + target) : 0.0f;
  const float t = static_cast<float>(temperature);
  const GradientTerms terms = {set1(t),        set1(inverse(temperature)), set1(up.lse),
                               set1(up.log_s), set1(up.entropy),           set1(-up.grad_logprob),
                               set1(-up.grad_entropy)};
  int64_t i = 0;
  for (; i + 2 * kWidth <= vocab; i += 2 * kWidth) {
    const F x0 = load<D>(x + i), x1 = load<D>(x + i + kWidth);
    store<D>(dx + i, gradient(x0, terms));
    store<D>(dx + i + kWidth, gradient(x1, terms));
  }
  for (; i + kWidth <= vocab; i += kWidth) store<D>(dx + i, gradient(load<D>(x + i), terms));
  if (i < vocab) store_tail<D>(dx + i, gradient(load_tail<D>(x + i, vocab - i), terms), vocab - i);
  if (has_target) {
    // In double: 1 - p must keep its digits where p is nearly 1.
    const double z = static_cast<double>(target_logit / t) - up.lse - up.log_s, p = exp(z);
    const double entropy_term = p == 0.0 ? 0.0 : up.grad_entropy * p * (z + up.entropy);
    const double value = (up.grad_logprob * (1.0 - p) - entropy_term) / temperature;
    store_tail<D>(dx + target, set1(static_cast<float>(value)), 1);
  }
}

void forward_any(const void* x, int dtype, int64_t vocab, int64_t target, double temperature,
                 float* stats) {
  if (dtype == kFloat32) return forward_row<kFloat32>(x, vocab, target, temperature, stats);
  if (dtype == kBFloat16) return forward_row<kBFloat16>(x, vocab, target, temperature, stats);
  return forward_row<kFloat16>(x, vocab, target, temperature, stats);
}

void backward_any(const void* x, int dtype, int64_t vocab, int64_t target, double temperature,
                  const RowGradient& up, void* dx) {
  if (dtype == kFloat32) return backward_row<kFloat32>(x, vocab, target, temperature, up, dx);
  if (dtype == kBFloat16) return backward_row<kBFloat16>(x, vocab, target, temperature, up, dx);
  return backward_row<kFloat16>(x, vocab, target, temperature, up, dx);
}

}  // namespace
}  // namespace r1v3
