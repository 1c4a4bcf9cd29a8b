"""lm_head to the mean cross entropy of supervised tuning, with both gradients."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.bench_linear_logprobs_and_entropy import head, product_tolerance
from benchmarks.problem import VOCABULARY, Mode, Problem, Size, random_ids
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward+backward",)
TRUTH_ROWS = 128


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    """All logits."""
    return (torch.nn.functional.cross_entropy((hidden @ weight.T).float(), token_ids),)


def ours(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    """Four products: the backward, which could be of any function, computes the logits again."""
    logprobs, _ = kernels.linear_logprobs_and_entropy(hidden, weight, token_ids)
    return (-logprobs.mean(),)


def one_pass(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    """Three: the gradient of an on-policy loss whose advantages are all 1."""
    ones = torch.ones(1, device=hidden.device)
    loss, metrics = kernels.linear_grpo_loss(
        hidden[None], weight, token_ids[None], None, ones, torch.ones_like(token_ids)[None],
        aggregation="token-mean",
    )  # fmt: skip
    return (loss - loss.detach() - metrics["token_logprobs"].mean(),)


def exact(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    """The specification, whose backward computes the logits of a few rows at a time."""
    parts = [
        checkpoint(reference.linear_logprobs_and_entropy, h, weight, ids, use_reentrant=False)[0]
        for h, ids in zip(hidden.split(TRUTH_ROWS), token_ids.split(TRUTH_ROWS), strict=True)
    ]
    return (-torch.cat(parts).mean(),)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """As in `linear_logprobs_and_entropy`; 152,064 is a multiple of 128, as some rivals want it."""
    if device == "cpu":
        small = [{"T": 128, "H": 1024, "V": 18_976, "bits": 16}]
        quarter = {"T": 512, "H": 1024, "V": 151_936 // 4}
        return small if size == "small" else [*small, *({**quarter, "bits": b} for b in (32, 16))]
    small = [{"T": 1024, "H": 5120, "V": 152_064, "bits": 16}]
    large = [{"T": 8192, "H": 5120, "V": vocab, "bits": 16} for vocab in (VOCABULARY, 152_064)]
    return small if size == "small" else [*large, *small]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """Three products are the work."""
    rows, width, vocab = shape["T"], shape["H"], shape["V"]
    hidden, weight = head(rows, width, vocab, shape.get("bits", 16), device)
    return Problem(
        op="linear_cross_entropy",
        mode=mode,
        shape=shape,
        dtype=hidden.dtype,
        inputs={
            "hidden": hidden,
            "weight": weight,
            "token_ids": random_ids(rows, vocab, device),
        },
        ours=ours,
        eager=eager,
        reference=exact,
        upstream=(torch.ones((), device=device),),
        differentiated=("hidden", "weight"),
        restated={"r1v3, one pass": one_pass},
        flops=3 * 2 * rows * width * vocab,
        tolerance=product_tolerance(hidden),
    )
