// The module r1v3._C: CPU kernels, and CUDA kernels when built with them.
// The callers in r1v3/kernels check shapes, dtypes and devices; here only numbers are checked.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding.h"
#include "cpu/capability.h"
#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "cpu/pages.h"
#include "cpu/sampling.h"
#ifdef R1V3_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace {

using namespace r1v3::binding;

void check_dtype(int dtype) {
  require(dtype >= 0 && dtype <= 2, "dtype", dtype, "0 (float32), 1 (bfloat16) or 2 (float16)");
}

r1v3::LogitsView checked_view(Address logits, int dtype, int64_t n_rows, int64_t row_stride,
                              int64_t vocab, Address rows, Address token_ids, double temperature,
                              Address temperatures, int num_threads) {
  check_dtype(dtype);
  require(n_rows >= 0, "n_rows", static_cast<double>(n_rows), ">= 0");
  require(vocab >= 0, "vocab", static_cast<double>(vocab), ">= 0");
  require(temperature >= 0.0, "temperature", temperature, ">= 0");
  return {at<const void>(logits), dtype,       n_rows,     row_stride, vocab, at<const int64_t>(rows),
          at<const int64_t>(token_ids), temperature, num_threads, at<const double>(temperatures)};
}

void row_statistics(Address logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                    Address rows, Address token_ids, double temperature, Address stats,
                    int num_threads, const std::string& capability, Address temperatures) {
  r1v3::row_statistics(r1v3::kernels_for(capability),
                       checked_view(logits, dtype, n_rows, row_stride, vocab, rows, token_ids,
                                    temperature, temperatures, num_threads),
                       at<float>(stats));
}

void logprobs_and_entropy(Address logits, int dtype, int64_t n_rows, int64_t row_stride,
                          int64_t vocab, Address rows, Address token_ids, double temperature,
                          Address logprobs, Address entropy, Address saved, int num_threads,
                          const std::string& capability, Address temperatures) {
  r1v3::logprobs_and_entropy(r1v3::kernels_for(capability),
                             checked_view(logits, dtype, n_rows, row_stride, vocab, rows, token_ids,
                                          temperature, temperatures, num_threads),
                             at<float>(logprobs), at<float>(entropy), at<float>(saved));
}

void row_gradient(Address logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                  Address rows, Address token_ids, double temperature, Address saved,
                  Address grad_logprobs, Address grad_entropy, Address grad_logits,
                  int64_t grad_row_stride, int num_threads, const std::string& capability,
                  Address temperatures, double softcap) {
  require(softcap == 0.0 || (softcap > 0.0 && dtype == r1v3::kFloat32), "softcap", softcap,
          "0, or positive for float32 logits");
  r1v3::row_gradient(r1v3::kernels_for(capability),
                     checked_view(logits, dtype, n_rows, row_stride, vocab, rows, token_ids,
                                  temperature, temperatures, num_threads),
                     {at<const float>(saved), at<const float>(grad_logprobs),
                      at<const float>(grad_entropy), softcap},
                     at<void>(grad_logits), grad_row_stride);
}

int64_t first_outside(Address ids, int64_t n, int64_t vocab, int64_t ignored) {
  return r1v3::first_outside(at<const int64_t>(ids), n, vocab, ignored);
}

void check_offsets(const int64_t* offsets, int64_t count, int64_t limit, const char* name) {
  bool ok = offsets[0] == 0;
  for (int64_t i = 0; i < count; ++i) ok = ok && offsets[i] <= offsets[i + 1];
  if (ok && offsets[count] <= limit) return;
  std::string values;
  for (int64_t i = 0; i <= count && i < 16; ++i) {
    values += (i ? ", " : "") + std::to_string(offsets[i]);
  }
  throw std::invalid_argument(std::string(name) + " must rise from 0 to at most " +
                              std::to_string(limit) + ", got [" + values + "]");
}

