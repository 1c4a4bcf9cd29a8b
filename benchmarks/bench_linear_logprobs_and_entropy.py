"""lm_head, log-probability and entropy without keeping the logits."""

import torch
from torch import Tensor

from benchmarks.problem import VOCABULARY, Mode, Problem, Size, random_ids, random_normal
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward", "backward")


def eager(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    chosen = logp.gather(-1, token_ids[:, None]).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T tokens of width H; V is 18,976 for one of eight tensor-parallel shards of the 38B model."""
    if device == "cpu":
        small = [{"T": 128, "H": 1024, "V": 18_976}]
        return small if size == "small" else [*small, {"T": 512, "H": 1024, "V": 18_976}]
    small = [{"T": 1024, "H": 5120, "V": 18_976}]
    large = [{"T": rows, "H": 5120, "V": VOCABULARY} for rows in (1024, 8192, 32_768)]
    return small if size == "small" else [*small, *large]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """bfloat16 hidden states and weight.

    One product makes the logits, two make the gradients. Computing the logits again in the
    backward is the price of not keeping them and is not counted as work.
    """
    rows, width, vocab = shape["T"], shape["H"], shape["V"]
    hidden = random_normal(rows, width, device=device, seed=5).bfloat16()
    weight = random_normal(vocab, width, device=device, seed=6).mul_(3 * width**-0.5).bfloat16()
    products = 1 if mode == "forward" else 2
    return Problem(
        op="linear_logprobs_and_entropy",
        mode=mode,
        shape=shape,
        dtype=hidden.dtype,
        inputs={"hidden": hidden, "weight": weight, "token_ids": random_ids(rows, vocab, device)},
        ours=kernels.linear_logprobs_and_entropy,
        eager=eager,
        reference=reference.linear_logprobs_and_entropy,
        upstream=(random_normal(rows, device=device), random_normal(rows, device=device, seed=3)),
        differentiated=("hidden", "weight"),
        row_inputs=("hidden", "token_ids"),
        flops=products * 2 * rows * width * vocab,
    )
