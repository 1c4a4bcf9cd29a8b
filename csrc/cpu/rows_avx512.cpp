// AVX-512 (F, BW, DQ, VL) row kernels.
#include <immintrin.h>

#include "rows.h"

namespace r1v3 {
namespace {

using F = __m512;
constexpr int kWidth = 16;

inline F set1(float value) { return _mm512_set1_ps(value); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max_keep_second(F a, F b) { return _mm512_max_ps(a, b); }

template <int D, typename T>
inline F load(const T* x) {
  if constexpr (D == kFloat32) return _mm512_loadu_ps(x);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  if constexpr (D == kFloat16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m256i to_bfloat16(F value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_add_epi32(bits, bias);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

template <int D, typename T>
inline void store(T* x, F value) {
  if constexpr (D == kFloat32) {
    _mm512_storeu_ps(x, value);
  } else {
    __m256i bits;
    if constexpr (D == kFloat16) {
      bits = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      bits = to_bfloat16(value);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), bits);
  }
}

// exp(d) for d >= -150 or NaN: 2^n * exp(r), |r| <= ln(2) / 2, polynomial of Cephes' expf.
inline F exp_clamped(F d) {
  const F n = _mm512_roundscale_ps(mul(d, set1(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), d));
  F p = fma(set1(1.9875691500e-4f), r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return _mm512_scalef_ps(p, n);
}

}  // namespace
}  // namespace r1v3

#include "rows_impl.h"

namespace r1v3 {
const RowKernels kAvx512Rows = {"avx512", forward_any, backward_any};
}