void group_advantages(Address rewards, int64_t n, Address order, Address offsets, int64_t n_groups,
                      int baseline, int scale, int ddof, double eps, int singleton, Address out,
                      int num_threads) {
  require(n_groups >= 0, "n_groups", static_cast<double>(n_groups), ">= 0");
  require(baseline >= 0 && baseline <= 2, "baseline", baseline,
          "0 (mean), 1 (leave one out) or 2 (none)");
  require(scale >= 0 && scale <= 2, "scale", scale, "0 (group), 1 (batch) or 2 (none)");
  require(ddof == 0 || ddof == 1, "ddof", ddof, "0 or 1");
  require(singleton == 0 || singleton == 1, "singleton", singleton, "0 (zero) or 1 (raw)");
  if (n_groups > 0) check_offsets(at<const int64_t>(offsets), n_groups, n, "offsets");
  r1v3::group_advantages(at<const float>(rewards), at<const int64_t>(order),
                         at<const int64_t>(offsets), n_groups,
                         {static_cast<r1v3::Baseline>(baseline), static_cast<r1v3::Scale>(scale),
                          ddof, eps, singleton == 1},
                         num_threads, at<float>(out));
}

int64_t segments_of_ids(Address ids, int64_t n, Address order, Address offsets) {
  return r1v3::segments_of_ids(at<const int64_t>(ids), n, at<int64_t>(order), at<int64_t>(offsets));
}

void grpo_loss(Address logprobs, int64_t n, Address old_logprobs, Address advantages,
               bool advantage_is_per_token, Address mask, Address ref_logprobs, Address weights,
               bool weights_is_per_token, Address seq_offsets, int64_t n_seqs, double normalizer,
               const std::vector<double>& options, Address loss, Address grad, Address metrics,
               int num_threads, const std::string& capability) {
  require(n_seqs >= 0, "n_seqs", static_cast<double>(n_seqs), ">= 0");
  const r1v3::GrpoOptions chosen = r1v3::grpo_options(options);
  require(chosen.aggregation != r1v3::Aggregation::kConstant || normalizer > 0.0, "normalizer",
          normalizer, "> 0 with aggregation 3 (constant)");
  check_offsets(at<const int64_t>(seq_offsets), n_seqs, n, "cu_seqlens");
  r1v3::grpo_loss(
      r1v3::kernels_for(capability),
      {n, at<const float>(logprobs), at<const float>(old_logprobs), at<const float>(advantages),
       advantage_is_per_token, at<const uint8_t>(mask), at<const float>(ref_logprobs),
       at<const float>(weights), weights_is_per_token, at<const int64_t>(seq_offsets), n_seqs,
       normalizer},
      chosen, num_threads, at<float>(loss), at<float>(grad), at<float>(metrics));
}

void ban_tokens(Address logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                Address ids, int64_t n_ids, Address enabled, int64_t vocab_start) {
  check_dtype(dtype);
  r1v3::ban_tokens(at<void>(logits), dtype, n_rows, row_stride, vocab, at<const int64_t>(ids),
                   n_ids, at<const uint8_t>(enabled), vocab_start);
}

r1v3::SampleView sample_view(Address logits, int dtype, int64_t n_rows, int64_t row_stride,
                             int64_t vocab, int64_t first_id, Address temperature, Address banned,
                             int64_t n_banned, Address enabled, Address floor, int num_threads) {
  check_dtype(dtype);
  require(n_rows >= 0, "n_rows", static_cast<double>(n_rows), ">= 0");
  require(vocab >= 0, "vocab", static_cast<double>(vocab), ">= 0");
  return {at<const void>(logits), dtype, n_rows, row_stride, vocab, first_id,
          at<const double>(temperature), at<const int64_t>(banned), n_banned,
          at<const uint8_t>(enabled), at<const double>(floor), num_threads};
}

void sample_tokens(Address logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                   int64_t first_id, Address temperature, Address banned, int64_t n_banned,
                   Address enabled, Address floor, int num_threads, Address uniforms,
                   Address forced, Address tokens, Address logprobs, Address entropy,
                   const std::string& capability) {
  r1v3::sample_tokens(r1v3::kernels_for(capability),
                      sample_view(logits, dtype, n_rows, row_stride, vocab, first_id, temperature,
                                  banned, n_banned, enabled, floor, num_threads),
                      {at<const double>(uniforms), at<const int64_t>(forced)},
                      {at<int64_t>(tokens), at<float>(logprobs), at<float>(entropy)});
}

