// Matrix products of bfloat16 with float32 results, which torch does not offer on the CPU.
#pragma once

#include <cstdint>

namespace r1v3 {

// Element (i, k) is data[i * stride + k * k_stride]; k is the summed dimension.
struct BFloat16View {
  const uint16_t* data;
  int64_t size;  // of i
  int64_t stride;
  int64_t k_stride;
};

// Whether this machine has the instructions (AVX-512 BF16).
bool has_gemm_bf16();

// c[i, j] = sum_k a[i, k] b[j, k], or += with `add`; c has contiguous rows of stride c_stride.
// Sums are float32, and an element's bits depend on its row of a and of b alone: neither on its place
// nor on the number of threads.
void gemm_bf16(const BFloat16View& a, const BFloat16View& b, int64_t k, float* c, int64_t c_stride,
               bool add, int num_threads);

// Parts that are compiled for the instruction set. A panel holds `width` rows of a view as
// [ceil(k / 2)][width] pairs of neighbours in k, 0 where there are no more.
constexpr int kPanelA = 14;
constexpr int kPanelB = 32;

void pack_panel(const BFloat16View& x, int64_t first, int width, int64_t k, uint32_t* panel);

// A kPanelA x kPanelB block of c, of which rows x columns exist.
void multiply_panels(const uint32_t* a, const uint32_t* b, int64_t pairs, float* c,
                     int64_t c_stride, int rows, int columns, bool add);

}  // namespace r1v3
