// AVX-512 (F, BW, DQ, VL) kernels.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own undefined vectors
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "rows.h"

namespace r1v3 {
namespace {

using F = __m512;
using D = __m512d;
constexpr int kWidth = 16;
constexpr int64_t kStreamAlignment = 64;

struct Pair {
  F first, second;
};

inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max_keep_second(F a, F b) { return _mm512_max_ps(a, b); }
inline F nearest(F z) {
  return _mm512_roundscale_ps(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline D nearest(D z) {
  return _mm512_roundscale_pd(z, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F times_power_of_two(F p, F n) { return _mm512_scalef_ps(p, n); }
inline void store_fence() { _mm_sfence(); }

// bfloat16: the even elements and the odd ones.
template <int D, typename T>
inline Pair load_pair(const T* x) {
  if constexpr (D == kFloat32) return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + kWidth)};
  const __m512i bits = _mm512_loadu_si512(x);
  if constexpr (D == kBFloat16) {
    const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(~0xffff));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(odd)};
  }
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))};
}

// The bits of a float32 whose upper half is the nearest bfloat16.
inline __m512i rounded_to_bfloat16(F value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(_mm512_add_epi32(bits, bias), nan, bits,
                              _mm512_set1_epi32(0x400000));
}

template <bool Stream>
inline void store_bits(void* x, __m512i bits) {
  if constexpr (Stream) {
    _mm512_stream_si512(static_cast<__m512i*>(x), bits);
  } else {
    _mm512_storeu_si512(x, bits);
  }
}

template <int D, bool Stream, typename T>
inline void store_pair(T* x, const Pair& v) {
  if constexpr (D == kFloat32) {
    store_bits<Stream>(x, _mm512_castps_si512(v.first));
    store_bits<Stream>(x + kWidth, _mm512_castps_si512(v.second));
  } else if constexpr (D == kBFloat16) {
    const __m512i even = _mm512_srli_epi32(rounded_to_bfloat16(v.first), 16);
    store_bits<Stream>(x, _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded_to_bfloat16(v.second)));
  } else {
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(v.first, kRound));
    store_bits<Stream>(x, _mm512_inserti64x4(low, _mm512_cvtps_ph(v.second, kRound), 1));
  }
}

}  // namespace
}  // namespace r1v3

#include "grpo_impl.h"
#include "rows_impl.h"
#include "sample_impl.h"

namespace r1v3 {
const Kernels kAvx512Kernels = {"avx512", statistics_any, element_any, gradient_any, grpo_block,
                                read_sum, sample_sums, sample_find, to_float, float_max};
}
