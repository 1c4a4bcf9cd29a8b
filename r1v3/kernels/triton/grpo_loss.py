"""Triton kernel of `grpo_loss`: one launch gives the loss, its gradient and every metric.

Programs walk over pieces of sequences and write their partial sums; the one that finishes last
adds them in a fixed order. Only an integer ticket is atomic, so loss, gradient and metrics have
the same bits on every run. Where nobody names the normalizer, only the last program knows it, and
a second launch divides the gradient by it.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1v3.kernels import devices
from r1v3.kernels.arguments import METRICS
from r1v3.kernels.grpo_terms import RATIO_CLIPS, gives_token_losses
from r1v3.kernels.reference import LOG_RATIO_LIMIT
from r1v3.kernels.triton.sequences import (
    MASK_BLOCK,
    parts_of_sequences,
    sequence_range,
    valid_tokens,
)

BLOCK = 512
# Beyond eight programs per multiprocessor, they only lengthen the last sum.
MOST_PROGRAMS = 1024
SUMS = 16
LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


@triton.jit
def _clamp(x):
    x = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nonfinite(x):
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit
def _max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _kl(gap, KL: tl.constexpr):
    """Value and derivative by the log-probability of the estimators k1, k2, k3."""
    if KL == 0:
        divergence = -gap
        grad = tl.full(gap.shape, 1.0, tl.float32)
    elif KL == 1:
        divergence = 0.5 * gap * gap
        grad = -gap
    else:
        # exp(g) - 1 - g by its series near 0, where the difference would cancel.
        series = gap * gap * (0.5 + gap * (1.0 / 6 + gap * (1.0 / 24 + gap / 120)))
        divergence = tl.where(tl.abs(gap) < 0.1, series, tl.exp(gap) - 1.0 - gap)
        grad = -(divergence + gap)
    return divergence, grad


@triton.jit
def _penalty(raw_gap, raw, ratio, KL: tl.constexpr, UNBIASED_KL: tl.constexpr):
    """A token's KL and its derivative by the log-probability, which a clamp takes away."""
    divergence, grad = _kl(_clamp(raw_gap), KL)
    grad = tl.where(tl.abs(raw_gap) > LIMIT, 0.0, grad)
    if UNBIASED_KL:
        grad = ratio * (grad + tl.where(tl.abs(raw) > LIMIT, 0.0, divergence))
        divergence = ratio * divergence
    return divergence, grad


@triton.jit
def _store_token(gradient_ptr, losses_ptr, t, inside, valid, grad, loss, AGGREGATION: tl.constexpr):
    tl.store(gradient_ptr + t, tl.where(valid, grad, 0.0), mask=inside)
    if AGGREGATION == 4:
        tl.store(losses_ptr + t, tl.where(valid, loss, 0.0), mask=inside)


@triton.jit
def _surrogate(raw, ratio, a, clip_low, clip_high, dual_clip, DUAL: tl.constexpr):
    """A token's loss, its derivative by the log-probability, and where the dual clip bounds it."""
    free = ratio * a
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * a
    constant = free > clipped
    token = -tl.where(constant, clipped, free)
    flat = constant | (tl.abs(raw) > LIMIT)
    bounded = tl.zeros(raw.shape, tl.int1)
    if DUAL:
        bounded = (a < 0) & (token > -dual_clip * a)
        token = tl.where(bounded, -dual_clip * a, token)
        flat = flat | bounded
    return token, tl.where(flat, 0.0, -free), bounded


@triton.jit
def _policy(new, raw, ratio, a, clip_low, clip_high, dual_clip, POLICY: tl.constexpr):
    """A token's loss, its derivative by the log-probability, and where which of the clips acts.

    POLICY 0 is the clipped surrogate, 1 has a dual clip, 2 is CISPO.
    """
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    below = ratio < low
    above = ratio > high
    if POLICY == 2:
        grad = -tl.where(above, high, tl.where(below, low, ratio)) * a  # NaN stays
        token = grad * new
        bounded = tl.zeros(raw.shape, tl.int1)
    else:
        token, grad, bounded = _surrogate(
            raw, ratio, a, clip_low, clip_high, dual_clip, POLICY == 1
        )
        below = (a < 0) & below
        above = (a > 0) & above
    return token, grad, below, above, bounded


