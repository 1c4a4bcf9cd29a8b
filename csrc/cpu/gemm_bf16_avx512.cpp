// AVX-512 BF16 parts of the bfloat16 product. No library template may be instantiated here: see
// rows_impl.h.
#include <immintrin.h>

#include "gemm_bf16.h"

namespace r1v3 {

void pack_panel(const BFloat16View& x, int64_t first, int width, int64_t k, uint32_t* panel) {
  const int64_t left = x.size - first;
  const int lanes = left < width ? static_cast<int>(left) : width;
  const uint16_t* base = x.data + first * x.stride;
  if (lanes < width) __builtin_memset(panel, 0, (k + 1) / 2 * width * sizeof(*panel));
  if (x.k_stride == 1) {
    for (int lane = 0; lane < lanes; ++lane) {
      const uint16_t* row = base + lane * x.stride;
      uint32_t* out = panel + lane;
      for (int64_t i = 0; i < k / 2; ++i) {
        __builtin_memcpy(out + i * width, row + 2 * i, sizeof(*out));
      }
      if (k % 2) out[k / 2 * width] = row[k - 1];
    }
    return;
  }
  for (int64_t i = 0; i < (k + 1) / 2; ++i) {
    const uint16_t* low = base + 2 * i * x.k_stride;
    uint32_t* out = panel + i * width;
    if (2 * i + 1 == k) {
      for (int lane = 0; lane < lanes; ++lane) out[lane] = low[lane * x.stride];
    } else if (x.stride == 1) {
      const uint16_t* high = low + x.k_stride;
      for (int lane = 0; lane < lanes; ++lane) {
        out[lane] = low[lane] | static_cast<uint32_t>(high[lane]) << 16;
      }
    } else {
      const uint16_t* high = low + x.k_stride;
      for (int lane = 0; lane < lanes; ++lane) {
        out[lane] = low[lane * x.stride] | static_cast<uint32_t>(high[lane * x.stride]) << 16;
      }
    }
  }
}

void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c,
                     int64_t c_stride, int rows, int columns, bool add) {
  __m512 sums[kPanelA][2];
#pragma GCC unroll 14
  for (int i = 0; i < kPanelA; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * kPanelB);
    const __m512bh right = (__m512bh)_mm512_loadu_si512(b + k * kPanelB + 16);
#pragma GCC unroll 14
    for (int i = 0; i < kPanelA; ++i) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[k * kPanelA + i]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], pair, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], pair, right);
    }
  }
  const uint32_t valid = columns == kPanelB ? 0xffffffffu : (1u << columns) - 1;
  const __mmask16 masks[2] = {static_cast<__mmask16>(valid), static_cast<__mmask16>(valid >> 16)};
#pragma GCC unroll 14
  for (int i = 0; i < kPanelA; ++i) {
    if (i >= rows) continue;
    for (int half = 0; half < 2; ++half) {
      float* out = c + i * c_stride + 16 * half;
      __m512 value = sums[i][half];
      if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(masks[half], out));
      _mm512_mask_storeu_ps(out, masks[half], value);
    }
  }
}

}  // namespace r1v3
