#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace r1v3 {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int64_t kCost = 4;  // of a logit, in logits of the cheapest loop
const double kInfinity = INFINITY;

// Temperature 0 draws greedily, with the numbers of temperature 1.
double scale_of(double temperature) {
  const double scale = kLog2E / (temperature == 0.0 ? 1.0 : temperature);
  return scale > 1e269 ? 1e269 : scale;
}

double reference_of(double top, double scale) {
  const double n = std::nearbyint(top * scale);
  return std::fabs(n) < 0x1p50 ? kSampleBits * std::ceil((n + 2.0) / kSampleBits) : n;
}

struct Sum {
  double upper, lower;

  // Adds what other is under a reference that is `distance` higher.
  void add(const Sum& other, double distance) {
    if (distance == 0.0) {
      upper += other.upper;
      lower += other.lower;
    } else if (distance == kSampleBits) {
      lower += other.upper;
    }
  }
  double value() const { return upper * kSampleUnit + lower; }
};

// One row as it is drawn from: what is banned in it or below its floor is -inf.
class Row {
 public:
  Row(const Kernels& kernels, const SampleView& view, const std::vector<int64_t>& banned, int64_t i)
      : kernels_(kernels), view_(view), banned_(banned),
        ban_(!banned.empty() && (!view.enabled || view.enabled[i])),
        floor_(view.floor ? view.floor[i] : -kInfinity),
        size_(view.dtype == kFloat32 ? 4 : 2),
        data_(static_cast<const char*>(view.logits) + i * view.row_stride * size_),
        scale(scale_of(view.temperature[i])), greedy(view.temperature[i] == 0.0) {}

  // Columns start .. start + n, in place or in scratch.
  const float* load(int64_t start, int64_t n, float* scratch) const {
    auto first = banned_.end(), last = first;
    if (ban_) {
      first = std::lower_bound(banned_.begin(), banned_.end(), start);
      last = std::lower_bound(first, banned_.end(), start + n);
    }
    const bool whole = floor_ == -kInfinity && first == last;
    if (whole && view_.dtype == kFloat32) return reinterpret_cast<const float*>(data_) + start;
    kernels_.to_float(data_ + start * size_, view_.dtype, n, scratch);
    if (floor_ != -kInfinity) {
      for (int64_t k = 0; k < n; ++k) scratch[k] = scratch[k] < floor_ ? -INFINITY : scratch[k];
    }
    for (; first != last; ++first) scratch[*first - start] = -INFINITY;
    return scratch;
  }
  double logit(int64_t column) const {
    if (ban_ && std::binary_search(banned_.begin(), banned_.end(), column)) return -kInfinity;
    const double x = kernels_.element(data_, view_.dtype, column);
    return x < floor_ ? -kInfinity : x;
  }

 private:
  const Kernels& kernels_;
  const SampleView& view_;
  const std::vector<int64_t>& banned_;
  const bool ban_;
  const double floor_;
  const int64_t size_;
  const char* data_;

 public:
  const double scale;
  const bool greedy;
};

std::vector<int64_t> banned_columns(const SampleView& view) {
  std::vector<int64_t> columns;
  for (int64_t k = 0; k < view.n_banned; ++k) {
    const int64_t id = view.banned[k];
    if (id >= view.first_id && id < view.first_id + view.vocab) {
      columns.push_back(id - view.first_id);
    }
  }
  std::sort(columns.begin(), columns.end());
  return columns;
}

void raise(SampleRow* row, double reference) {
  const double distance = reference - row->reference;
  if (row->reference > -kInfinity && distance != 0.0) {
    Sum sum = {0.0, 0.0};
    sum.add({row->upper, row->lower}, distance);
    row->weighted = std::exp2(-distance) *
                    (row->weighted - distance * (row->upper + row->lower / kSampleUnit));
    row->upper = sum.upper;
    row->lower = sum.lower;
  }
  row->reference = reference;
}

SampleRow statistics_of(const Kernels& kernels, const SampleView& view, const Row& row,
                        double* parts) {
  float scratch[kSampleChunk];
  SampleRow sums = {-kInfinity, 0.0, 0.0, 0.0, -kInfinity, -1.0, -1.0};
  bool broken = false;
  for (int64_t start = 0; start < view.vocab; start += kSampleChunk, parts += kPartNumbers) {
    const int64_t n = std::min(kSampleChunk, view.vocab - start);
    const float* x = row.load(start, n, scratch);
    const double top = kernels.float_max(x, n);
    if (top > sums.top) {
      sums.top = top;
      if (row.greedy) {
        sums.top_id = static_cast<double>(view.first_id + start + (std::find(x, x + n, top) - x));
      }
      if (top < kInfinity) {
        const double reference = reference_of(top, row.scale);
        if (reference > sums.reference) raise(&sums, reference);
      }
    }
    // NaN alone gives a chunk of -inf that is not one.
    const double reference = sums.reference == -kInfinity ? 0.0 : sums.reference;
    const SampleSums part = kernels.sample_sums(x, n, row.scale, reference);
    if (!broken && (top == kInfinity || part.upper != part.upper)) {
      const float* bad = std::find_if(x, x + n, [](float v) { return !(v < INFINITY); });
      if (bad < x + n) sums.bad_id = static_cast<double>(view.first_id + start + (bad - x));
      broken = true;
    }
    sums.upper += part.upper;
    sums.lower += part.lower;
    sums.weighted += part.weighted;
    parts[0] = sums.reference;
    parts[1] = part.upper;
    parts[2] = part.lower;
  }
  if (broken) sums.upper = NAN;
  return sums;
}

