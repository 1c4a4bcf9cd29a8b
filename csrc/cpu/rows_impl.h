// The row algorithms, written once over the vector type F of the including file.
//
// The including file defines, in an anonymous namespace: F (a vector of float for GCC's and Clang's
// vector operators), kWidth, fma, max_keep_second (returns the second argument when either is NaN),
// nearest, times_power_of_two, Pair, load_pair<D> and store_pair<D, Stream>, which move 2 * kWidth
// elements (in an order of their own, the same for both).
// Nothing here may instantiate a library template: the linker keeps one copy of an inline function,
// and a copy compiled for AVX-512 would then run on machines without it.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"
#include "rows.h"

namespace r1v3 {
namespace {

constexpr int kPair = 2 * kWidth;
constexpr int64_t kChunk = 4096;  // elements; at most 16 KiB, read again from the L1 cache
constexpr float kMinusInfinity = -INFINITY;
constexpr float kUnderflow = -150.0f;  // 2^-150 is 0 in float32, and 0 * -150 is 0 as well
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

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
Pair load_tail(const typename Element<D>::type* x, int64_t n) {
  typename Element<D>::type padded[kPair];
  for (int i = 0; i < kPair; ++i) padded[i] = Element<D>::minus_infinity;
  memcpy(padded, x, n * sizeof(padded[0]));
  return load_pair<D>(padded);
}

template <int D>
void store_tail(typename Element<D>::type* x, const Pair& value, int64_t n) {
  typename Element<D>::type padded[kPair];
  store_pair<D, false>(padded, value);
  memcpy(x, padded, n * sizeof(padded[0]));
}

// Of the first element's place in a pair, lane 0 of its first vector.
template <int D>
float load_scalar(const typename Element<D>::type* x) {
  return load_tail<D>(x, 1).first[0];
}

template <int D>
void store_scalar(typename Element<D>::type* x, float value) {
  store_tail<D>(x, {broadcast(value), broadcast(value)}, 1);
}

// The largest element that is not NaN.
template <int D>
float chunk_max(const typename Element<D>::type* x, int64_t n) {
  F top[4];
  for (F& lanes : top) lanes = broadcast(kMinusInfinity);
  const auto add = [&top](const Pair& v, int k) {
    top[k] = max_keep_second(v.first, top[k]);
    top[k + 1] = max_keep_second(v.second, top[k + 1]);
  };
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    add(load_pair<D>(x + i), 0);
    add(load_pair<D>(x + i + kPair), 2);
  }
  for (; i < n; i += kPair) add(load_tail<D>(x + i, n - i < kPair ? n - i : kPair), 0);
  const F all = max_keep_second(max_keep_second(top[0], top[1]), max_keep_second(top[2], top[3]));
  float result = all[0];
  for (int k = 1; k < kWidth; ++k) result = all[k] > result ? all[k] : result;
  return result;
}

// 2^(r + n) for n = nearest(r + n) <= 127, 0 below the normal numbers (or half of them), NaN where r
// is. Largest relative error 1.7e-7, or 2.9e-6 for 16-bit logits, whose rounding is off by far more;
// 2^0 is 1.
template <bool Fine>
inline F exp2_of(F r, F n) {
  F p;
  if constexpr (Fine) {
    p = fma(broadcast(0x1.5bba14p-10f), r, broadcast(0x1.3cea88p-7f));
    p = fma(p, r, broadcast(0x1.c6b752p-5f));
    p = fma(p, r, broadcast(0x1.ebf9bcp-3f));
    p = fma(p, r, broadcast(0x1.62e42ap-1f));
  } else {
    p = fma(broadcast(0x1.3a02ccp-7f), r, broadcast(0x1.c9fc46p-5f));
    p = fma(p, r, broadcast(0x1.ec0378p-3f));
    p = fma(p, r, broadcast(0x1.62e12cp-1f));
  }
  return times_power_of_two(fma(p, r, broadcast(1.0f)), n);
}

struct ChunkSums {
  double sum, weighted;
};

// sum = sum of 2^z, weighted = sum of 2^z z, for z = (x - base) * scale, x <= base. The difference
// comes first, so that a large common offset of the logits costs no digits and the largest element
// counts exactly 1. Without Clamped, -inf makes NaN.
template <int D, bool Weighted, bool Clamped>
struct Accumulator {
  F base, scale;
  F sum[2] = {}, weighted[2] = {};

