// The loops that are worth vector code, one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "grpo.h"
#include "sampling.h"

namespace r1v3 {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A row is `vocab` contiguous elements x; y = x / temperature. At temperature 0, s counts the maxima.
struct RowStatistics {
  float m;   // largest x that is not NaN, -inf without elements
  double s;  // sum of exp(y - m / temperature), 0 for a row of -inf, NaN if any x is NaN or +inf
  double w;  // sum of exp(y - m / temperature) (y - m / temperature); 0 unless asked for
};

struct RowGradient {
  float m, log_s, entropy;
  float grad_logprob, grad_entropy;
  float inverse_softcap;  // 1 / c of float32 logits that are c tanh(z / c) and want dz, or 0
};

struct Kernels {
  const char* name;
  RowStatistics (*statistics)(const void* logits, int dtype, int64_t vocab, double temperature,
                              bool weighted);
  // The element as float32.
  float (*element)(const void* logits, int dtype, int64_t index);
  // `target` outside [0, vocab) means none. grad_logits may be the same row as logits; `stream`
  // writes past the caches, for rows that nobody reads soon.
  void (*gradient)(const void* logits, int dtype, int64_t vocab, int64_t target,
                   double temperature, const RowGradient& upstream, bool stream,
                   void* grad_logits);
  // Adds the tokens of a block to `sums` and writes their gradient, and their losses where not null.
  void (*grpo_block)(const GrpoInputs& inputs, const GrpoOptions& options,
                       const GrpoBlock& block, double coefficient, float* losses,
                       float* grad, GrpoSums* sums);
  // The sum of n floats as fast as memory delivers them: what the benchmarks compare with.
  double (*read_sum)(const float* values, int64_t n);
  // Sums of the parts of the weights 2^(x scale) of n logits, NaN where one is NaN.
  SampleSums (*sample_sums)(const float* x, int64_t n, double scale, double reference);
  // The first of n logits at which the sum of weights, which starts at the given one, passes the
  // threshold; the last one if none does.
  int64_t (*sample_find)(const float* x, int64_t n, double scale, double reference, double upper,
                         double lower, double threshold);
  void (*to_float)(const void* x, int dtype, int64_t n, float* out);
  // The largest that is not NaN, -inf without one.
  double (*float_max)(const float* x, int64_t n);
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace r1v3
