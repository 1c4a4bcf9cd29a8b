// AVX-512 (F, BW, VL, BF16) parts of the product of pairs of bfloat16.
#include "gemm_avx512_units.h"

namespace r1v3 {
namespace {

constexpr int kPerUnit = 2;

inline Units load_all(const uint16_t* x) { return load_units(x); }
inline Units load(const uint16_t* x, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 2 * kLanes ? 0xffffffffu : (1u << n) - 1, x);
}
inline Units neighbors(const uint16_t* x, int64_t k_stride, int n, bool pairs) {
  const __mmask16 exist = first_lanes(n), second = pairs ? exist : 0;
  const Units low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, x));
  const Units high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, x + k_stride));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
inline uint32_t unit_of(const uint16_t* x, int64_t k_stride, bool pairs) {
  return x[0] | (pairs ? uint32_t{x[k_stride]} << 16 : 0);
}
inline F multiply_add(Units a, Units b, F sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

}  // namespace
}  // namespace r1v3

#include "gemm_impl.h"

namespace r1v3 {
const GemmKernels kAvx512GemmBFloat16 = {
    kMostRows, kColumns, kPerUnit, {nullptr, pack<uint16_t>}, multiply};
}
