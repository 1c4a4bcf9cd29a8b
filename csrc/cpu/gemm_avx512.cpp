// AVX-512 (F, BW, VL) parts of the product with float32 arithmetic.
#include "gemm_avx512_units.h"

namespace r1v3 {
namespace {

constexpr int kPerUnit = 1;

inline Units load_all(const float* x) { return load_units(x); }
inline Units load(const float* x, int64_t n) {
  return _mm512_maskz_loadu_epi32(first_lanes(n), x);
}
inline uint32_t unit_of(const float* x, int64_t, bool) {
  uint32_t unit;
  __builtin_memcpy(&unit, x, sizeof unit);
  return unit;
}

// bfloat16 is the upper half of a float32.
inline Units widened(__m256i halves) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
inline Units load_all(const uint16_t* x) {
  return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Units load(const uint16_t* x, int64_t n) {
  return widened(_mm256_maskz_loadu_epi16(first_lanes(n), x));
}
inline uint32_t unit_of(const uint16_t* x, int64_t, bool) { return uint32_t{*x} << 16; }

template <typename Element>
inline Units neighbors(const Element* x, int64_t, int n, bool) {
  return load(x, n);
}
inline F multiply_add(Units a, Units b, F sum) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

}  // namespace
}  // namespace r1v3

#include "gemm_impl.h"

namespace r1v3 {
const GemmKernels kAvx512GemmFloat32 = {kMostRows, kColumns, kPerUnit, {pack<float>, pack<uint16_t>}, multiply};
}
