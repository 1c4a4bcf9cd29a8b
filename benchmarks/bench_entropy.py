"""Entropy of each row of logits."""

import torch
from torch import Tensor

from benchmarks.problem import Mode, Problem, Size, logits_shapes, random_logits
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward",)


def eager(logits: Tensor) -> tuple[Tensor]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    return (-(logp.exp() * logp).sum(-1),)


def ours(logits: Tensor) -> tuple[Tensor]:
    return (kernels.entropy_from_logits(logits),)


def exact(logits: Tensor) -> tuple[Tensor]:
    return (reference.entropy_from_logits(logits),)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T rows of V logits."""
    return [{"T": rows, "V": vocab} for rows, vocab in logits_shapes(device, size)]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """bfloat16 logits, read once."""
    logits = random_logits(shape["T"], shape["V"], torch.bfloat16, device)
    return Problem(
        op="entropy",
        mode=mode,
        shape=shape,
        dtype=logits.dtype,
        inputs={"logits": logits},
        ours=ours,
        eager=eager,
        reference=exact,
        row_inputs=("logits",),
        bytes_read=logits.numel() * logits.element_size(),
    )
