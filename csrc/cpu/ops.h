// Host kernels. Pointers are to host memory; a null pointer means "absent" where said so.
#pragma once

#include <cstdint>

#include "rows.h"

namespace r1v3 {

struct LogitsView {
  int dtype;           // DType
  int64_t n_rows;      // rows to compute
  int64_t row_stride;  // elements
  int64_t vocab;       // elements of a row that take part
  const int64_t* rows;       // [n_rows] row numbers, or null for 0 .. n_rows - 1
  const int64_t* token_ids;  // [n_rows], or null; outside [0, vocab) means no target
  double temperature;
  int num_threads;
};

// stats[i] = (m, s, w, t) of y = x / temperature: m = max y, s = sum exp(y - m),
// w = sum exp(y - m) (y - m), t = y[token_id] or 0. Then, in nats,
// logprob = t - m - log s and entropy = log s - w / s. -inf adds nothing; a row of -inf gives
// (-inf, 0, 0, t); NaN or +inf anywhere makes s NaN. At temperature 0, y = x and s counts the maxima.
void logprobs_and_entropy_forward(const RowKernels& kernels, const void* logits,
                                  const LogitsView& view, float* stats);

// dx = [g_lp (1[v = token] - p) - g_H p (log p + H)] / temperature, p = exp(y - lse), in the logits'
// dtype, written to the same row numbers of grad_logits (which may be the logits themselves).
// Rows whose two upstream gradients are 0 or absent, rows with lse = -inf and temperature 0 give 0
// without reading. lse may be split in two, m and log s: their float32 sum loses digits where the
// logits are large.
struct BackwardInputs {
  const float* lse;            // m + log s, or m when log_s is given
  const float* log_s;          // or null
  const float* entropy;
  const float* grad_logprobs;  // or null
  const float* grad_entropy;   // or null
};
void logprobs_and_entropy_backward(const RowKernels& kernels, const void* logits,
                                   const LogitsView& view, const BackwardInputs& inputs,
                                   void* grad_logits, int64_t grad_row_stride);

enum class Baseline { kMean = 0, kLeaveOneOut = 1, kNone = 2 };
enum class Scale { kGroup = 0, kBatch = 1, kNone = 2 };

struct AdvantageOptions {
  Baseline baseline;
  Scale scale;
  int ddof;
  double eps;
  bool keep_singletons;  // a group of one keeps its raw reward instead of 0
};

// Group g holds the samples order[offsets[g] .. offsets[g + 1]); results go to the sample's place.
// A group (or batch) without variance gives exactly 0, NaN where a reward is not finite.
void group_advantages(const float* rewards, const int64_t* order, const int64_t* offsets,
                      int64_t n_groups, const AdvantageOptions& options, float* out);

enum class KL { kK1 = 0, kK2 = 1, kK3 = 2 };
enum class Aggregation { kSequenceMean = 0, kTokenMean = 1, kSequenceSum = 2, kConstant = 3 };

struct PolicyLossInputs {
  const float* logprobs;      // [N]
  const float* old_logprobs;  // [N] or null: equal to logprobs
  const float* advantages;    // [N] or [S]
  bool advantage_is_per_token;
  const uint8_t* mask;        // [N], 0 = ignored
  const float* ref_logprobs;  // [N] or null
  const float* weights;       // [N], [S] or null
  bool weights_is_per_token;
  const int64_t* seq_offsets;  // [S + 1]
  int64_t n_seqs;
};

struct PolicyLossOptions {
  double clip_low, clip_high;
  double dual_clip;  // <= 0: none
  double kl_coef;
  KL kl;
  Aggregation aggregation;
  double normalizer;  // <= 0: counted from the mask
  int num_threads;
};

constexpr int kPolicyLossMetrics = 9;

// loss[0], grad[N] = d loss / d logprobs, and metrics[9]: clip_low, clip_high and dual-clip
// fractions, mean of old - current, mean reference KL, ratio mean and max, tokens, and tokens with a
// non-finite input. grad outside [seq_offsets[0], seq_offsets[S]) is left alone.
void grpo_loss(const PolicyLossInputs& inputs, const PolicyLossOptions& options, float* loss,
               float* grad, float* metrics);

// logits[r, id - vocab_start] = -inf for every enabled row; ids outside the shard are skipped.
void ban_tokens(void* logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                const int64_t* ids, int64_t n_ids, const uint8_t* enabled, int64_t vocab_start);

}  // namespace r1v3
