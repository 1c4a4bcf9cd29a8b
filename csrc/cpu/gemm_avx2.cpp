// AVX2 and FMA parts of the product with float32 arithmetic.
#include <immintrin.h>
#include <stdint.h>

namespace r1v3 {
namespace {

constexpr int kPerUnit = 1;
using Units = __m256;
using F = __m256;
constexpr int kLanes = 8;
constexpr int kMostRows = 6;

inline __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < kLanes ? static_cast<int>(n) : kLanes), lane);
}
inline Units load_units(const uint32_t* x) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(x));
}
inline void store(uint32_t* x, Units units, int n) {
  float* to = reinterpret_cast<float*>(x);
  if (n >= kLanes) {
    _mm256_storeu_ps(to, units);
  } else {
    _mm256_maskstore_ps(to, first_lanes(n), units);
  }
}
inline Units broadcast(const uint32_t& unit) {
  return _mm256_broadcast_ss(reinterpret_cast<const float*>(&unit));
}
inline F multiply_add(Units a, Units b, F sum) { return _mm256_fmadd_ps(a, b, sum); }
inline F load_sums(const float* x, int n) {
  return n >= kLanes ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first_lanes(n));
}
inline void store_sums(float* x, F sums, int n) {
  if (n >= kLanes) {
    _mm256_storeu_ps(x, sums);
  } else {
    _mm256_maskstore_ps(x, first_lanes(n), sums);
  }
}

inline Units load_all(const float* x) { return _mm256_loadu_ps(x); }
inline Units load(const float* x, int64_t n) { return _mm256_maskload_ps(x, first_lanes(n)); }
inline uint32_t unit_of(const float* x, int64_t, bool) {
  uint32_t unit;
  __builtin_memcpy(&unit, x, sizeof unit);
  return unit;
}

// bfloat16 is the upper half of a float32.
inline Units load_all(const uint16_t* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Units load(const uint16_t* x, int64_t n) {
  if (n >= kLanes) return load_all(x);
  uint16_t some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = x[i];
  return load_all(some);
}
inline uint32_t unit_of(const uint16_t* x, int64_t, bool) { return uint32_t{*x} << 16; }

template <typename Element>
inline Units neighbors(const Element* x, int64_t, int n, bool) {
  return load(x, n);
}

inline void transpose(Units x[kLanes]) {
  Units y[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) x[i] = y[i];
}

}  // namespace
}  // namespace r1v3

#include "gemm_impl.h"

namespace r1v3 {
const GemmKernels kAvx2GemmFloat32 = {kMostRows, kColumns, kPerUnit, {pack<float>, pack<uint16_t>}, multiply};
}
