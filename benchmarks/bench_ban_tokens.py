"""Banning a list of tokens before sampling."""

import torch
from torch import Tensor

from benchmarks.problem import (
    VOCABULARY,
    Mode,
    Problem,
    Size,
    random_ids,
    random_logits,
)
from r1v3 import kernels
from r1v3.kernels import reference

MODES: tuple[Mode, ...] = ("forward",)


def eager(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (logits.index_fill_(-1, token_ids, -torch.inf),)


def ours(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (kernels.ban_tokens_(logits, token_ids),)


def exact(logits: Tensor, token_ids: Tensor) -> tuple[Tensor]:
    return (reference.ban_tokens_(logits, token_ids),)


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T rows of V logits, K banned tokens: about what the spellings of NoWait's words come to."""
    rows = (256,) if size == "small" else (64, 256)
    return [{"T": n, "V": VOCABULARY, "K": 64} for n in rows]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """bfloat16 logits of which only the banned ones are written."""
    logits = random_logits(shape["T"], shape["V"], torch.bfloat16, device)
    return Problem(
        op="ban_tokens",
        mode=mode,
        shape=shape,
        dtype=logits.dtype,
        inputs={"logits": logits, "token_ids": random_ids(shape["K"], shape["V"], device)},
        ours=ours,
        eager=eager,
        reference=exact,
        mutated=("logits",),
        bytes_read=8 * shape["K"],
        bytes_written=shape["T"] * shape["K"] * logits.element_size(),
    )
