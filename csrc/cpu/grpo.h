// Plain data of the GRPO loss on the CPU. Null pointers mean "absent" where said so.
#pragma once

#include <cstdint>

#include "../grpo_options.h"

namespace r1v3 {

struct GrpoInputs {
  int64_t n_tokens;           // N
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
  double normalizer;  // <= 0: counted from the mask
};

struct GrpoBlock {
  int64_t sequence, begin, end;  // tokens [begin, end)
};

// Sums over valid tokens; `loss` without the coefficient of the block's sequence.
struct GrpoSums {
  double loss, clip_low, clip_high, dual_clip, approx_kl, ref_kl, ratio, ratio_max, tokens,
      nonfinite;
};

}  // namespace r1v3
