// AVX2 row kernels, with FMA and F16C.
#include <immintrin.h>

#include "rows.h"

namespace r1v3 {
namespace {

using F = __m256;
constexpr int kWidth = 8;

inline F set1(float value) { return _mm256_set1_ps(value); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max_keep_second(F a, F b) { return _mm256_max_ps(a, b); }

template <int D, typename T>
inline F load(const T* x) {
  if constexpr (D == kFloat32) return _mm256_loadu_ps(x);
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  if constexpr (D == kFloat16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m128i to_bfloat16(F value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

template <int D, typename T>
inline void store(T* x, F value) {
  if constexpr (D == kFloat32) {
    _mm256_storeu_ps(x, value);
  } else {
    __m128i bits;
    if constexpr (D == kFloat16) {
      bits = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      bits = to_bfloat16(value);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), bits);
  }
}

// exp(d) for d >= -150 or NaN, saturating above 88.3: 2^n * exp(r), |r| <= ln(2) / 2, polynomial of
// Cephes' expf. Results below the smallest normal number are 0.
inline F exp_clamped(F d) {
  const F smallest = set1(-87.33f);
  const F c = _mm256_max_ps(smallest, _mm256_min_ps(set1(88.37f), d));
  const F n = _mm256_round_ps(mul(c, set1(1.44269504088896341f)),
                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), c));
  F p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const F scaled = mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  return _mm256_andnot_ps(_mm256_cmp_ps(d, smallest, _CMP_LT_OQ), scaled);
}

}  // namespace
}  // namespace r1v3

#include "rows_impl.h"

namespace r1v3 {
const RowKernels kAvx2Rows = {"avx2", forward_any, backward_any};
}