void sample_statistics(Address logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                       int64_t first_id, Address temperature, Address banned, int64_t n_banned,
                       Address enabled, Address floor, int num_threads, Address parts, Address rows,
                       const std::string& capability) {
  r1v3::sample_statistics(r1v3::kernels_for(capability),
                          sample_view(logits, dtype, n_rows, row_stride, vocab, first_id,
                                      temperature, banned, n_banned, enabled, floor, num_threads),
                          at<double>(parts), at<r1v3::SampleRow>(rows));
}

void sample_choose(Address logits, int dtype, int64_t n_rows, int64_t row_stride, int64_t vocab,
                   int64_t first_id, Address temperature, Address banned, int64_t n_banned,
                   Address enabled, Address floor, int num_threads, Address parts, Address all,
                   int64_t ranks, int64_t rank, Address uniforms, Address forced, Address tokens,
                   Address logprobs, Address entropy, const std::string& capability) {
  require(rank >= 0 && rank < ranks, "rank", static_cast<double>(rank), "in [0, ranks)");
  r1v3::sample_choose(r1v3::kernels_for(capability),
                      sample_view(logits, dtype, n_rows, row_stride, vocab, first_id, temperature,
                                  banned, n_banned, enabled, floor, num_threads),
                      at<const double>(parts), at<const r1v3::SampleRow>(all), ranks, rank,
                      {at<const double>(uniforms), at<const int64_t>(forced)},
                      {at<int64_t>(tokens), at<float>(logprobs), at<float>(entropy)});
}

double read_sum(Address values, int64_t n, int num_threads, const std::string& capability) {
  return r1v3::read_sum(r1v3::kernels_for(capability), at<const float>(values), n, num_threads);
}

void prefer_huge_pages(Address data, int64_t bytes) {
  r1v3::prefer_huge_pages(at<void>(data), bytes);
}

bool has_gemm(int dtype, const std::string& capability) {
  check_dtype(dtype);
  return r1v3::gemm_kernels(dtype, dtype, capability) != nullptr;
}

