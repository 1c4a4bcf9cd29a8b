// AVX2 kernels, with FMA and F16C.
#include <immintrin.h>

#include "rows.h"

namespace r1v3 {
namespace {

using F = __m256;
using D = __m256d;
constexpr int kWidth = 8;
constexpr int64_t kStreamAlignment = 32;

struct Pair {
  F first, second;
};

inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max_keep_second(F a, F b) { return _mm256_max_ps(a, b); }
inline F nearest(F z) {
  return _mm256_round_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline D nearest(D z) {
  return _mm256_round_pd(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store_fence() { _mm_sfence(); }

// The factor is 0 below the normal numbers and infinite above them.
inline F times_power_of_two(F p, F n) {
  const F inside = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), n));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(inside), _mm256_set1_epi32(127));
  return p * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

// bfloat16: the even elements and the odd ones.
template <int D, typename T>
inline Pair load_pair(const T* x) {
  if constexpr (D == kFloat32) return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + kWidth)};
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  if constexpr (D == kBFloat16) {
    const __m256i odd = _mm256_and_si256(bits, _mm256_set1_epi32(~0xffff));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), _mm256_castsi256_ps(odd)};
  }
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))};
}

// The bits of a float32 whose upper half is the nearest bfloat16.
inline __m256i rounded_to_bfloat16(F value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(sum, quiet, nan);
}

template <bool Stream>
inline void store_bits(void* x, __m256i bits) {
  if constexpr (Stream) {
    _mm256_stream_si256(static_cast<__m256i*>(x), bits);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(x), bits);
  }
}

template <int D, bool Stream, typename T>
inline void store_pair(T* x, const Pair& v) {
  if constexpr (D == kFloat32) {
    store_bits<Stream>(x, _mm256_castps_si256(v.first));
    store_bits<Stream>(x + kWidth, _mm256_castps_si256(v.second));
  } else if constexpr (D == kBFloat16) {
    const __m256i even = _mm256_srli_epi32(rounded_to_bfloat16(v.first), 16);
    store_bits<Stream>(x, _mm256_blend_epi16(even, rounded_to_bfloat16(v.second), 0xaa));
  } else {
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m128i low = _mm256_cvtps_ph(v.first, kRound), high = _mm256_cvtps_ph(v.second, kRound);
    store_bits<Stream>(x, _mm256_set_m128i(high, low));
  }
}

}  // namespace
}  // namespace r1v3

#include "grpo_impl.h"
#include "rows_impl.h"
#include "sample_impl.h"

namespace r1v3 {
const Kernels kAvx2Kernels = {"avx2", statistics_any, element_any, gradient_any, grpo_block,
                              read_sum, sample_sums, sample_find, to_float, float_max};
}
