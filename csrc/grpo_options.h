// Options of the GRPO loss, for the CPU and the CUDA kernels. One more option is one more number in
// the list that Python passes, here and in GrpoOptions.as_floats of r1v3/kernels.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define R1V3_BOTH __host__ __device__ __forceinline__
#else
#define R1V3_BOTH inline __attribute__((always_inline))
#endif

namespace r1v3 {

enum class RatioClip { kPpo = 0, kCispo = 1 };
enum class KL { kK1 = 0, kK2 = 1, kK3 = 2 };
enum class Aggregation { kSequenceMean = 0, kTokenMean = 1, kSequenceSum = 2, kConstant = 3, kNone = 4 };

// Differences of log-probabilities are clamped to +-20, where no gradient flows.
constexpr float kMaximumLogRatio = 20.0f;

struct GrpoOptions {
  double clip_low, clip_high;
  double dual_clip;  // <= 0: none; without effect on kCispo
  RatioClip ratio_clip;
  double kl_coef;
  KL kl;
  bool unbiased_kl;
  Aggregation aggregation;
};

enum class Policy { kClipped, kDualClipped, kCispo };

R1V3_BOTH Policy policy_of(const GrpoOptions& options) {
  if (options.ratio_clip == RatioClip::kCispo) return Policy::kCispo;
  return options.dual_clip > 0.0 ? Policy::kDualClipped : Policy::kClipped;
}

inline GrpoOptions grpo_options(const std::vector<double>& numbers) {
  if (numbers.size() != 8) {
    throw std::invalid_argument("options must be 8 numbers, got " + std::to_string(numbers.size()));
  }
  const auto code = [](double number, int count, const char* names) {
    for (int i = 0; i < count; ++i) {
      if (number == i) return i;
    }
    throw std::invalid_argument(std::string(names) + ", got " + std::to_string(number));
  };
  const int ratio_clip = code(numbers[3], 2, "ratio_clip must be 0 (ppo) or 1 (cispo)");
  const int kl = code(numbers[5], 3, "kl must be 0 (k1), 1 (k2) or 2 (k3)");
  const int unbiased_kl = code(numbers[6], 2, "unbiased_kl must be 0 or 1");
  const int aggregation = code(numbers[7], 5,
                               "aggregation must be 0 (sequence-mean), 1 (token-mean), "
                               "2 (sequence-sum), 3 (constant) or 4 (none)");
  return {numbers[0], numbers[1], numbers[2], static_cast<RatioClip>(ratio_clip), numbers[4],
          static_cast<KL>(kl), unbiased_kl == 1, static_cast<Aggregation>(aggregation)};
}

}  // namespace r1v3
