// CPU kernels. Pointers are to host memory; a null pointer means "absent" where said so.
#pragma once

#include <cstdint>

#include "grpo.h"
#include "rows.h"

namespace r1v3 {

struct LogitsView {
  const void* data;
  int dtype;           // DType
  int64_t n_rows;      // rows to compute
  int64_t row_stride;  // elements
  int64_t vocab;       // elements of a row that take part
  const int64_t* rows;       // [n_rows] row numbers, or null for 0 .. n_rows - 1
  const int64_t* token_ids;  // [n_rows], or null; outside [0, vocab) means no target
  double temperature;
  int num_threads;
  const double* temperatures;  // [n_rows], or null: `temperature` for every row
};

// What a shard of the vocabulary tells the others: stats[i] = (m, s, w, t) with m the largest logit
// x, s and w as in RowStatistics and t = x[token_id], or 0 without a target.
void row_statistics(const Kernels& kernels, const LogitsView& view, float* stats);

// In nats, with s, w and d = (t - m) / temperature in double:
//   logprobs = d - log s, -inf for a row of -inf and 0 without a target;
//   entropy = log s - w / s, 0 for a row of -inf, and 0 for a null `entropy`;
//   saved[i] = (m, log s, entropy), what row_gradient needs.
void logprobs_and_entropy(const Kernels& kernels, const LogitsView& view, float* logprobs,
                          float* entropy, float* saved);

// dx = [g_lp (1[v = token] - p) - g_H p (log p + H)] / temperature, p = exp((x - m) / T - log s), in
// the logits' dtype, written to the same row numbers of grad_logits (which may be the logits).
// Rows whose upstream gradients are 0 or absent, rows of -inf and temperature 0 give 0 unread.
struct GradientInputs {
  const float* saved;          // [n_rows, 3]
  const float* grad_logprobs;  // or null
  const float* grad_entropy;   // or null
  double softcap;              // c where the logits are c tanh(z / c) and dz is asked for, or 0
};
void row_gradient(const Kernels& kernels, const LogitsView& view, const GradientInputs& inputs,
                  void* grad_logits, int64_t grad_row_stride);

// The position of the first id that is neither in [0, vocab) nor `ignored`, or -1.
int64_t first_outside(const int64_t* ids, int64_t n, int64_t vocab, int64_t ignored);

enum class Baseline { kMean = 0, kLeaveOneOut = 1, kNone = 2 };
enum class Scale { kGroup = 0, kBatch = 1, kNone = 2 };

struct AdvantageOptions {
  Baseline baseline;
  Scale scale;
  int ddof;
  double eps;
  bool keep_singletons;  // a group of one keeps its raw reward instead of 0
};

// Group g holds the samples order[offsets[g] .. offsets[g + 1]), or these positions themselves for a
// null order; results go to the sample's place. A group (or batch) without variance gives exactly
// 0, NaN where a reward is not finite.
void group_advantages(const float* rewards, const int64_t* order, const int64_t* offsets,
                      int64_t n_groups, const AdvantageOptions& options, int num_threads,
                      float* out);

// Sorts n samples by group id, samples of a group in their order: fills order [n] and
// offsets [n + 1], and returns the number of groups.
int64_t segments_of_ids(const int64_t* ids, int64_t n, int64_t* order, int64_t* offsets);

constexpr int kGrpoMetrics = 9;

// loss[0], or loss[N] of the tokens with Aggregation::kNone, grad[N] = d loss / d logprobs, of each
// token's own loss then, and metrics[9]: clip_low, clip_high and dual-clip
// fractions, mean of old - current, mean reference KL, ratio mean and max, tokens, and tokens with a
// non-finite input. grad is 0 at masked tokens and from seq_offsets[S] on.
void grpo_loss(const Kernels& kernels, const GrpoInputs& inputs,
               const GrpoOptions& options, int num_threads, float* loss, float* grad,
               float* metrics);

// logits[r, id - vocab_start] = -inf for every enabled row; ids outside the shard are skipped.
void ban_tokens(void* logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                const int64_t* ids, int64_t n_ids, const uint8_t* enabled, int64_t vocab_start);

// The sum of n floats, read by num_threads threads: the bandwidth that `benchmarks` compares with.
double read_sum(const Kernels& kernels, const float* values, int64_t n, int num_threads);

}  // namespace r1v3
