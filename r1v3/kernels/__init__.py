"""Kernels of reinforcement learning on logits, usable without the rest of r1v3.

Every op runs on CPU and CUDA tensors; `reference` is the mathematical definition of each.
"""

from r1v3.kernels.ban_tokens import ban_tokens_
from r1v3.kernels.group_advantages import group_advantages
from r1v3.kernels.grpo_loss import grpo_loss
from r1v3.kernels.linear.ops import linear_grpo_loss, linear_logprobs_and_entropy
from r1v3.kernels.logits_grpo_loss import logits_grpo_loss
from r1v3.kernels.logprobs_and_entropy import (
    entropy_from_logits,
    logprobs_and_entropy,
    selective_log_softmax,
)
from r1v3.kernels.sample_tokens import sample_tokens

__all__ = [
    "ban_tokens_",
    "entropy_from_logits",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprobs_and_entropy",
    "logits_grpo_loss",
    "logprobs_and_entropy",
    "sample_tokens",
    "selective_log_softmax",
]
