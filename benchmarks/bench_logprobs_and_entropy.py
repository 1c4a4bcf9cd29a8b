"""Log-probability and entropy of a token from one read of the logits."""

import torch
from torch import Tensor

from benchmarks.problem import (
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

MODES: tuple[Mode, ...] = ("forward", "backward")


def eager(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    chosen = logp.gather(-1, token_ids[:, None]).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T rows of V logits."""
    return [{"T": rows, "V": vocab} for rows, vocab in logits_shapes(device, size)]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """bfloat16 logits; forward: one read of them, backward: one read and one write."""
    rows, vocab = shape["T"], shape["V"]
    logits = random_logits(rows, vocab, torch.bfloat16, device)
    n_bytes = logits.numel() * logits.element_size()
    upstream = (random_normal(rows, device=device), random_normal(rows, device=device, seed=3))
    return Problem(
        op="logprobs_and_entropy",
        mode=mode,
        shape=shape,
        dtype=logits.dtype,
        inputs={"logits": logits, "token_ids": random_ids(rows, vocab, device)},
        ours=kernels.logprobs_and_entropy,
        eager=eager,
        reference=reference.logprobs_and_entropy,
        upstream=upstream,
        differentiated=("logits",),
        row_inputs=("logits", "token_ids"),
        bytes_read=n_bytes,
        bytes_written=n_bytes if mode == "backward" else 0,
    )