void gemm(int a_dtype, Address a, int64_t rows, int64_t a_stride, int64_t a_k_stride, int b_dtype,
          Address b, int64_t columns, int64_t b_stride, int64_t b_k_stride, int64_t k, Address c,
          int64_t c_stride, bool add, int num_threads, const std::string& capability) {
  check_dtype(a_dtype);
  check_dtype(b_dtype);
  require(rows >= 0 && columns >= 0 && k >= 0, "rows, columns and k",
          static_cast<double>(std::min({rows, columns, k})), ">= 0");
  const r1v3::GemmKernels* kernels = r1v3::gemm_kernels(a_dtype, b_dtype, capability);
  require(kernels != nullptr, "dtype", std::max(a_dtype, b_dtype),
          "one for which has_gemm is true");
  r1v3::gemm(*kernels, {at<const void>(a), a_dtype, rows, a_stride, a_k_stride},
             {at<const void>(b), b_dtype, columns, b_stride, b_k_stride}, k, at<float>(c), c_stride,
             add, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of r1v3. Use r1v3.kernels, which checks its arguments.";
  using py::arg;
  m.def("cpu_capability", [] { return r1v3::cpu_capabilities().front(); },
        "The instruction set that the CPU kernels use on this machine.");
  m.def("cpu_capabilities", &r1v3::cpu_capabilities,
        "Every instruction set that this machine can run, best first.");
  m.def("row_statistics", &row_statistics, WithoutGil(), arg("logits"), arg("dtype"), arg("n_rows"),
        arg("row_stride"), arg("vocab"), arg("rows"), arg("token_ids"), arg("temperature"),
        arg("stats"), arg("num_threads"), arg("capability") = "", arg("temperatures") = 0);
  m.def("logprobs_and_entropy", &logprobs_and_entropy, WithoutGil(), arg("logits"), arg("dtype"),
        arg("n_rows"), arg("row_stride"), arg("vocab"), arg("rows"), arg("token_ids"),
        arg("temperature"), arg("logprobs"), arg("entropy"), arg("saved"), arg("num_threads"),
        arg("capability") = "", arg("temperatures") = 0);
  m.def("row_gradient", &row_gradient, WithoutGil(), arg("logits"), arg("dtype"), arg("n_rows"),
        arg("row_stride"), arg("vocab"), arg("rows"), arg("token_ids"), arg("temperature"),
        arg("saved"), arg("grad_logprobs"), arg("grad_entropy"), arg("grad_logits"),
        arg("grad_row_stride"), arg("num_threads"), arg("capability") = "",
        arg("temperatures") = 0, arg("softcap") = 0.0);
  m.def("first_outside", &first_outside, WithoutGil(), arg("ids"), arg("n"), arg("vocab"),
        arg("ignored"));
  m.def("group_advantages", &group_advantages, WithoutGil(), arg("rewards"), arg("n"), arg("order"),
        arg("offsets"), arg("n_groups"), arg("baseline"), arg("scale"), arg("ddof"), arg("eps"),
        arg("singleton"), arg("out"), arg("num_threads") = 1);
  m.def("segments_of_ids", &segments_of_ids, WithoutGil(), arg("ids"), arg("n"), arg("order"),
        arg("offsets"));
  m.def("grpo_loss", &grpo_loss, WithoutGil(), arg("logprobs"), arg("n"), arg("old_logprobs"),
        arg("advantages"), arg("advantage_is_per_token"), arg("mask"), arg("ref_logprobs"),
        arg("weights"), arg("weights_is_per_token"), arg("seq_offsets"), arg("n_seqs"),
        arg("normalizer"), arg("options"), arg("loss"), arg("grad"), arg("metrics"),
        arg("num_threads"), arg("capability") = "");
  m.def("ban_tokens", &ban_tokens, WithoutGil(), arg("logits"), arg("dtype"), arg("n_rows"),
        arg("row_stride"), arg("vocab"), arg("ids"), arg("n_ids"), arg("enabled"),
        arg("vocab_start"));
  m.def("sample_tokens", &sample_tokens, WithoutGil(), arg("logits"), arg("dtype"),
        arg("n_rows"), arg("row_stride"), arg("vocab"), arg("first_id"), arg("temperature"),
        arg("banned"), arg("n_banned"), arg("enabled"), arg("floor"), arg("num_threads"),
        arg("uniforms"), arg("forced"), arg("tokens"), arg("logprobs"), arg("entropy"),
        arg("capability") = "");
  m.def("sample_statistics", &sample_statistics, WithoutGil(), arg("logits"), arg("dtype"),
        arg("n_rows"), arg("row_stride"), arg("vocab"), arg("first_id"), arg("temperature"),
        arg("banned"), arg("n_banned"), arg("enabled"), arg("floor"), arg("num_threads"),
        arg("parts"), arg("rows"), arg("capability") = "");
  m.def("sample_choose", &sample_choose, WithoutGil(), arg("logits"), arg("dtype"),
        arg("n_rows"), arg("row_stride"), arg("vocab"), arg("first_id"), arg("temperature"),
        arg("banned"), arg("n_banned"), arg("enabled"), arg("floor"), arg("num_threads"),
        arg("parts"), arg("all"), arg("ranks"), arg("rank"), arg("uniforms"), arg("forced"),
        arg("tokens"), arg("logprobs"), arg("entropy"), arg("capability") = "");
  m.attr("sample_chunk") = r1v3::kSampleChunk;
  m.def("read_sum", &read_sum, WithoutGil(), arg("values"), arg("n"), arg("num_threads"),
        arg("capability") = "");
  m.def("prefer_huge_pages", &prefer_huge_pages, arg("data"), arg("bytes"));
  m.def("has_gemm", &has_gemm, arg("dtype"), arg("capability") = "",
        "Whether this machine, or one of this capability, multiplies matrices of the dtype.");
  m.def("has_bfloat16_dot", &r1v3::has_bfloat16_dot, arg("capability") = "",
        "Whether it multiplies pairs of bfloat16 as they are, not converted to float32.");
  m.def("gemm", &gemm, WithoutGil(), arg("a_dtype"), arg("a"), arg("rows"), arg("a_stride"),
        arg("a_k_stride"), arg("b_dtype"), arg("b"), arg("columns"), arg("b_stride"), arg("b_k_stride"), arg("k"),
        arg("c"), arg("c_stride"), arg("add"), arg("num_threads"), arg("capability") = "");
#ifdef R1V3_WITH_CUDA
  r1v3::define_cuda(m);
  m.attr("built_with_cuda") = true;
#else
  m.attr("built_with_cuda") = false;
#endif
}
