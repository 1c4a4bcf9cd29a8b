#include <algorithm>
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
  if (!result.constant) result.std = std::sqrt(squares / std::max<int64_t>(n - ddof, 1));
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
    const bool needs_group = options.baseline != Baseline::kNone || options.scale == Scale::kGroup;
    if (n == 1 && needs_group) {
      const float reward = rewards[members[0]];
      out[members[0]] = options.keep_singletons ? reward : 0.0f * reward;
      continue;
    }
    const Moments group = moments(rewards, members, n, options.ddof);
    const double std = options.scale == Scale::kGroup ? group.std : batch_std;
    const bool zero = (options.scale != Scale::kNone && std == 0.0) ||
                      (options.baseline != Baseline::kNone && group.constant);
    const double denominator = options.scale == Scale::kNone ? 1.0 : std + options.eps;
    for (int64_t k = 0; k < n; ++k) {
      double value = rewards[members[k]];
      if (zero) {
        out[members[k]] = static_cast<float>(0.0 * value);
        continue;
      }
      if (options.baseline == Baseline::kMean) value -= group.mean;
      if (options.baseline == Baseline::kLeaveOneOut) value = (value - group.mean) * n / (n - 1);
      out[members[k]] = static_cast<float>(value / denominator);
    }
  }
}

}  // namespace r1v3
