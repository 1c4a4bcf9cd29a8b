"""The GRPO loss of logits: with its gradient in one pass, and the ways there in two."""

import torch
from torch import Tensor

from benchmarks.problem import (
    VOCABULARY,
    Mode,
    Problem,
    Size,
    logits_shapes,
    random_ids,
    random_logits,
    random_normal,
)
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward+backward",)
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def carried(loss: Tensor, rows: int) -> Tensor:
    """[rows] zeros that pass ones on as 1: rows are compared one by one, their sum cannot be."""
    return ((loss - loss.detach()) / rows).expand(rows)


def eager(
    logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    chosen = logp.gather(-1, token_ids[:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    ratio = (chosen - old_logprobs).clamp(-20.0, 20.0).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).sum() / count
    return carried(loss, logits.shape[0]), chosen.detach(), entropy


def _options(rows: int, count: Tensor) -> dict[str, object]:
    return {
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "aggregation": "constant",
        "normalizer": count,
        "cu_seqlens": torch.arange(2, device=count.device) * rows,
    }


def ours(
    logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    loss, metrics = kernels.logits_grpo_loss(
        logits, token_ids, old_logprobs, advantages,
        torch.ones(rows, dtype=torch.bool, device=logits.device), **_options(rows, count),
    )  # fmt: skip
    return carried(loss, rows), metrics["token_logprobs"], metrics["token_entropy"]


def in_two_steps(
    logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    """The log-probabilities, then their loss: three reads and writes of the logits' size."""
    rows = logits.shape[0]
    logprobs, entropy = kernels.logprobs_and_entropy(logits, token_ids)
    loss, _ = kernels.grpo_loss(
        logprobs, old_logprobs, advantages,
        torch.ones(rows, dtype=torch.bool, device=logits.device), **_options(rows, count),
    )  # fmt: skip
    return carried(loss, rows), logprobs.detach(), entropy.detach()


def exact(
    logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    logprobs, entropy = reference.logprobs_and_entropy(logits, token_ids)
    loss, _, _ = reference.grpo_loss(
        logprobs, old_logprobs, advantages, torch.ones(rows, device=logits.device),
        torch.arange(2, device=logits.device) * rows, clip_low=CLIP_LOW, clip_high=CLIP_HIGH,
        aggregation="constant", normalizer=count,
    )  # fmt: skip
    return carried(loss, rows), logprobs.detach(), entropy.detach()


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T tokens of V logits, powers of two: the upstream gradient is then exactly 1."""
    if device == "cpu":
        return [{"T": 64, "V": VOCABULARY}]
    return [{"T": rows, "V": vocab} for rows, vocab in logits_shapes(device, size) if rows >= 1024]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """bfloat16 logits a few percent off-policy: one read of them, one write of the gradient."""
    rows, vocab = shape["T"], shape["V"]
    logits = random_logits(rows, vocab, torch.bfloat16, device)
    token_ids = random_ids(rows, vocab, device)
    with torch.no_grad():
        logprobs = kernels.selective_log_softmax(logits, token_ids)
    n_bytes = logits.numel() * logits.element_size()
    return Problem(
        op="logits_grpo_loss",
        mode=mode,
        shape=shape,
        dtype=logits.dtype,
        inputs={
            "logits": logits,
            "token_ids": token_ids,
            "old_logprobs": logprobs + 0.2 * random_normal(rows, device=device, seed=3),
            # One sequence: the rivals have one advantage for each.
            "advantages": torch.full((rows,), 0.7, device=device),
            "count": torch.tensor(float(rows), device=device),
        },
        ours=ours,
        eager=eager,
        reference=exact,
        upstream=(torch.ones(rows, device=device),),
        differentiated=("logits",),
        row_inputs=("logits", "token_ids", "old_logprobs", "advantages"),
        restated={"r1v3, two steps": in_two_steps},
        bytes_read=n_bytes,
        bytes_written=n_bytes,
    )
