// Row kernels for any processor, over the 128-bit vectors of GCC and Clang.
#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace r1v3 {
namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int kWidth = 4;

inline F set1(float value) { return F{value, value, value, value}; }
inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F select(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }
inline F max_keep_second(F a, F b) { return select(a > b, a, b); }

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

// exp(d) for d >= -150 or NaN, saturating above 88.3: 2^n * exp(r), |r| <= ln(2) / 2, polynomial of
// Cephes' expf. Results below the smallest normal number are 0.
inline F exp_clamped(F d) {
  const F smallest = set1(-87.33f), largest = set1(88.37f), magic = set1(0x1.8p23f);
  F c = select(d > largest, largest, d);
  c = select(c < smallest, smallest, c);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const F shifted = c * set1(1.44269504088896341f) + magic;
  const F n = shifted - magic;
  const F r = (c - n * set1(0.693359375f)) + n * set1(2.12194440e-4f);
  F p = set1(1.9875691500e-4f) * r + set1(1.3981999507e-3f);
  p = p * r + set1(8.3334519073e-3f);
  p = p * r + set1(4.1665795894e-2f);
  p = p * r + set1(1.6666665459e-1f);
  p = p * r + set1(5.0000001201e-1f);
  p = p * (r * r) + (r + set1(1.0f));
  const I exponent = ((I)shifted - 0x4b400000 + 127) << 23;
  const F scaled = p * (F)exponent;
  return (F)(~(d < smallest) & (I)scaled);
}

}  // namespace
}  // namespace r1v3

#include "rows_impl.h"

namespace r1v3 {
const RowKernels kPortableRows = {"portable", forward_any, backward_any};
}
