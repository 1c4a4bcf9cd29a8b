// Kernels that walk one row of logits, one table of functions per instruction set.
#pragma once

#include <cstdint>

namespace r1v3 {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct RowGradient {
  float lse;    // or the maximum of y, with log s beside it
  float log_s;  // 0 when lse holds all of it
  float entropy;
  float grad_logprob;
  float grad_entropy;
};

// A row is `vocab` contiguous elements; `target` outside [0, vocab) means none.
struct RowKernels {
  const char* name;
  // stats = (m, s, w, t), see cpu/logits.h.
  void (*forward)(const void* logits, int dtype, int64_t vocab, int64_t target, double temperature,
                  float* stats);
  // grad_logits may be the same row as logits.
  void (*backward)(const void* logits, int dtype, int64_t vocab, int64_t target,
                   double temperature, const RowGradient& upstream, void* grad_logits);
};

extern const RowKernels kPortableRows;
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;

}  // namespace r1v3
