"""Calls into the compiled host kernels, `r1v3._C`: addresses, dtype codes and thread counts."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_C: Any
try:
    _C = import_module("r1v3._C")
except ImportError:
    _C = None

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def supports(tensor: Tensor) -> bool:
    """Whether the compiled kernels are built and take this CPU tensor's dtype."""
    return _C is not None and tensor.device.type == "cpu" and tensor.dtype in DTYPE_CODES


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_statistics(
    x: Tensor, rows: Tensor | None, token_ids: Tensor | None, temperature: float, stats: Tensor
) -> None:
    """Writes (m, s, w, t) of the rows of x [*, vocab] (any row stride) to stats [n, 4]."""
    _C.logprobs_and_entropy_forward(
        x.data_ptr(), DTYPE_CODES[x.dtype], stats.shape[0], x.stride(0), x.shape[1],
        _address(rows), _address(token_ids), temperature, stats.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def row_gradient(
    x: Tensor,
    out: Tensor,
    rows: Tensor | None,
    token_ids: Tensor | None,
    temperature: float,
    saved: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Writes the gradient of the rows of x [*, vocab] to the same rows of out; saved is [n, 3]."""
    m, log_s, entropy = saved.T.contiguous().unbind()
    _C.logprobs_and_entropy_backward(
        x.data_ptr(), DTYPE_CODES[x.dtype], saved.shape[0], x.stride(0), x.shape[1],
        _address(rows), _address(token_ids), temperature, m.data_ptr(), entropy.data_ptr(),
        _address(grad_logprobs), _address(grad_entropy), out.data_ptr(), out.stride(0),
        torch.get_num_threads(), log_s=log_s.data_ptr(),
    )  # fmt: skip


def group_advantages(
    rewards: Tensor,
    order: Tensor,
    offsets: Tensor,
    baseline: int,
    scale: int,
    singleton: int,
    ddof: int,
    eps: float,
) -> Tensor:
    """Float32 advantages of rewards [N]; the codes are positions in `arguments`."""
    out = torch.empty_like(rewards)
    _C.group_advantages(
        rewards.data_ptr(), order.data_ptr(), offsets.data_ptr(), offsets.shape[0] - 1,
        baseline, scale, ddof, eps, singleton, out.data_ptr(),
    )  # fmt: skip
    return out


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor,
    normalizer: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
    aggregation: int,
    n_metrics: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, metrics of flat float32 tokens; 0 means no dual clip, no normalizer."""
    tokens = logprobs.shape[0]
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(n_metrics)
    gradient = torch.zeros_like(logprobs)
    _C.grpo_loss(
        logprobs.data_ptr(), _address(old_logprobs), advantages.data_ptr(),
        advantages.shape[0] == tokens, mask.data_ptr(), _address(ref_logprobs),
        _address(weights), weights is not None and weights.shape[0] == tokens,
        offsets.data_ptr(), offsets.shape[0] - 1, clip_low, clip_high, dual_clip, kl_coef, kl,
        aggregation, normalizer, loss.data_ptr(), gradient.data_ptr(), metrics.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, gradient, metrics


def ban_tokens(logits: Tensor, token_ids: Tensor, enabled: Tensor | None, vocab_start: int) -> None:
    """logits [n, V] (any row stride), int64 ids, enabled uint8 [n] or None."""
    _C.ban_tokens(
        logits.data_ptr(), DTYPE_CODES[logits.dtype], logits.shape[0], logits.stride(0),
        logits.shape[1], token_ids.data_ptr(), token_ids.shape[0], _address(enabled), vocab_start,
    )  # fmt: skip
