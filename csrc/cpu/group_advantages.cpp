#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace r1v3 {
namespace {

constexpr int kLanes = 8;
constexpr int64_t kGroupsAtOnce = 64;
constexpr int64_t kRewardCost = 8;  // a reward costs about as much as this many logits

// Lane by lane, for the compiler's vectors; the order depends on n alone.
template <typename Term>
double sum_of(int64_t n, const Term& term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(i + k);
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += term(i);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

struct Moments {
  double mean, std;
  bool constant;
};

double mean_of(const float* rewards, int64_t n) {
  return sum_of(n, [&](int64_t i) { return double{rewards[i]}; }) / n;
}

// A second pass: E[x^2] - E[x]^2 loses the variance of rewards with a large common part.
Moments moments(const float* rewards, int64_t n, double mean, int ddof) {
  const double squares = sum_of(n, [&](int64_t i) {
    const double difference = rewards[i] - mean;
    return difference * difference;
  });
  const float first = rewards[0];
  int different = 0;
  for (int64_t i = 0; i < n; ++i) different |= rewards[i] != first;
  const double variance = squares / std::max<int64_t>(n - ddof, 1);
  return {mean, different ? std::sqrt(variance) : 0.0, different == 0};
}

void write_group(const float* rewards, int64_t n, const Moments& group, double batch_std,
                 const AdvantageOptions& options, float* out) {
  const bool centered = options.baseline != Baseline::kNone;
  if (n == 1 && (centered || options.scale == Scale::kGroup)) {
    out[0] = options.keep_singletons ? rewards[0] : 0.0f * rewards[0];
    return;
  }
  const double std = options.scale == Scale::kGroup ? group.std : batch_std;
  const bool scaled = options.scale != Scale::kNone;
  if ((scaled && std == 0.0) || (centered && group.constant)) {
    for (int64_t i = 0; i < n; ++i) out[i] = 0.0f * rewards[i];
    return;
  }
  const double shift = centered ? group.mean : 0.0;
  const bool others = options.baseline == Baseline::kLeaveOneOut;
  const double factor =
      (others ? static_cast<double>(n) / (n - 1) : 1.0) / (scaled ? std + options.eps : 1.0);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>((rewards[i] - shift) * factor);
}

// Step by step for several groups, so that the divisions and roots of one do not wait for another's.
void some_groups(const float* rewards, const int64_t* offsets, int64_t n_groups, double batch_std,
                 const AdvantageOptions& options, float* out) {
  Moments groups[kGroupsAtOnce];
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t n = offsets[g + 1] - offsets[g];
    groups[g].mean = n > 0 ? mean_of(rewards + offsets[g], n) : 0.0;
  }
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t n = offsets[g + 1] - offsets[g];
    if (n > 0) groups[g] = moments(rewards + offsets[g], n, groups[g].mean, options.ddof);
  }
  for (int64_t g = 0; g < n_groups; ++g) {
    const int64_t start = offsets[g], n = offsets[g + 1] - start;
    if (n > 0) write_group(rewards + start, n, groups[g], batch_std, options, out + start);
  }
}

// Ids of a range not much wider than their number are sorted by counting.
constexpr int64_t kCountedIdsPerSample = 4;

bool sort_by_counting(const int64_t* ids, int64_t n, int64_t* order) {
  const auto [low, high] = std::minmax_element(ids, ids + n);
  // Unsigned: the difference of two int64 may not be one.
  const uint64_t range = static_cast<uint64_t>(*high) - static_cast<uint64_t>(*low);
  if (range >= static_cast<uint64_t>(kCountedIdsPerSample * n)) return false;
  std::vector<int64_t> place(range + 2);
  for (int64_t i = 0; i < n; ++i) ++place[ids[i] - *low + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  for (int64_t i = 0; i < n; ++i) order[place[ids[i] - *low]++] = i;
  return true;
}

}  // namespace

void group_advantages(const float* rewards, const int64_t* order, const int64_t* offsets,
                      int64_t n_groups, const AdvantageOptions& options, int num_threads,
                      float* out) {
  if (n_groups == 0) return;
  const int64_t begin = offsets[0], total = offsets[n_groups] - begin;
  std::vector<float> sorted, results;
  const float* members = rewards;
  float* target = out;
  if (order) {
    sorted.resize(total);
    results.resize(total);
    for (int64_t i = 0; i < total; ++i) sorted[i] = rewards[order[begin + i]];
    members = sorted.data() - begin;
    target = results.data() - begin;
  }
  double batch_std = 0.0;
  if (options.scale == Scale::kBatch && total > 0) {
    const double mean = mean_of(members + begin, total);
    batch_std = moments(members + begin, total, mean, options.ddof).std;
  }
  const int64_t blocks = (n_groups + kGroupsAtOnce - 1) / kGroupsAtOnce;
  parallel_for(blocks, kRewardCost * total / blocks, num_threads, [&](int64_t b) {
    const int64_t first = b * kGroupsAtOnce, count = std::min(kGroupsAtOnce, n_groups - first);
    some_groups(members, offsets + first, count, batch_std, options, target);
  });
  if (order) {
    for (int64_t i = 0; i < total; ++i) out[order[begin + i]] = results[i];
  }
}

int64_t segments_of_ids(const int64_t* ids, int64_t n, int64_t* order, int64_t* offsets) {
  offsets[0] = 0;
  if (n == 0) return 0;
  if (std::is_sorted(ids, ids + n)) {
    std::iota(order, order + n, int64_t{0});
  } else if (!sort_by_counting(ids, n, order)) {
    std::iota(order, order + n, int64_t{0});
    std::stable_sort(order, order + n, [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  }
  int64_t groups = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (ids[order[i]] != ids[order[i - 1]]) offsets[++groups] = i;
  }
  offsets[++groups] = n;
  return groups;
}

}  // namespace r1v3
