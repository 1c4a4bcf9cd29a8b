// Numbers of the CUDA kernel and their arithmetic, which a host compiler runs too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../grpo_options.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

namespace r1v3 {

R1V3_BOTH float choose(bool mask, float a, float b) { return mask ? a : b; }

struct Exponential {
  float value;   // exp(x)
  float excess;  // exp(x) - 1
  float beyond;  // exp(x) - 1 - x
};

R1V3_BOTH Exponential exponential(float x) {
  const float excess = expm1f(x);
  return {expf(x), excess, excess - x};
}

namespace grpo {

constexpr int kVectorBytes = 16;

struct bf16 { uint16_t bits; };
struct alignas(kVectorBytes) Vector { uint32_t words[4]; };

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

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

}  // namespace grpo
}  // namespace r1v3
