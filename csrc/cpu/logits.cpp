#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "ops.h"
#include "pages.h"
#include "parallel.h"

namespace r1v3 {
namespace {

// Gradients from this size on are written past the caches, which they would only flush.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
constexpr int64_t kReadBlock = int64_t{1} << 18;  // floats

int64_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

struct Row {
  int64_t number, target;
  const char* data;
};

Row row_of(const LogitsView& view, int64_t i) {
  const int64_t number = view.rows ? view.rows[i] : i;
  const int64_t bytes = view.row_stride * element_size(view.dtype);
  return {number, view.token_ids ? view.token_ids[i] : -1,
          static_cast<const char*>(view.data) + number * bytes};
}

double temperature_of(const LogitsView& view, int64_t i) {
  return view.temperatures ? view.temperatures[i] : view.temperature;
}

bool has_target(const LogitsView& view, const Row& row) {
  return row.target >= 0 && row.target < view.vocab;
}

// (t - m) / temperature; at temperature 0, 0 for a maximum and -inf for the others.
double distance(float t, float m, double temperature) {
  const double difference = static_cast<double>(t) - m;
  if (temperature != 0.0) return difference / temperature;
  return difference < 0.0 ? -INFINITY : difference;
}

template <typename T>
void fill_columns(T* x, T value, int64_t n_rows, int64_t row_stride,
                  const std::vector<int64_t>& columns, const uint8_t* enabled) {
  for (int64_t row = 0; row < n_rows; ++row) {
    if (enabled && !enabled[row]) continue;
    for (const int64_t column : columns) x[row * row_stride + column] = value;
  }
}

}  // namespace

void row_statistics(const Kernels& kernels, const LogitsView& view, float* stats) {
  parallel_for(view.n_rows, view.vocab, view.num_threads, [&](int64_t i) {
    const Row row = row_of(view, i);
    const RowStatistics of_row =
        kernels.statistics(row.data, view.dtype, view.vocab, temperature_of(view, i), true);
    float* out = stats + 4 * i;
    out[0] = of_row.m;
    out[1] = static_cast<float>(of_row.s);
    out[2] = static_cast<float>(of_row.w);
    out[3] = has_target(view, row) ? kernels.element(row.data, view.dtype, row.target) : 0.0f;
  });
}

void logprobs_and_entropy(const Kernels& kernels, const LogitsView& view, float* logprobs,
                          float* entropy, float* saved) {
  parallel_for(view.n_rows, view.vocab, view.num_threads, [&](int64_t i) {
    const Row row = row_of(view, i);
    const double temperature = temperature_of(view, i);
    const RowStatistics of_row =
        kernels.statistics(row.data, view.dtype, view.vocab, temperature, entropy != nullptr);
    const bool empty = of_row.s == 0.0;
    const double log_s = empty ? 0.0 : std::log(of_row.s);
    const double h = empty || !entropy ? 0.0 : log_s - of_row.w / of_row.s;
    double logprob = 0.0;
    if (has_target(view, row)) {
      const float t = kernels.element(row.data, view.dtype, row.target);
      logprob = empty ? -INFINITY : distance(t, of_row.m, temperature) - log_s;
    }
    if (logprobs) logprobs[i] = static_cast<float>(logprob);
    if (entropy) entropy[i] = static_cast<float>(h);
    saved[3 * i] = of_row.m;
    saved[3 * i + 1] = static_cast<float>(log_s);
    saved[3 * i + 2] = static_cast<float>(h);
  });
}

void row_gradient(const Kernels& kernels, const LogitsView& view, const GradientInputs& inputs,
                  void* grad_logits, int64_t grad_row_stride) {
  if (view.vocab == 0) return;
  const int64_t grad_row_bytes = grad_row_stride * element_size(view.dtype);
  auto* grad_base = static_cast<char*>(grad_logits);
  const int64_t bytes = view.n_rows * view.vocab * element_size(view.dtype);
  const bool stream = grad_logits != view.data && bytes >= kStreamBytes;
  const auto inverse = static_cast<float>(inputs.softcap == 0.0 ? 0.0 : 1.0 / inputs.softcap);
  if (stream && !view.rows) prefer_huge_pages(grad_logits, view.n_rows * grad_row_bytes);
  parallel_for(view.n_rows, view.vocab, view.num_threads, [&](int64_t i) {
    const Row row = row_of(view, i);
    const float* saved = inputs.saved + 3 * i;
    const RowGradient upstream = {saved[0], saved[1], saved[2],
                                  inputs.grad_logprobs ? inputs.grad_logprobs[i] : 0.0f,
                                  inputs.grad_entropy ? inputs.grad_entropy[i] : 0.0f, inverse};
    kernels.gradient(row.data, view.dtype, view.vocab, row.target, temperature_of(view, i), upstream,
                     stream, grad_base + row.number * grad_row_bytes);
  });
}

int64_t first_outside(const int64_t* ids, int64_t n, int64_t vocab, int64_t ignored) {
  for (int64_t i = 0; i < n; ++i) {
    if ((ids[i] < 0 || ids[i] >= vocab) && ids[i] != ignored) return i;
  }
  return -1;
}

void ban_tokens(void* logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                const int64_t* ids, int64_t n_ids, const uint8_t* enabled, int64_t vocab_start) {
  std::vector<int64_t> columns;
  for (int64_t k = 0; k < n_ids; ++k) {
    // Not by subtraction, which may overflow.
    const bool here = ids[k] >= vocab_start && ids[k] < vocab_start + vocab;
    if (here) columns.push_back(ids[k] - vocab_start);
  }
  std::sort(columns.begin(), columns.end());  // one page after the other
  if (dtype == kFloat32) {
    fill_columns(static_cast<float*>(logits), -INFINITY, n_rows, row_stride, columns, enabled);
  } else {
    const uint16_t infinity = dtype == kBFloat16 ? 0xff80 : 0xfc00;
    fill_columns(static_cast<uint16_t*>(logits), infinity, n_rows, row_stride, columns, enabled);
  }
}

double read_sum(const Kernels& kernels, const float* values, int64_t n, int num_threads) {
  const int64_t blocks = (n + kReadBlock - 1) / kReadBlock;
  std::vector<double> sums(blocks);
  parallel_for(blocks, kReadBlock, num_threads, [&](int64_t i) {
    sums[i] = kernels.read_sum(values + i * kReadBlock, std::min(kReadBlock, n - i * kReadBlock));
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace r1v3
