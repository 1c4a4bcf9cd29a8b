// The host side of logits_grpo_loss.cu on the device of cuda_runtime.h beside this file.
#include "../../../csrc/cuda/logits_grpo_loss.cu"

namespace {

const char* launch(int64_t vocab, int blocks) {
  static int64_t labels[1] = {0};
  static float values[1] = {1.0f}, logprobs[1], entropy[1];
  const r1v3::RowLayout logits = {values, 1, vocab, vocab}, gradient = {nullptr, 1, 0, 0};
  const r1v3::GrpoTokens tokens = {labels, values, nullptr, values, nullptr, nullptr};
  return r1v3::logits_grpo_loss_cuda(logits, gradient, 1, 1, vocab, vocab, tokens, 1.0,
                                     r1v3::grpo_options({0.2, 0.2, 0, 0, 0, 2, 3}), logprobs,
                                     entropy, blocks, nullptr);
}

}  // namespace

// Blocks of the cluster for a row of bfloat16 logits.
extern "C" int cluster(int64_t vocab) { return r1v3::logits_grpo_loss_cluster(1, vocab); }

// 0, or 1 if the launch of a row fails that another host thread's, of a shorter row, interrupts.
extern "C" int interrupted_launch(int64_t vocab, int blocks) {
  another_thread = [] { launch(20000, 1); };
  return launch(vocab, blocks) != nullptr;
}

// Bytes of shared memory of the last launch, 0 without one.
extern "C" int64_t last_launch() { return launched.empty() ? 0 : launched.back(); }
