"""Log-probability of one token per row of logits."""

import torch
from torch import Tensor

from benchmarks.problem import Mode, Problem, Size, logits_shapes, random_ids, random_logits
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward",)
WITH_ENTROPY = "r1v3, with the entropy"


def eager(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    return (logp.gather(-1, token_ids[:, None]).squeeze(-1),)


def ours(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (kernels.selective_log_softmax(logits, token_ids),)


def with_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    """The same from the op that gives the entropy too."""
    return (kernels.logprobs_and_entropy(logits, token_ids)[0],)


def exact(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (reference.selective_log_softmax(logits, token_ids),)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T rows of V logits."""
    return [{"T": rows, "V": vocab} for rows, vocab in logits_shapes(device, size)]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """bfloat16 logits, read once."""
    rows, vocab = shape["T"], shape["V"]
    logits = random_logits(rows, vocab, torch.bfloat16, device)
    return Problem(
        op="selective_log_softmax",
        mode=mode,
        shape=shape,
        dtype=logits.dtype,
        inputs={"logits": logits, "token_ids": random_ids(rows, vocab, device)},
        ours=ours,
        eager=eager,
        reference=exact,
        row_inputs=("logits", "token_ids"),
        restated={WITH_ENTROPY: with_entropy},
        bytes_read=logits.numel() * logits.element_size(),
    )
