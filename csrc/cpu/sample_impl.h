// Weights of tokens for drawing one, written once over the vector type D (doubles) of the including
// file, which also defines `nearest` of it. Include after rows_impl.h.
//
// The weight of a logit x is 2^z, z = x * scale, in units of 2^(reference - 72) and cut into two
// integers of which the upper counts 2^36: a number of x, scale and reference alone. Sums of up to
// 370,000 such integers are exact in double, so they depend on no order and on no partition of the
// vocabulary: not on threads, on vectors, or on shards.
//
// References are multiples of 36, at least 2 above every z. Raising one by 36 makes every upper part
// 0 and every lower part what the upper one was; both are 0 after twice that. A sum under a lower
// reference therefore becomes the one under a higher reference without a look at its parts.
#pragma once

#include "sampling.h"

namespace r1v3 {
namespace {

typedef float Singles __attribute__((vector_size(kWidth * 2)));
typedef int64_t Longs __attribute__((vector_size(kWidth * 4)));
constexpr int kDoubles = kWidth / 2;

inline D broadcast64(double value) { return value - D{}; }

struct WeightParts {
  D upper, lower, weighted;  // weighted: the weight times z - reference, in units of the upper part
};

struct WeightsOf {
  D scale, reference;

  inline WeightParts operator()(const float* x) const {
    Singles singles;
    memcpy(&singles, x, sizeof singles);
    D z = __builtin_convertvector(singles, D) * scale;
    const D lowest = broadcast64(-1e300);
    z = z < lowest ? lowest : z;  // NaN stays
    const D n = nearest(z), r = z - n;
    D k = n - reference;
    const D none = broadcast64(-200.0);
    k = k < none ? none : k;
    // 2^r on [-1/2, 1/2], largest relative error 4.7e-11.
    D p = broadcast64(0x1.fde5fd8baa400p-17);
    p = p * r + broadcast64(0x1.445c840b9fde0p-13);
    p = p * r + broadcast64(0x1.5d8a85ff26c70p-10);
    p = p * r + broadcast64(0x1.3b29f39d41e0cp-7);
    p = p * r + broadcast64(0x1.c6b08ac06b5dcp-5);
    p = p * r + broadcast64(0x1.ebfbe07787348p-3);
    p = p * r + broadcast64(0x1.62e42ff0e1929p-1);
    p = p * r + broadcast64(1.0);
    // 1.5 * 2^52 leaves an integer in the low bits.
    const Longs exponent = (Longs)(k + broadcast64(0x1.8p52 + kSampleBits)) + 1023;
    const D e = p * (D)(exponent << 52);
    const D upper = nearest(e);
    return {upper, nearest((e - upper) * broadcast64(kSampleUnit)), e * (k + r)};
  }
};

inline double sum_of(D value) {
  double result = 0.0;
  for (int i = 0; i < kDoubles; ++i) result += value[i];
  return result;
}

SampleSums sample_sums(const float* x, int64_t n, double scale, double reference) {
  const WeightsOf weights_of = {broadcast64(scale), broadcast64(reference)};
  D upper[2] = {}, lower[2] = {}, weighted[2] = {};
  const auto add = [&](const float* at, int k) {
    const WeightParts parts = weights_of(at);
    upper[k] += parts.upper;
    lower[k] += parts.lower;
    weighted[k] += parts.weighted;
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    add(x + i, 0);
    add(x + i + kDoubles, 1);
  }
  if (i < n) {
    float padded[kWidth];
    for (float& value : padded) value = kMinusInfinity;
    memcpy(padded, x + i, (n - i) * sizeof(float));
    add(padded, 0);
    add(padded + kDoubles, 1);
  }
  return {sum_of(upper[0] + upper[1]), sum_of(lower[0] + lower[1]),
          sum_of(weighted[0] + weighted[1])};
}

int64_t sample_find(const float* x, int64_t n, double scale, double reference, double upper,
                    double lower, double threshold) {
  constexpr int64_t kBlock = 64;
  int64_t start = 0;
  for (; start + kBlock < n; start += kBlock) {
    const SampleSums sums = sample_sums(x + start, kBlock, scale, reference);
    const double next_upper = upper + sums.upper, next_lower = lower + sums.lower;
    if (next_upper * kSampleUnit + next_lower > threshold) break;
    upper = next_upper;
    lower = next_lower;
  }
  for (int64_t i = start; i + 1 < n; ++i) {
    const SampleSums sums = sample_sums(x + i, 1, scale, reference);
    upper += sums.upper;
    lower += sums.lower;
    if (upper * kSampleUnit + lower > threshold) return i;
  }
  return n - 1;
}

template <int D16>
void halves_to_float(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
  if constexpr (D16 == kBFloat16) {
    for (; i < n; ++i) {  // in vectors, and in order, which load_pair does not keep
      const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
      memcpy(out + i, &bits, sizeof bits);
    }
  } else {
    for (; i + kPair <= n; i += kPair) {
      const Pair pair = load_pair<D16>(x + i);
      memcpy(out + i, &pair.first, sizeof pair.first);
      memcpy(out + i + kWidth, &pair.second, sizeof pair.second);
    }
    for (; i < n; ++i) out[i] = load_scalar<D16>(x + i);
  }
}

void to_float(const void* x, int dtype, int64_t n, float* out) {
  if (dtype == kFloat32) {
    memcpy(out, x, n * sizeof(float));
  } else if (dtype == kBFloat16) {
    halves_to_float<kBFloat16>(static_cast<const uint16_t*>(x), n, out);
  } else {
    halves_to_float<kFloat16>(static_cast<const uint16_t*>(x), n, out);
  }
}

double float_max(const float* x, int64_t n) { return chunk_max<kFloat32>(x, n); }

}  // namespace
}  // namespace r1v3