@triton.jit
def _value_of(values_ptr, t, sequence, valid, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        value = tl.load(values_ptr + t, mask=valid, other=0.0)
    else:
        value = tl.where(valid, tl.load(values_ptr + sequence), 0.0)
    return value


@triton.jit(do_not_specialize=["sequences", "parts"])
def _grpo_loss_kernel(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    ref_ptr,
    weights_ptr,
    offsets_ptr,
    length: tl.int64,
    normalizer_ptr,
    gradient_ptr,
    losses_ptr,
    sums_ptr,
    loss_ptr,
    metrics_ptr,
    inverse_ptr,
    ticket_ptr,
    tokens: tl.int64,
    sequences: tl.int32,
    parts,
    clip_low: tl.float32,
    clip_high: tl.float32,
    dual_clip: tl.float32,
    kl_coef: tl.float32,
    HAS_OFFSETS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    TOKEN_ADVANTAGES: tl.constexpr,
    TOKEN_WEIGHTS: tl.constexpr,
    POLICY: tl.constexpr,
    PENALTY: tl.constexpr,
    KL: tl.constexpr,
    UNBIASED_KL: tl.constexpr,
    AGGREGATION: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK_BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float64)  # gains and losses of thousands of tokens cancel
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    dual = tl.zeros([BLOCK], tl.float32)
    approx_kl = tl.zeros([BLOCK], tl.float32)
    ref_kl = tl.zeros([BLOCK], tl.float32)
    ratios = tl.zeros([BLOCK], tl.float32)
    biggest = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    active = tl.zeros([], tl.float32)
    inverse = 1.0
    if HAS_NORMALIZER:
        inverse = 1.0 / tl.load(normalizer_ptr)
    for item in range(tl.program_id(0), sequences * parts, tl.num_programs(0)):
        sequence = (item // parts).to(tl.int64)
        part = item % parts
        begin, end = sequence_range(offsets_ptr, sequence, length, tokens, HAS_OFFSETS)
        own = 1.0
        # Sequences without a valid token do not count, nor do pieces past a sequence's end.
        if (AGGREGATION == 0 or AGGREGATION == 2) and begin + part * BLOCK < end:
            count = valid_tokens(mask_ptr, begin, end, MASK_BLOCK)
            if part == 0 and count > 0:
                active += 1.0
            if AGGREGATION == 0:
                own = 1.0 / tl.maximum(count, 1.0)
        for start in range(begin + part * BLOCK, end, parts * BLOCK):
            t = start + lanes
            valid = (tl.load(mask_ptr + t, mask=t < end, other=0) != 0) & (t < end)
            # Masked tokens are never read: whatever they hold cannot reach a sum.
            new = tl.load(logprobs_ptr + t, mask=valid, other=0.0)
            old = new
            if HAS_OLD:
                old = tl.load(old_ptr + t, mask=valid, other=0.0)
            a = _value_of(advantages_ptr, t, sequence, valid, TOKEN_ADVANTAGES)
            raw = new - old
            log_ratio = _clamp(raw)
            ratio = tl.exp(log_ratio)
            token, grad, below, above, bounded = _policy(
                new, raw, ratio, a, clip_low, clip_high, dual_clip, POLICY
            )
            dual += tl.where(bounded, 1.0, 0.0)
            bad = _nonfinite(raw) | _nonfinite(a)
            if HAS_WEIGHTS:
                weight = _value_of(weights_ptr, t, sequence, valid, TOKEN_WEIGHTS)
                token = token * weight
                grad = grad * weight
                bad = bad | _nonfinite(weight)
            if HAS_REF:
                raw_gap = tl.load(ref_ptr + t, mask=valid, other=0.0) - new
                bad = bad | _nonfinite(raw_gap)
                divergence, grad_kl = _penalty(raw_gap, raw, ratio, KL, UNBIASED_KL)
                ref_kl += tl.where(valid, divergence, 0.0)
                if PENALTY:
                    token += kl_coef * divergence
                    grad += kl_coef * grad_kl
            loss += (tl.where(valid, token, 0.0) * own).to(tl.float64)
            low += tl.where(below, 1.0, 0.0)
            high += tl.where(above, 1.0, 0.0)
            approx_kl -= tl.where(valid, log_ratio, 0.0)
            ratios += tl.where(valid, ratio, 0.0)
            biggest = _max_or_nan(biggest, tl.where(valid, ratio, 0.0))
            broken += tl.where(bad & valid, 1.0, 0.0)
            counts += tl.where(valid, 1.0, 0.0)
            grad = grad * (own * inverse)
            _store_token(gradient_ptr, losses_ptr, t, t < end, valid, grad, token, AGGREGATION)
    if HAS_OFFSETS:
        behind = tl.load(offsets_ptr + sequences) + tl.program_id(0) * BLOCK
        for start in range(behind, tokens, tl.num_programs(0) * BLOCK):
            t = start + lanes
            _store_token(gradient_ptr, losses_ptr, t, t < tokens, t < 0, 0.0, 0.0, AGGREGATION)
    out = sums_ptr + tl.program_id(0) * 16
    _store_sums(out, low, high, dual, approx_kl, ref_kl, ratios, biggest, counts, broken, loss)
    tl.store(out + 10, active)
    # The release makes these sums visible to whoever draws a later ticket.
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        _total(sums_ptr, normalizer_ptr, loss_ptr, metrics_ptr, inverse_ptr, HAS_NORMALIZER,
               AGGREGATION)  # fmt: skip


@triton.jit
def _store_sums(out, low, high, dual, approx_kl, ref_kl, ratios, biggest, counts, broken, loss):
    tl.store(out, tl.sum(low, axis=0))
    tl.store(out + 1, tl.sum(high, axis=0))
    tl.store(out + 2, tl.sum(dual, axis=0))
    tl.store(out + 3, tl.sum(approx_kl, axis=0))
    tl.store(out + 4, tl.sum(ref_kl, axis=0))
    tl.store(out + 5, tl.sum(ratios, axis=0))
    tl.store(out + 6, tl.reduce(biggest, 0, _max_or_nan))
    tl.store(out + 7, tl.sum(counts, axis=0))
    tl.store(out + 8, tl.sum(broken, axis=0))
    tl.store(out + 9, tl.sum(loss, axis=0))


@triton.jit
def _sum_at(values, lanes, index: tl.constexpr):
    return tl.sum(tl.where(lanes == index, values, 0.0), axis=0)


@triton.jit
def _total(
    sums_ptr,
    normalizer_ptr,
    loss_ptr,
    metrics_ptr,
    inverse_ptr,
    HAS_NORMALIZER: tl.constexpr,
    AGGREGATION: tl.constexpr,
):
    """Add the programs' sums in order: metrics 0 to 8, 9 the loss, 10 sequences that count."""
    k = tl.arange(0, 16)
    rows = tl.arange(0, 32)
    totals = tl.zeros([32, 16], tl.float64)
    tops = tl.zeros([32, 16], tl.float64)
    for start in range(0, tl.num_programs(0), 32):
        inside = (start + rows < tl.num_programs(0))[:, None] & (k < 11)[None, :]
        at = sums_ptr + (start + rows)[:, None] * 16 + k[None, :]
        part = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        totals += part
        tops = _max_or_nan(tops, part)
    total = tl.sum(totals, axis=0)
    top = tl.reduce(tops, 0, _max_or_nan)
    tokens = _sum_at(total, k, 7)
    if HAS_NORMALIZER:
        normalizer = tl.load(normalizer_ptr).to(tl.float64)
    elif AGGREGATION == 1:
        normalizer = tl.maximum(tokens, 1.0)
    else:
        normalizer = tl.maximum(_sum_at(total, k, 10), 1.0)
    result = tl.where(k < 6, total / tl.maximum(tokens, 1.0), total)
    tl.store(metrics_ptr + k, tl.where(k == 6, top, result), mask=k < 9)
    tl.store(loss_ptr, _sum_at(total, k, 9) / normalizer)
    tl.store(inverse_ptr, 1.0 / normalizer)


def grpo_loss(
    logprobs: Tensor,
    terms: list[Tensor | None],
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    normalizer: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, or losses, gradient and metrics of flat float32 tokens; arguments as the op's.

    Args:
        normalizer: one float32 on the tokens' device, or None to count.
    """
    advantages, old_logprobs, ref_logprobs, weights = terms
    assert advantages is not None
    clip_low, clip_high, dual_clip, ratio_clip, kl_coef, kl, unbiased_kl, aggregation = options
    tokens = logprobs.shape[0]
    if offsets is not None:
        sequences = offsets.shape[0] - 1
    else:
        sequences = triton.cdiv(tokens, length) if length else 0
    parts = parts_of_sequences(tokens, sequences)
    programs = max(1, min(sequences * parts, MOST_PROGRAMS))
    gradient = torch.empty_like(logprobs)
    losses = torch.empty_like(logprobs) if gives_token_losses(options) else None
    sums = logprobs.new_empty(programs, SUMS, dtype=torch.float64)
    loss, inverse = logprobs.new_empty(()), logprobs.new_empty(())
    metrics = logprobs.new_empty(len(METRICS))
    # New in every call: memory that outlives its call may be a CUDA graph's.
    ticket = torch.zeros(1, dtype=torch.int32, device=logprobs.device)
    with devices.launching_on(logprobs):
        _grpo_loss_kernel[(programs,)](
            logprobs, old_logprobs, advantages, mask.view(torch.uint8), ref_logprobs, weights,
            offsets, length, normalizer, gradient, losses, sums, loss, metrics, inverse, ticket,
            tokens, sequences, parts, clip_low, clip_high, dual_clip, kl_coef,
            HAS_OFFSETS=offsets is not None, HAS_OLD=old_logprobs is not None,
            HAS_REF=ref_logprobs is not None, HAS_WEIGHTS=weights is not None,
            HAS_NORMALIZER=normalizer is not None, TOKEN_ADVANTAGES=advantages.shape[0] == tokens,
            TOKEN_WEIGHTS=weights is not None and weights.shape[0] == tokens,
            POLICY=2 if RATIO_CLIPS[int(ratio_clip)] == "cispo" else int(dual_clip > 0),
            PENALTY=kl_coef != 0, KL=int(kl), UNBIASED_KL=bool(unbiased_kl),
            AGGREGATION=int(aggregation), BLOCK=BLOCK, MASK_BLOCK=MASK_BLOCK, num_warps=4,
        )  # fmt: skip
        if normalizer is None and losses is None:
            gradient.mul_(inverse)
    return loss if losses is None else losses, gradient, metrics
