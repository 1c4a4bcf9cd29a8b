// Drawing one token per row of logits.
#pragma once

#include <cstdint>

namespace r1v3 {

// A step of the references, and the units of the lower part in one of the upper.
constexpr double kSampleBits = 36.0, kSampleUnit = 0x1p36;

struct SampleSums {
  double upper, lower, weighted;
};

// What the shards of a row tell each other, all of them numbers that merge in any order.
struct SampleRow {
  double reference;            // -inf for a row without a legal token
  double upper, lower;         // of all weights; NaN where a logit is NaN or +inf
  double weighted;             // of weight times z - reference
  double top, top_id, bad_id;  // the largest logit, its first id where the row is greedy, and the
                               // first id of a NaN or +inf; -1 for none
};

constexpr int64_t kSampleChunk = 512;  // logits
constexpr int64_t kPartNumbers = 3;     // of a chunk: its reference, upper and lower

struct Kernels;

struct SampleView {
  const void* logits;
  int dtype;
  int64_t n_rows, row_stride, vocab;
  int64_t first_id;           // of column 0
  const double* temperature;  // [n_rows]; 0 is greedy
  const int64_t* banned;      // [n_banned] ids, in any order; those of other shards are skipped
  int64_t n_banned;
  const uint8_t* enabled;     // [n_rows], where the ban holds; null: everywhere
  const double* floor;        // [n_rows], smaller logits are not drawn; null: all are
  int num_threads;
};

struct SampleDraw {
  const double* uniforms;  // [n_rows]
  const int64_t* forced;   // [n_rows], -1 where the token is drawn; null: everywhere
};

// Results [n_rows]: token id, or -1 where another shard owns it, which then knows the logprob.
struct SampleResults {
  int64_t* tokens;
  float *logprobs, *entropy;
};

inline int64_t sample_chunks(int64_t vocab) { return (vocab + kSampleChunk - 1) / kSampleChunk; }

void sample_tokens(const Kernels& kernels, const SampleView& view, const SampleDraw& draw,
                   const SampleResults& results);

// The same for a shard, before the ranks exchange rows and after it. parts: [n_rows, chunks, 3].
void sample_statistics(const Kernels& kernels, const SampleView& view, double* parts,
                       SampleRow* rows);
// all: [ranks, n_rows].
void sample_choose(const Kernels& kernels, const SampleView& view, const double* parts,
                   const SampleRow* all, int64_t ranks, int64_t rank, const SampleDraw& draw,
                   const SampleResults& results);

}  // namespace r1v3