  inline void add(F x, int i) {
    const F d = x - base;
    F z = d * scale;
    if constexpr (Clamped) z = max_keep_second(broadcast(kUnderflow), z);
    const F n = nearest(z);
    const F e = exp2_of<D == kFloat32>(Clamped ? z - n : fma(d, scale, -n), n);
    sum[i] += e;
    if constexpr (Weighted) weighted[i] = fma(e, z, weighted[i]);
  }
  inline void add(const Pair& v) {
    add(v.first, 0);
    add(v.second, 1);
  }
};

template <int D, bool Weighted, bool Clamped>
ChunkSums chunk_sums(const typename Element<D>::type* x, int64_t n, float base, float scale) {
  Accumulator<D, Weighted, Clamped> a{broadcast(base), broadcast(scale)};
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    a.add(load_pair<D>(x + i));
    a.add(load_pair<D>(x + i + kPair));
  }
  for (; i + kPair <= n; i += kPair) a.add(load_pair<D>(x + i));
  if (i < n) {
    // The padding is -inf, which only the clamped form takes.
    Accumulator<D, Weighted, true> tail{a.base, a.scale};
    tail.add(load_tail<D>(x + i, n - i));
    for (int k = 0; k < 2; ++k) {
      a.sum[k] += tail.sum[k];
      a.weighted[k] += tail.weighted[k];
    }
  }
  return {lane_sum(a.sum[0] + a.sum[1]), lane_sum(a.weighted[0] + a.weighted[1])};
}

// FLT_MAX at temperature 0: it sends every difference but 0 below the underflow bound.
inline float inverse(double numerator, double temperature) {
  const double value = numerator / temperature;
  return value < FLT_MAX ? static_cast<float>(value) : FLT_MAX;
}

// One pass of a row, chunk by chunk. A chunk whose sum stays below 1 holds nothing above the maximum
// so far; only the others are searched for a new one. The clamp is paid from the first -inf on, and
// from the first logit so far below the others that z is not exact to a unit.
template <int D, bool Weighted>
class RowPass {
 public:
  explicit RowPass(double temperature)
      : temperature_(temperature), scale_(inverse(kLog2E, temperature)) {}

  void add(const typename Element<D>::type* x, int64_t n) {
    ChunkSums part = {1.0, 0.0};
    if (m_ > kMinusInfinity) part = sums(x, n, m_);
    if (!(part.sum < 1.0)) {
      const float top = chunk_max<D>(x, n);
      if (top > m_ || m_ == kMinusInfinity) {
        raise(top);
        part = sums(x, n, m_ == kMinusInfinity ? 0.0f : m_);
      }
    }
    s_ += part.sum;
    w_ += part.weighted;
  }
  RowStatistics result() const { return {m_, s_, kLn2 * w_}; }

 private:
  ChunkSums sums(const typename Element<D>::type* x, int64_t n, float base) {
    if (!clamped_) {
      const ChunkSums part = chunk_sums<D, Weighted, false>(x, n, base, scale_);
      const bool finite = part.sum >= 0.0 && part.sum <= FLT_MAX;
      if (finite && part.weighted == part.weighted) return part;
      clamped_ = true;
    }
    return chunk_sums<D, Weighted, true>(x, n, base, scale_);
  }
  void raise(float top) {
    if (m_ > kMinusInfinity) {
      const double shift = kLog2E * ((static_cast<double>(m_) - top) / temperature_);
      const double alpha = exp2(shift);
      w_ = alpha == 0.0 ? 0.0 * s_ : alpha * (w_ + shift * s_);
      s_ *= alpha;
    }
    m_ = top;
  }

  double temperature_;
  float scale_, m_ = kMinusInfinity;
  double s_ = 0.0, w_ = 0.0;
  bool clamped_ = false;
};

template <int D, bool Weighted>
RowStatistics row_statistics(const void* logits, int64_t vocab, double temperature) {
  const auto* x = static_cast<const typename Element<D>::type*>(logits);
  RowPass<D, Weighted> pass(temperature);
  for (int64_t start = 0; start < vocab; start += kChunk) {
    pass.add(x + start, vocab - start < kChunk ? vocab - start : kChunk);
  }
  return pass.result();
}

// -p (g_lp + g_H (log p + H)) / T; exactly 0 where p is. Capped: times 1 - (x / softcap)^2.
template <int D, bool Capped>
struct GradientOf {
  F m, scale, log2_s, slope, offset, inv_temperature, inverse_softcap;

  // Always: how much GCC inlines by itself depends on how much else is in the file.
  __attribute__((always_inline)) inline F operator()(F x) const {
    const F z = max_keep_second(broadcast(kUnderflow), fma(x - m, scale, log2_s));
    const F n = nearest(z);
    const F g = exp2_of<D == kFloat32>(z - n, n) * fma(z, slope, offset) * inv_temperature;
    if constexpr (!Capped) return g;
    const F t = x * inverse_softcap;
    return g * fma(-t, t, broadcast(1.0f));
  }
  __attribute__((always_inline)) inline Pair operator()(const Pair& v) const {
    return {(*this)(v.first), (*this)(v.second)};
  }
};