struct Choice {
  SampleRow all = {-kInfinity, 0.0, 0.0, 0.0, -kInfinity, -1.0, -1.0};
  Sum before = {0.0, 0.0};  // of the shards before this one
  bool broken = false;
};

Choice merged(const SampleRow* rows, int64_t stride, int64_t ranks, int64_t rank) {
  Choice choice;
  SampleRow& all = choice.all;
  for (int64_t q = 0; q < ranks; ++q) {
    const SampleRow& row = rows[q * stride];
    if (row.reference > all.reference) all.reference = row.reference;
    if (row.top > all.top) {
      all.top = row.top;
      all.top_id = row.top_id;
    }
    if (row.bad_id >= 0.0 && all.bad_id < 0.0) all.bad_id = row.bad_id;
    choice.broken = choice.broken || row.upper != row.upper;
  }
  Sum sum = {0.0, 0.0};
  for (int64_t q = 0; q < ranks; ++q) {
    if (q == rank) choice.before = sum;
    SampleRow row = rows[q * stride];
    if (row.reference == -kInfinity) continue;
    raise(&row, all.reference);
    sum.add({row.upper, row.lower}, 0.0);
    all.weighted += row.weighted;
  }
  all.upper = sum.upper;
  all.lower = sum.lower;
  return choice;
}

// The column of this shard at which the sum of weights passes the threshold, or -1.
int64_t crossing(const Kernels& kernels, const SampleView& view, const Row& row,
                 const double* parts, double reference, Sum sum, double threshold) {
  if (sum.value() > threshold) return -1;
  float scratch[kSampleChunk];
  for (int64_t start = 0; start < view.vocab; start += kSampleChunk, parts += kPartNumbers) {
    if (parts[0] == -kInfinity) continue;
    Sum next = sum;
    next.add({parts[1], parts[2]}, reference - parts[0]);
    if (next.value() > threshold) {
      const int64_t n = std::min(kSampleChunk, view.vocab - start);
      const float* x = row.load(start, n, scratch);
      return start + kernels.sample_find(x, n, row.scale, reference, sum.upper, sum.lower,
                                         threshold);
    }
    sum = next;
  }
  return -1;
}

void choose(const Kernels& kernels, const SampleView& view, const Row& row, const double* parts,
            const Choice& choice, const SampleDraw& draw, int64_t i, const SampleResults& results) {
  const SampleRow& all = choice.all;
  const double total = Sum{all.upper, all.lower}.value();
  const bool empty = total == 0.0;
  int64_t column = -1;
  if (draw.forced && draw.forced[i] >= 0) {
    column = draw.forced[i] - view.first_id;
  } else if (choice.broken || empty) {
    column = static_cast<int64_t>(std::max(all.bad_id, 0.0)) - view.first_id;
  } else if (row.greedy) {
    column = static_cast<int64_t>(all.top_id) - view.first_id;
  } else {
    const double below = total * (1.0 - 0x1p-53), wanted = draw.uniforms[i] * total;
    column = crossing(kernels, view, row, parts, all.reference, choice.before,
                      wanted < below ? std::max(wanted, 0.0) : below);
  }
  const bool mine = column >= 0 && column < view.vocab;
  const double log2_total = std::log2(total) - 2 * kSampleBits;
  double logprob = mine ? -kInfinity : 0.0, entropy = 0.0;
  if (choice.broken) {
    entropy = NAN;
    if (mine) logprob = NAN;
  } else if (!empty) {
    entropy = std::max(0.0, kLn2 * (log2_total - all.weighted * kSampleUnit / total));
    if (mine) {
      const double z = row.logit(column) * row.scale;
      logprob = std::min(0.0, kLn2 * ((z - all.reference) - log2_total));
    }
  }
  results.tokens[i] = mine ? view.first_id + column : -1;
  results.logprobs[i] = static_cast<float>(logprob);
  results.entropy[i] = static_cast<float>(entropy);
}

}  // namespace

void sample_tokens(const Kernels& kernels, const SampleView& view, const SampleDraw& draw,
                   const SampleResults& results) {
  const std::vector<int64_t> banned = banned_columns(view);
  parallel_for(view.n_rows, kCost * view.vocab, view.num_threads, [&](int64_t i) {
    std::vector<double> parts(sample_chunks(view.vocab) * kPartNumbers);
    const Row row(kernels, view, banned, i);
    const SampleRow sums = statistics_of(kernels, view, row, parts.data());
    choose(kernels, view, row, parts.data(), merged(&sums, 1, 1, 0), draw, i, results);
  });
}

void sample_statistics(const Kernels& kernels, const SampleView& view, double* parts,
                       SampleRow* rows) {
  const std::vector<int64_t> banned = banned_columns(view);
  const int64_t numbers = sample_chunks(view.vocab) * kPartNumbers;
  parallel_for(view.n_rows, kCost * view.vocab, view.num_threads, [&](int64_t i) {
    rows[i] = statistics_of(kernels, view, Row(kernels, view, banned, i), parts + i * numbers);
  });
}

void sample_choose(const Kernels& kernels, const SampleView& view, const double* parts,
                   const SampleRow* all, int64_t ranks, int64_t rank, const SampleDraw& draw,
                   const SampleResults& results) {
  const std::vector<int64_t> banned = banned_columns(view);
  const int64_t numbers = sample_chunks(view.vocab) * kPartNumbers;
  parallel_for(view.n_rows, kCost * kSampleChunk, view.num_threads, [&](int64_t i) {
    choose(kernels, view, Row(kernels, view, banned, i), parts + i * numbers,
           merged(all + i, view.n_rows, ranks, rank), draw, i, results);
  });
}

}  // namespace r1v3
