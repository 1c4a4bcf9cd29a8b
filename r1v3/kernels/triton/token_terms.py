"""Triton kernel of the terms of each token: its factor in the loss, and its sequence's values.

A program has a piece of one sequence, whose valid tokens it counts itself.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices
from r1v3.kernels.triton.sequences import (
    MASK_BLOCK,
    parts_of_sequences,
    sequence_range,
    valid_tokens,
)

BLOCK = 1024


@triton.jit
def _store_nothing(
    t, inside, counted_ptr, scale_ptr, advantages_ptr, weights_ptr,
    HAS_ADVANTAGES: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros(t.shape, tl.float32)
    tl.store(counted_ptr + t, tl.zeros(t.shape, tl.uint8), mask=inside)
    tl.store(scale_ptr + t, zero, mask=inside)
    if HAS_ADVANTAGES:
        tl.store(advantages_ptr + t, zero, mask=inside)
    if HAS_WEIGHTS:
        tl.store(weights_ptr + t, zero, mask=inside)


@triton.jit(do_not_specialize=["sequences", "parts"])
def _token_terms_kernel(
    mask_ptr,
    advantages_ptr,
    weights_ptr,
    offsets_ptr,
    length: tl.int64,
    normalizer_ptr,
    counted_ptr,
    scale_ptr,
    token_advantages_ptr,
    token_weights_ptr,
    tokens: tl.int64,
    sequences: tl.int32,
    parts,
    HAS_OFFSETS: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK_BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    item = tl.program_id(0)
    sequence = (item // parts).to(tl.int64)
    part = item % parts
    if sequence < sequences:
        begin, end = sequence_range(offsets_ptr, sequence, length, tokens, HAS_OFFSETS)
        if begin + part * BLOCK < end:
            divisor = tl.load(normalizer_ptr)
            if BY_SEQUENCE:
                divisor *= tl.maximum(valid_tokens(mask_ptr, begin, end, MASK_BLOCK), 1.0)
            own = tl.div_rn(1.0, divisor)
            advantage = 0.0
            weight = 0.0
            if HAS_ADVANTAGES:
                advantage = tl.load(advantages_ptr + sequence)
            if HAS_WEIGHTS:
                weight = tl.load(weights_ptr + sequence)
            for start in range(begin + part * BLOCK, end, parts * BLOCK):
                t = start + lanes
                inside = t < end
                valid = tl.load(mask_ptr + t, mask=inside, other=0) != 0
                tl.store(counted_ptr + t, valid.to(tl.uint8), mask=inside)
                tl.store(scale_ptr + t, tl.where(valid, own, 0.0), mask=inside)
                if HAS_ADVANTAGES:
                    tl.store(token_advantages_ptr + t, advantage, mask=inside)
                if HAS_WEIGHTS:
                    tl.store(token_weights_ptr + t, weight, mask=inside)
    if HAS_OFFSETS:  # tokens before the first sequence and behind the last
        first = tl.load(offsets_ptr)
        for start in range(item * BLOCK, first, tl.num_programs(0) * BLOCK):
            t = start + lanes
            _store_nothing(t, t < first, counted_ptr, scale_ptr, token_advantages_ptr,
                           token_weights_ptr, HAS_ADVANTAGES, HAS_WEIGHTS)  # fmt: skip
        behind = tl.load(offsets_ptr + sequences) + item * BLOCK
        for start in range(behind, tokens, tl.num_programs(0) * BLOCK):
            t = start + lanes
            _store_nothing(t, t < tokens, counted_ptr, scale_ptr, token_advantages_ptr,
                           token_weights_ptr, HAS_ADVANTAGES, HAS_WEIGHTS)  # fmt: skip


def token_terms(
    mask: Tensor,
    advantages: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor | None,
    length: int,
    sequences: int,
    normalizer: Tensor,
    *,
    by_sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask of the tokens that count, their loss scale, advantages and weights, [N] each or [0].

    Args:
        mask: bool [N]; advantages, weights: float32 [S] or None, where there is nothing to do.
        offsets: int64 [S + 1], or None for sequences of `length` tokens.
        normalizer: one float32 on the device.
        by_sequence: a token's loss is divided by the valid tokens of its sequence, too.
    """
    tokens = mask.shape[0]
    counted, scale = torch.empty_like(mask), mask.new_empty(tokens, dtype=torch.float32)
    given = [scale.new_empty(0 if x is None else tokens) for x in (advantages, weights)]
    parts = parts_of_sequences(tokens, sequences)
    if tokens:
        with devices.launching_on(mask):
            _token_terms_kernel[(max(sequences * parts, 1),)](
                mask.view(torch.uint8), advantages, weights, offsets, length, normalizer,
                counted.view(torch.uint8), scale, *given, tokens, sequences, parts,
                HAS_OFFSETS=offsets is not None, HAS_ADVANTAGES=advantages is not None,
                HAS_WEIGHTS=weights is not None, BY_SEQUENCE=by_sequence, BLOCK=BLOCK,
                MASK_BLOCK=MASK_BLOCK, num_warps=4,
            )  # fmt: skip
    return counted, scale, given[0], given[1]