template <int D, bool Stream, bool Capped>
void gradient_of_elements(const typename Element<D>::type* x, int64_t n,
                          const GradientOf<D, Capped>& f, typename Element<D>::type* dx) {
  int64_t i = 0;
  if constexpr (Stream) {
    const auto misaligned = reinterpret_cast<uintptr_t>(dx) % kStreamAlignment;
    int64_t head = (kStreamAlignment - misaligned) % kStreamAlignment / sizeof(*dx);
    if (head > n) head = n;
    for (; i < head; i += kPair) {
      const int64_t count = head - i < kPair ? head - i : kPair;
      store_tail<D>(dx + i, f(load_tail<D>(x + i, count)), count);
    }
    i = head;
  }
  for (; i + kPair <= n; i += kPair) store_pair<D, Stream>(dx + i, f(load_pair<D>(x + i)));
  if (i < n) store_tail<D>(dx + i, f(load_tail<D>(x + i, n - i)), n - i);
  if constexpr (Stream) store_fence();
}

template <int D, bool Capped>
void row_gradient(const void* logits, int64_t vocab, int64_t target, double temperature,
                  const RowGradient& up, bool stream, void* grad_logits) {
  const auto* x = static_cast<const typename Element<D>::type*>(logits);
  auto* dx = static_cast<typename Element<D>::type*>(grad_logits);
  const bool unused = up.grad_logprob == 0.0f && up.grad_entropy == 0.0f;
  const bool empty = up.m == kMinusInfinity && up.log_s == up.log_s;  // NaN where a logit is
  if (unused || empty || temperature == 0.0) {
    memset(grad_logits, 0, vocab * sizeof(*dx));
    return;
  }
  const bool has_target = target >= 0 && target < vocab;
  const double target_logit = has_target ? load_scalar<D>(x + target) : 0.0f;
  const float log2_s = static_cast<float>(-kLog2E * up.log_s);
  const float offset = -up.grad_logprob - up.grad_entropy * up.entropy;
  const GradientOf<D, Capped> f = {broadcast(up.m),
                           broadcast(inverse(kLog2E, temperature)),
                           broadcast(log2_s),
                           broadcast(static_cast<float>(-kLn2 * up.grad_entropy)),
                           broadcast(offset),
                           broadcast(inverse(1.0, temperature)),
                           broadcast(up.inverse_softcap)};
  if (stream && reinterpret_cast<uintptr_t>(dx) % sizeof(*dx) == 0) {
    gradient_of_elements<D, true, Capped>(x, vocab, f, dx);
  } else {
    gradient_of_elements<D, false, Capped>(x, vocab, f, dx);
  }
  if (has_target) {
    // In double: 1 - p must keep its digits where p is nearly 1.
    const double z = (target_logit - up.m) / temperature - up.log_s, p = exp(z);
    const double entropy_term = p == 0.0 ? 0.0 : up.grad_entropy * p * (z + up.entropy);
    double value = (up.grad_logprob * (1.0 - p) - entropy_term) / temperature;
    if (Capped) {
      const double t = target_logit * up.inverse_softcap;
      value *= 1.0 - t * t;
    }
    store_scalar<D>(dx + target, static_cast<float>(value));
  }
}

template <int D>
RowStatistics statistics_of(const void* x, int64_t vocab, double temperature, bool weighted) {
  return weighted ? row_statistics<D, true>(x, vocab, temperature)
                  : row_statistics<D, false>(x, vocab, temperature);
}

RowStatistics statistics_any(const void* x, int dtype, int64_t vocab, double temperature,
                             bool weighted) {
  if (dtype == kFloat32) return statistics_of<kFloat32>(x, vocab, temperature, weighted);
  if (dtype == kBFloat16) return statistics_of<kBFloat16>(x, vocab, temperature, weighted);
  return statistics_of<kFloat16>(x, vocab, temperature, weighted);
}

float element_any(const void* x, int dtype, int64_t index) {
  if (dtype == kFloat32) return static_cast<const float*>(x)[index];
  const uint16_t* element = static_cast<const uint16_t*>(x) + index;
  return dtype == kBFloat16 ? load_scalar<kBFloat16>(element) : load_scalar<kFloat16>(element);
}

void gradient_any(const void* x, int dtype, int64_t vocab, int64_t target, double temperature,
                  const RowGradient& up, bool stream, void* dx) {
  const auto of_floats =
      up.inverse_softcap != 0.0f ? row_gradient<kFloat32, true> : row_gradient<kFloat32, false>;
  const auto gradient = dtype == kFloat32    ? of_floats
                        : dtype == kBFloat16 ? row_gradient<kBFloat16, false>
                                             : row_gradient<kFloat16, false>;
  gradient(x, vocab, target, temperature, up, stream, dx);
}

double read_sum(const float* x, int64_t n) {
  constexpr int kAccumulators = 8;
  F sums[kAccumulators] = {};
  int64_t i = 0;
  for (; i + kAccumulators * kWidth <= n; i += kAccumulators * kWidth) {
    for (int k = 0; k < kAccumulators; ++k) {
      F value;
      memcpy(&value, x + i + k * kWidth, sizeof value);
      sums[k] += value;
    }
  }
  double total = 0.0;
  for (int k = 0; k < kAccumulators; ++k) total += lane_sum(sums[k]);
  for (; i < n; ++i) total += x[i];
  return total;
}

}  // namespace
}  // namespace r1v3
