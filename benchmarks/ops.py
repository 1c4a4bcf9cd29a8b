"""The benchmarks by name."""

from types import ModuleType

from benchmarks import (
    bench_ban_tokens,
    bench_entropy,
    bench_group_advantages,
    bench_grpo_loss,
    bench_linear_cross_entropy,
    bench_linear_grpo_loss,
    bench_linear_logprobs_and_entropy,
    bench_logits_grpo_loss,
    bench_logits_options,
    bench_logprobs_and_entropy,
    bench_sample_tokens,
    bench_selective_log_softmax,
)

OPS: dict[str, ModuleType | bench_logits_options.Option] = {
    "logprobs_and_entropy": bench_logprobs_and_entropy,
    "entropy": bench_entropy,
    "selective_log_softmax": bench_selective_log_softmax,
    "group_advantages": bench_group_advantages,
    "grpo_loss": bench_grpo_loss,
    "ban_tokens": bench_ban_tokens,
    "sample_tokens": bench_sample_tokens,
    "linear_logprobs_and_entropy": bench_linear_logprobs_and_entropy,
    "linear_cross_entropy": bench_linear_cross_entropy,
    "linear_grpo_loss": bench_linear_grpo_loss,
    "logits_grpo_loss": bench_logits_grpo_loss,
    **bench_logits_options.OPTIONS,
}
