"""Drawing the next token of every row, with its log-probability and entropy.

Samplers of vLLM and FlashInfer draw from generators of their own and return no entropy: there is no
truth to hold their tokens to, so they are not timed here.
"""

import torch
from torch import Tensor

from benchmarks.problem import (
    SEED,
    Mode,
    Problem,
    Size,
    logits_shapes,
    random_ids,
    random_logits,
)
from r1v3 import kernels

MODES: tuple[Mode, ...] = ("forward",)
TEMPERATURE = 0.9
BANNED = 64  # about what the spellings of NoWait's words come to


def eager(logits: Tensor, uniforms: Tensor, banned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The token id as a number, its log-probability and the entropy; bans in place."""
    y = logits.index_fill_(-1, banned, -torch.inf)
    y = (y if y.dtype == torch.float64 else y.float()) / TEMPERATURE
    logp = torch.log_softmax(y, -1)
    p = logp.exp()
    cumulative = p.double().cumsum(-1)
    wanted = uniforms.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, wanted, right=True).clamp(max=logits.shape[1] - 1)
    chosen = logp.gather(-1, tokens).squeeze(-1)
    entropy = -torch.where(p == 0, 0.0, p * logp).sum(-1)
    return tokens.squeeze(-1).to(logp.dtype), chosen, entropy


def ours(logits: Tensor, uniforms: Tensor, banned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, logprobs, entropy = kernels.sample_tokens(
        logits, uniforms, temperature=TEMPERATURE, banned=banned
    )
    return tokens.to(logprobs.dtype), logprobs, entropy


def shapes(device: str, size: Size) -> list[dict[str, int]]:
    """T rows of V logits, of which K are banned: a decode step has at most some hundred rows."""
    return [
        {"T": rows, "V": vocab, "K": BANNED}
        for rows, vocab in logits_shapes(device, size)
        if rows <= 1024
    ]


def problem(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """bfloat16 logits, read once."""
    rows, vocab = shape["T"], shape["V"]
    logits = random_logits(rows, vocab, torch.bfloat16, device)
    generator = torch.Generator(device).manual_seed(SEED + 4)
    return Problem(
        op="sample_tokens",
        mode=mode,
        shape=shape,
        dtype=logits.dtype,
        inputs={
            "logits": logits,
            "uniforms": torch.rand(rows, generator=generator, device=device),
            "banned": random_ids(shape["K"], vocab, device),
        },
        ours=ours,
        eager=eager,
        reference=eager,
        row_inputs=("logits", "uniforms"),
        mutated=("logits",),
        bytes_read=logits.numel() * logits.element_size(),
    )
