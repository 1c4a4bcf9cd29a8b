// The CUDA kernel's functions of the module.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../binding.h"
#include "logits_grpo_loss.h"

namespace r1v3 {
namespace binding {

inline int logits_grpo_loss_cluster(int dtype, int64_t vocab) {
  require(dtype == 0 || dtype == 1, "dtype", dtype, "0 (float32) or 1 (bfloat16)");
  return r1v3::logits_grpo_loss_cluster(dtype, vocab);
}

inline void logits_grpo_loss_cuda(
    Address logits, std::array<int64_t, 3> logits_layout, Address gradient,
    std::array<int64_t, 3> gradient_layout, int dtype, int64_t n_rows, int64_t width, int64_t vocab,
    Address token_ids, Address loss_scale, Address old_logprobs, Address advantages,
    Address weights, Address ref_logprobs, double temperature, const std::vector<double>& options,
    Address logprobs, Address entropy, int blocks, Address stream, Address temperatures) {
  require(dtype == 0 || dtype == 1, "dtype", dtype, "0 (float32) or 1 (bfloat16)");
  require(temperature > 0.0, "temperature", temperature, "> 0");
  require(vocab >= 0 && vocab <= width, "vocab", static_cast<double>(vocab), "in [0, width]");
  require(blocks >= 1, "blocks", blocks, ">= 1");
  const auto layout = [](Address data, const std::array<int64_t, 3>& strides) {
    return r1v3::RowLayout{at<void>(data), strides[0], strides[1], strides[2]};
  };
  const char* error = r1v3::logits_grpo_loss_cuda(
      layout(logits, logits_layout), layout(gradient, gradient_layout), dtype, n_rows, width, vocab,
      {at<const int64_t>(token_ids), at<const float>(loss_scale), at<const float>(old_logprobs),
       at<const float>(advantages), at<const float>(weights), at<const float>(ref_logprobs),
       at<const double>(temperatures)},
      temperature, r1v3::grpo_options(options), at<float>(logprobs), at<float>(entropy), blocks,
      at<void>(stream));
  if (error) throw std::runtime_error(std::string("logits_grpo_loss_cuda: ") + error);
}

}  // namespace binding

inline void define_cuda(pybind11::module_& m) {
  using namespace binding;
  using py::arg;
  m.def("logits_grpo_loss_cluster", &binding::logits_grpo_loss_cluster, WithoutGil(), arg("dtype"),
        arg("vocab"),
        "Blocks per cluster that hold such a row on the current device, 0 where none do.");
  m.def("logits_grpo_loss_cuda", &binding::logits_grpo_loss_cuda, WithoutGil(), arg("logits"),
        arg("logits_layout"), arg("gradient"), arg("gradient_layout"), arg("dtype"), arg("n_rows"),
        arg("width"), arg("vocab"), arg("token_ids"), arg("loss_scale"), arg("old_logprobs"),
        arg("advantages"), arg("weights"), arg("ref_logprobs"), arg("temperature"),
        arg("options"), arg("logprobs"), arg("entropy"), arg("blocks"), arg("stream"),
        arg("temperatures") = 0);
}

}  // namespace r1v3
