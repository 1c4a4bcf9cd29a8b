"""The clipped policy loss with clip-higher and dual clip, its gradient and its metrics."""

import torch
from torch import Tensor

from benchmarks.problem import Mode, Problem, Size, random_normal
from r1v3 import kernels
from r1v3.kernels import arguments, reference

MODES: tuple[Mode, ...] = ("forward+backward",)
CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 3.0
METRICS = ("clip_low_fraction", "clip_high_fraction", "approx_kl")


def eager(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor
) -> tuple[Tensor, ...]:
    """Token-mean loss, and as results, so that no compiler drops them, the usual metrics."""
    mask = loss_mask.float()
    log_ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    a = advantages[:, None]
    plain, clipped = -a * ratio, -a * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    worse = torch.maximum(plain, clipped)
    loss = torch.where(a < 0, torch.minimum(worse, -a * DUAL_CLIP), worse)
    tokens = mask.sum()
    with torch.no_grad():
        low = (((ratio < 1 - CLIP_LOW) & (a < 0)) * mask).sum() / tokens
        high = (((ratio > 1 + CLIP_HIGH) & (a > 0)) * mask).sum() / tokens
        approx_kl = (-log_ratio * mask).sum() / tokens
    return (loss * mask).sum() / tokens, low, high, approx_kl


def ours(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor
) -> tuple[Tensor, ...]:
    loss, metrics = kernels.grpo_loss(
        logprobs, old_logprobs, advantages, loss_mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH,
        dual_clip=DUAL_CLIP, aggregation="token-mean",
    )  # fmt: skip
    return loss, *(metrics[name] for name in METRICS)


def exact(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor
) -> tuple[Tensor, ...]:
    rows, length = logprobs.shape
    offsets = torch.arange(rows + 1, device=logprobs.device) * length
    loss, _, metrics = reference.grpo_loss(
        logprobs.reshape(-1), old_logprobs.reshape(-1), advantages, loss_mask.reshape(-1),
        offsets, clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=DUAL_CLIP,
        aggregation="token-mean",
    )  # fmt: skip
    return loss, *(metrics[arguments.METRICS.index(name)] for name in METRICS)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """B sequences of T tokens."""
    small = [{"B": 64, "T": 1024}]
    large = {"B": 512, "T": 2048 if device == "cpu" else 16_384}
    return small if size == "small" else [*small, large]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """float32 log-probabilities a few percent off-policy, every third sequence half masked.

    Moved per token: two log-probabilities and a mask in, a gradient out.
    """
    size = shape["B"], shape["T"]
    logprobs = -random_normal(*size, device=device).exp()
    loss_mask = torch.ones(size, dtype=torch.bool, device=device)
    loss_mask[::3, size[1] // 2 :] = False
    return Problem(
        op="grpo_loss",
        mode=mode,
        shape=shape,
        dtype=logprobs.dtype,
        inputs={
            "logprobs": logprobs,
            "old_logprobs": logprobs + 0.2 * random_normal(*size, device=device, seed=3),
            "advantages": random_normal(size[0], device=device, seed=4),
            "loss_mask": loss_mask,
        },
        ours=ours,
        eager=eager,
        reference=exact,
        upstream=(torch.ones((), device=device),),
        differentiated=("logprobs",),
        bytes_read=9 * logprobs.numel(),
        bytes_written=4 * logprobs.numel(),
    )
