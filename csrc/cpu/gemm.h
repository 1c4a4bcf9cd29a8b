// Matrix products of float32 and bfloat16, in any combination, with float32 results. torch has none
// of bfloat16 on the CPU, and its float32 ones are slow where few rows meet a large weight.
#pragma once

#include <cstdint>
#include <string>

namespace r1v3 {

// Element (i, k) is data[i * stride + k * k_stride]; k is the summed dimension.
struct MatrixView {
  const void* data;
  int dtype;     // kFloat32 or kBFloat16
  int64_t size;  // of i
  int64_t stride;
  int64_t k_stride;
};

// What is compiled for an instruction set. A panel holds `width` rows of a view as [units][width]; a
// unit is 32 bits: one float32, or two bfloat16 that are neighbors in k, 0 where there are no more.
struct GemmKernels {
  int most_rows;  // width of a panel of a, at most
  int columns;    // width of a panel of b, 0 where b has no more rows
  int per_unit;   // elements
  // By dtype, null where it cannot be multiplied. Packs rows [first, first + rows) and elements
  // [begin, end) of k. `ahead` bytes from each of them lies what will be packed next.
  void (*pack[2])(const MatrixView& x, int64_t first, int rows, int64_t begin, int64_t end, int width,
               int64_t ahead, uint32_t* panel);
  // The product of two panels, a block of c of rows x columns, or that added to it.
  void (*multiply)(const uint32_t* a, const uint32_t* b, int64_t units, float* c,
                   int64_t c_stride, int rows, int columns, bool add);
};

extern const GemmKernels kAvx2GemmFloat32;
extern const GemmKernels kAvx512GemmFloat32;
extern const GemmKernels kAvx512GemmBFloat16;

// The fastest for two DTypes, or the one of this capability; null if the machine has none.
const GemmKernels* gemm_kernels(int a_dtype, int b_dtype, const std::string& capability);

// Whether pairs of bfloat16 are multiplied as they are; otherwise they become float32 in the panels.
bool has_bfloat16_dot(const std::string& capability);

// c[i, j] = sum_k a[i, k] b[j, k], or += with `add`; c has contiguous rows of stride c_stride.
// Sums are float32, and an element's bits depend on its row of a and of b alone: neither on its place
// nor on the number of threads. The smaller operand is copied, the larger one panel by panel.
void gemm(const GemmKernels& kernels, const MatrixView& a, const MatrixView& b, int64_t k, float* c,
          int64_t c_stride, bool add, int num_threads);

}  // namespace r1v3
