#include <cmath>
#include <cstdint>

#include "ops.h"

namespace r1v3 {
namespace {

struct Moments {
  double mean = 0.0;
  double std = 0.0;
  bool constant = true;
};

// Two passes: E[x^2] - E[x]^2 loses the variance of rewards with a large common part.
Moments moments(const float* rewards, const int64_t* order, int64_t n, int ddof) {
  Moments result;
  if (n == 0) return result;
  const float first = rewards[order[0]];
  double sum = 0.0;
  for (int64_t k = 0; k < n; ++k) {
    sum += rewards[order[k]];
    result.constant = result.constant && rewards[order[k]] == first;
  }
  result.mean = sum / n;
  double squares = 0.0;
  for (int64_t k = 0; k < n; ++k) {
    const double difference = rewards[order[k]] - result.mean;
    squares += difference * difference;
  }
  if (!result.constant) result.std = std::sqrt(squares / (n - ddof));
  return result;
}

}  // namespace

void group_advantages(const float* rewards, const int64_t* order, const int64_t* offsets,
                      int64_t n_groups, const AdvantageOptions& options, float* out) {
  const int64_t total = n_groups > 0 ? offsets[n_groups] - offsets[0] : 0;
  double batch_std = 0.0;
  if (options.scale == Scale::kBatch && total > 0) {
    batch_std = moments(rewards, order + offsets[0], total, options.ddof).std;
  }
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t* members = order + offsets[g];
    const int64_t n = offsets[g + 1] - offsets[g];
    if (n == 1) {
      out[members[0]] = options.keep_singletons ? rewards[members[0]] : 0.0f;
      continue;
    }
    const Moments group = moments(rewards, members, n, options.ddof);
    double denominator = 1.0;
    if (options.scale == Scale::kGroup) denominator = group.std + options.eps;
    if (options.scale == Scale::kBatch) denominator = batch_std + options.eps;
    // A group without variance teaches nothing; only the raw reward (no baseline) keeps it.
    const bool zero = group.constant && (options.baseline != Baseline::kNone ||
                                         options.scale == Scale::kGroup);
    for (int64_t k = 0; k < n; ++k) {
      double value = rewards[members[k]];
      if (options.baseline == Baseline::kMean) value -= group.mean;
      if (options.baseline == Baseline::kLeaveOneOut) value = (value - group.mean) * n / (n - 1);
      out[members[k]] = zero ? 0.0f : static_cast<float>(value / denominator);
    }
  }
}

}  // namespace r1v3
