"""Count of Triton's compilations when lengths and temperatures change: each costs seconds."""

from collections import Counter
from typing import Any

import torch

from r1v3 import kernels

LENGTHS = (96, 160, 288, 544, 1056)
TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6)
VOCABULARY = 4096


def count(device: str) -> dict[str, int]:
    """Compilations by kernel over five lengths with five temperatures; empty on the CPU.

    One per kernel and set of options is the least. Triton also tells numbers divisible by 16 from
    others, which all these lengths are.
    """
    if device == "cpu":
        return {}
    from triton import knobs

    compiled: Counter[str] = Counter()
    before = knobs.runtime.jit_post_compile_hook

    def hook(*arguments: Any, **named: Any) -> None:
        function = named.get("fn")
        compiled[str(getattr(function, "name", function))] += 1

    knobs.runtime.jit_post_compile_hook = hook
    try:
        for length in LENGTHS:
            for temperature in TEMPERATURES:
                _step(length, temperature, device)
    finally:
        knobs.runtime.jit_post_compile_hook = before
    return dict(compiled)


def _step(length: int, temperature: float, device: str) -> None:
    """A forward and backward of every op whose arguments change from batch to batch."""
    logits = torch.zeros(length, VOCABULARY, dtype=torch.bfloat16, device=device).requires_grad_()
    token_ids = torch.zeros(length, dtype=torch.int64, device=device)
    logprobs, entropy = kernels.logprobs_and_entropy(logits, token_ids, temperature=temperature)
    loss, _ = kernels.grpo_loss(
        logprobs[None], logprobs.detach()[None], torch.ones(1, device=device),
        torch.ones(1, length, dtype=torch.bool, device=device),
    )  # fmt: skip
    (loss + entropy.sum()).backward()
