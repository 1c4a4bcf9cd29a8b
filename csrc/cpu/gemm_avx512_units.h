// Vectors of the AVX-512 products, of whatever elements.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own undefined vectors
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <stdint.h>

namespace r1v3 {
namespace {

using Units = __m512i;
using F = __m512;
constexpr int kLanes = 16;
constexpr int kMostRows = 14;

inline __mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}
inline Units load_units(const void* x) { return _mm512_loadu_si512(x); }
inline void store(uint32_t* x, Units units, int n) {
  if (n >= kLanes) {
    _mm512_storeu_si512(x, units);
  } else {
    _mm512_mask_storeu_epi32(x, first_lanes(n), units);
  }
}
inline Units broadcast(uint32_t unit) { return _mm512_set1_epi32(static_cast<int>(unit)); }
inline F load_sums(const float* x, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), x); }
inline void store_sums(float* x, F sums, int n) { _mm512_mask_storeu_ps(x, first_lanes(n), sums); }

inline void transpose(Units x[kLanes]) {
  Units y[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

}  // namespace
}  // namespace r1v3
