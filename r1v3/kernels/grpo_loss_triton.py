"""Triton kernels of `grpo_loss`: one program per sequence, then one program over sequences.

No atomics: partial sums are written per sequence and added in a fixed order, so the loss, the
gradient and the metrics have the same bits on every run.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SUMS = 10
LIMIT = tl.constexpr(20.0)


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
        slope = tl.full(gap.shape, 1.0, tl.float32)
    elif KL == 1:
        divergence = 0.5 * gap * gap
        slope = -gap
    else:
        # exp(g) - 1 - g by its series near 0, where the difference would cancel.
        series = gap * gap * (0.5 + gap * (1.0 / 6 + gap * (1.0 / 24 + gap / 120)))
        divergence = tl.where(tl.abs(gap) < 0.1, series, tl.exp(gap) - 1.0 - gap)
        slope = -(divergence + gap)
    return divergence, slope


@triton.jit
def _sequence_kernel(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    ref_ptr,
    weights_ptr,
    offsets_ptr,
    gradient_ptr,
    sums_ptr,
    clip_low: tl.float32,
    clip_high: tl.float32,
    dual_clip: tl.float32,
    kl_coef: tl.float32,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TOKEN_ADVANTAGES: tl.constexpr,
    TOKEN_WEIGHTS: tl.constexpr,
    DUAL: tl.constexpr,
    PENALTY: tl.constexpr,
    KL: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        t = start + lanes
        counts += (tl.load(mask_ptr + t, mask=t < end, other=0) != 0).to(tl.float32)
    count = tl.sum(counts, axis=0)
    own = 1.0
    if SEQUENCE_MEAN:
        own = 1.0 / tl.maximum(count, 1.0)
    loss = tl.zeros([BLOCK], tl.float32)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    dual = tl.zeros([BLOCK], tl.float32)
    approx_kl = tl.zeros([BLOCK], tl.float32)
    ref_kl = tl.zeros([BLOCK], tl.float32)
    ratios = tl.zeros([BLOCK], tl.float32)
    biggest = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        t = start + lanes
        valid = (tl.load(mask_ptr + t, mask=t < end, other=0) != 0) & (t < end)
        # Masked tokens are never read: whatever they hold cannot reach a sum.
        new = tl.load(logprobs_ptr + t, mask=valid, other=0.0)
        old = new
        if HAS_OLD:
            old = tl.load(old_ptr + t, mask=valid, other=0.0)
        if TOKEN_ADVANTAGES:
            a = tl.load(advantages_ptr + t, mask=valid, other=0.0)
        else:
            a = tl.where(valid, tl.load(advantages_ptr + sequence), 0.0)
        raw = new - old
        log_ratio = _clamp(raw)
        ratio = tl.exp(log_ratio)
        free = ratio * a
        clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * a
        constant = free > clipped
        token = -tl.where(constant, clipped, free)
        flat = constant | (tl.abs(raw) > LIMIT)
        if DUAL:
            bounded = (a < 0) & (token > -dual_clip * a)
            token = tl.where(bounded, -dual_clip * a, token)
            flat = flat | bounded
            dual += tl.where(bounded, 1.0, 0.0)
        slope = tl.where(flat, 0.0, -free)
        bad = _nonfinite(raw) | _nonfinite(a)
        if HAS_WEIGHTS:
            if TOKEN_WEIGHTS:
                weight = tl.load(weights_ptr + t, mask=valid, other=0.0)
            else:
                weight = tl.where(valid, tl.load(weights_ptr + sequence), 0.0)
            token = token * weight
            slope = slope * weight
            bad = bad | _nonfinite(weight)
        if HAS_REF:
            raw_gap = tl.load(ref_ptr + t, mask=valid, other=0.0) - new
            bad = bad | _nonfinite(raw_gap)
            gap = _clamp(raw_gap)
            divergence, steepness = _kl(gap, KL)
            ref_kl += tl.where(valid, divergence, 0.0)
            if PENALTY:
                token += kl_coef * divergence
                slope += kl_coef * tl.where(tl.abs(raw_gap) > LIMIT, 0.0, steepness)
        loss += tl.where(valid, token, 0.0)
        low += tl.where((a < 0) & (ratio < 1.0 - clip_low), 1.0, 0.0)
        high += tl.where((a > 0) & (ratio > 1.0 + clip_high), 1.0, 0.0)
        approx_kl -= tl.where(valid, log_ratio, 0.0)
        ratios += tl.where(valid, ratio, 0.0)
        biggest = _max_or_nan(biggest, tl.where(valid, ratio, 0.0))
        broken += tl.where(bad & valid, 1.0, 0.0)
        tl.store(gradient_ptr + t, tl.where(valid, slope * own, 0.0), mask=t < end)
    out = sums_ptr + sequence * SUMS
    tl.store(out, tl.sum(low, axis=0))
    tl.store(out + 1, tl.sum(high, axis=0))
    tl.store(out + 2, tl.sum(dual, axis=0))
    tl.store(out + 3, tl.sum(approx_kl, axis=0))
    tl.store(out + 4, tl.sum(ref_kl, axis=0))
    tl.store(out + 5, tl.sum(ratios, axis=0))
    tl.store(out + 6, tl.reduce(biggest, 0, _max_or_nan))
    tl.store(out + 7, count)
    tl.store(out + 8, tl.sum(broken, axis=0))
    tl.store(out + 9, tl.sum(loss, axis=0) * own)


@triton.jit
def _total_kernel(
    sums_ptr,
    normalizer_ptr,
    loss_ptr,
    metrics_ptr,
    inverse_ptr,
    sequences,
    HAS_NORMALIZER: tl.constexpr,
    TOKEN_MEAN: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    tokens = tl.zeros([BLOCK], tl.float32)
    active = tl.zeros([BLOCK], tl.float32)
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, sequences, BLOCK):
        s = start + lanes
        count = tl.load(sums_ptr + s * SUMS + 7, mask=s < sequences, other=0.0)
        tokens += count
        active += tl.where(count > 0, 1.0, 0.0)
        loss += tl.load(sums_ptr + s * SUMS + 9, mask=s < sequences, other=0.0)
    total = tl.sum(tokens, axis=0)
    if HAS_NORMALIZER:
        normalizer = tl.load(normalizer_ptr)
    elif TOKEN_MEAN:
        normalizer = tl.maximum(total, 1.0)
    else:
        normalizer = tl.maximum(tl.sum(active, axis=0), 1.0)
    tl.store(inverse_ptr, 1.0 / normalizer)
    tl.store(loss_ptr, tl.sum(loss, axis=0) / normalizer)
    for k in tl.static_range(9):
        part = tl.zeros([BLOCK], tl.float32)
        for start in range(0, sequences, BLOCK):
            s = start + lanes
            value = tl.load(sums_ptr + s * SUMS + k, mask=s < sequences, other=0.0)
            if k == 6:
                part = _max_or_nan(part, value)
            else:
                part += value
        if k == 6:
            result = tl.reduce(part, 0, _max_or_nan)
        elif k < 6:
            result = tl.sum(part, axis=0) / tl.maximum(total, 1.0)
        else:
            result = tl.sum(part, axis=0)
        tl.store(metrics_ptr + k, result)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
    aggregation: int,
    n_metrics: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and metrics of flat float32 tokens.

    Args:
        normalizer: one float32 on the tokens' device, or None to count; dual_clip 0 means none;
            kl and aggregation are positions in `arguments`.
    """
    tokens, sequences = logprobs.shape[0], offsets.shape[0] - 1
    gradient = torch.zeros_like(logprobs)
    sums = logprobs.new_empty(sequences, SUMS)
    loss, inverse = logprobs.new_empty(()), logprobs.new_empty(())
    metrics = logprobs.new_empty(n_metrics)
    if sequences:
        _sequence_kernel[(sequences,)](
            logprobs, old_logprobs, advantages, mask.view(torch.uint8), ref_logprobs, weights,
            offsets, gradient, sums, float(clip_low), float(clip_high), float(dual_clip),
            float(kl_coef),
            HAS_OLD=old_logprobs is not None, HAS_REF=ref_logprobs is not None,
            HAS_WEIGHTS=weights is not None, TOKEN_ADVANTAGES=advantages.shape[0] == tokens,
            TOKEN_WEIGHTS=weights is not None and weights.shape[0] == tokens,
            DUAL=dual_clip > 0, PENALTY=kl_coef != 0, KL=kl, SEQUENCE_MEAN=aggregation == 0,
            SUMS=SUMS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    _total_kernel[(1,)](
        sums, normalizer, loss, metrics, inverse, sequences,
        HAS_NORMALIZER=normalizer is not None, TOKEN_MEAN=aggregation == 1, SUMS=SUMS,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return loss, gradient.mul_(inverse), metrics
