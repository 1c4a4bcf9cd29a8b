// Kernels for any processor, over the 128-bit vectors of GCC and Clang.
#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace r1v3 {
namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef double D __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int64_t kStreamAlignment = 1;  // plain stores

struct Pair {
  F first, second;
};

inline F set1(float value) { return F{value, value, value, value}; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F select(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }
inline F max_keep_second(F a, F b) { return select(a > b, a, b); }
inline void store_fence() {}

// Beyond +-2^22 every logit's z stands for 2^z = 0 or infinity, and z - nearest(z) for nothing.
inline F nearest(F z) {
  const F limit = set1(0x1p22f), magic = set1(0x1.8p23f);
  const F rounded = (z + magic) - magic;
  return select((z < limit) & (z > -limit), rounded, z);
}

inline D nearest(D z) {
  const D limit = 0x1p51 - D{}, magic = 0x1.8p52 - D{};
  const D rounded = (z + magic) - magic;
  return (z < limit) & (z > -limit) ? rounded : z;
}

// The factor is 0 below the normal numbers and infinite above them.
inline F times_power_of_two(F p, F n) {
  const F low = set1(-127.0f), high = set1(128.0f);
  const F inside = select(n < low, low, select(n > high, high, n));
  // 1.5 * 2^23 leaves an integer in the low bits.
  const I exponent = (I)(inside + set1(0x1.8p23f)) - 0x4b400000 + 127;
  return p * (F)(exponent << 23);
}

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + 0x38000000));
  return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));
}

inline uint16_t to_half(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) {
    // Adding 0.5 leaves the subnormal's multiple of 2^-24, rounded to even, in the low bits.
    return sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000);
  }
  return sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if (value != value) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <int D, typename T>
inline F load(const T* x) {
  F value;
  if constexpr (D == kFloat32) {
    memcpy(&value, x, sizeof value);
  } else {
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (D == kFloat16) value[i] = from_half(x[i]);
      if constexpr (D == kBFloat16) value[i] = from_bits(static_cast<uint32_t>(x[i]) << 16);
    }
  }
  return value;
}

template <int D, typename T>
inline void store(T* x, F value) {
  if constexpr (D == kFloat32) {
    memcpy(x, &value, sizeof value);
  } else {
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (D == kFloat16) x[i] = to_half(value[i]);
      if constexpr (D == kBFloat16) x[i] = to_bfloat16(value[i]);
    }
  }
}

template <int D, typename T>
inline Pair load_pair(const T* x) {
  return {load<D>(x), load<D>(x + kWidth)};
}

template <int D, bool Stream, typename T>
inline void store_pair(T* x, const Pair& v) {
  store<D>(x, v.first);
  store<D>(x + kWidth, v.second);
}

}  // namespace
}  // namespace r1v3

#include "grpo_impl.h"
#include "rows_impl.h"
#include "sample_impl.h"

namespace r1v3 {
const Kernels kPortableKernels = {"portable", statistics_any, element_any, gradient_any, grpo_block,
                                  read_sum, sample_sums, sample_find, to_float, float_max};
}
