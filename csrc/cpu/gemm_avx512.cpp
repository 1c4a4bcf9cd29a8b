// AVX-512 (F) parts of the float32 product.
#include "gemm_avx512_units.h"

namespace r1v3 {
namespace {

using Element = float;
constexpr int kPerUnit = 1;

inline Units load(const float* x, int64_t n) {
  return _mm512_maskz_loadu_epi32(first_lanes(n), x);
}
inline Units neighbours(const float* x, int64_t, int n, bool) { return load(x, n); }
inline F multiply_add(Units a, Units b, F sum) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

}  // namespace
}  // namespace r1v3

#include "gemm_impl.h"

namespace r1v3 {
const GemmKernels kAvx512GemmFloat32 = {kMostRows, kColumns, kPerUnit, pack, multiply};
}
