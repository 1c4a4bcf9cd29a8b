"""lm_head, log-probability and clipped policy loss, with both gradients."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.bench_linear_logprobs_and_entropy import head, product_tolerance
from benchmarks.problem import VOCABULARY, Mode, Problem, Size, random_ids, random_normal
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward+backward",)
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
TRUTH_ROWS = 128


def eager(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
) -> tuple[Tensor, ...]:
    """All logits, then the token-mean loss."""
    logp = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    logprobs = logp.gather(-1, token_ids.reshape(-1, 1)).view(token_ids.shape)
    mask = loss_mask.float()
    ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()
    a = advantages[:, None]
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    return ((loss * mask).sum() / mask.sum(),)


def ours(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
) -> tuple[Tensor, ...]:
    loss, _ = kernels.linear_grpo_loss(
        hidden.view(*token_ids.shape, -1), weight, token_ids, old_logprobs, advantages, loss_mask,
        clip_low=CLIP_LOW, clip_high=CLIP_HIGH, aggregation="token-mean",
    )  # fmt: skip
    return (loss,)


def exact(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
) -> tuple[Tensor, ...]:
    """The specification, whose backward computes the logits of a few rows at a time."""
    parts = [
        checkpoint(reference.linear_logprobs_and_entropy, h, weight, ids, use_reentrant=False)[0]
        for h, ids in zip(
            hidden.split(TRUTH_ROWS), token_ids.reshape(-1).split(TRUTH_ROWS), strict=True
        )
    ]
    sequences, length = token_ids.shape
    loss, _, _ = reference.grpo_loss(
        torch.cat(parts), old_logprobs.reshape(-1), advantages, loss_mask.reshape(-1),
        torch.arange(sequences + 1, device=hidden.device) * length, clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH, aggregation="token-mean",
    )  # fmt: skip
    return (loss,)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """B sequences of T tokens; the other letters as in `linear_logprobs_and_entropy`."""
    if device == "cpu":
        small = [{"B": 2, "T": 64, "H": 1024, "V": 18_976, "bits": 16}]
        quarter = {"B": 4, "T": 128, "H": 1024, "V": 151_936 // 4}
        large = [
            {**quarter, "bits": bits, "masked": masked} for bits in (32, 16) for masked in (0, 50)
        ]
        return small if size == "small" else [*small, *large]
    small = [{"B": 4, "T": 256, "H": 5120, "V": 18_976, "bits": 16}]
    large = [
        {"B": 8, "T": rows // 8, "H": 5120, "V": vocab, "bits": 16}
        for vocab in (VOCABULARY, 18_976)
        for rows in (8192, 1024, 32_768)
    ]
    return small if size == "small" else [large[0], *small, *large[1:]]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """A policy a tenth of a nat away from the one that sampled; three products are the work."""
    size = shape["B"], shape["T"]
    rows, width, vocab = size[0] * size[1], shape["H"], shape["V"]
    hidden, weight = head(rows, width, vocab, shape.get("bits", 16), device)
    token_ids = random_ids(rows, vocab, device)
    with torch.no_grad():
        parts = zip(hidden.split(TRUTH_ROWS), token_ids.split(TRUTH_ROWS), strict=True)
        sampled = [
            torch.log_softmax((h @ weight.T).float(), -1).gather(-1, ids[:, None]).squeeze(-1)
            for h, ids in parts
        ]
    old_logprobs = torch.cat(sampled) + 0.1 * random_normal(rows, device=device, seed=3)
    loss_mask = torch.arange(rows, device=device) * 100 >= rows * shape.get("masked", 0)
    return Problem(
        op="linear_grpo_loss",
        mode=mode,
        shape=shape,
        dtype=hidden.dtype,
        inputs={
            "hidden": hidden,
            "weight": weight,
            "token_ids": token_ids.view(size),
            "old_logprobs": old_logprobs.view(size),
            "advantages": random_normal(size[0], device=device, seed=4),
            "loss_mask": loss_mask.view(size),
        },
        ours=ours,
        eager=eager,
        reference=exact,
        upstream=(torch.ones((), device=device),),
        differentiated=("hidden", "weight"),
        flops=3 * 2 * int(loss_mask.sum()) * width * vocab,
        tolerance=product_tolerance(hidden),
    )
