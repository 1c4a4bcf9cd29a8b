"""Specification of the two GRPO ops: group advantages and the clipped policy loss.

Plain PyTorch; float32 inside, float64 for float64 input. Equation numbers are those of the
Skywork-R1V3 report (arXiv 2507.06167).
"""

import torch
from torch import Tensor

from r1v3.kernels.arguments import METRICS

LOG_RATIO_LIMIT = 20.0


def group_advantages(
    rewards: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """Group-relative advantages (eq. 6): (r - mean) / (std + eps) within each group.

    Rewards are shifted by their group's first member before the mean is taken, so a constant
    group gives exactly 0 and a large common offset costs no digits.

    Args:
        rewards: [N] float.
        order: [N] int64, sample indices sorted by group.
        offsets: [G + 1] int64, where each group starts in `order`; empty groups are allowed.
    Returns:
        [N] float32 (float64 for float64 rewards), without gradient.
    """
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    r = rewards.detach().to(dtype)
    out = torch.empty_like(r)
    batch_std = standard_deviation(r, ddof) if scale == "batch" and r.numel() else r.new_zeros(())
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        members = order[start:end]
        n = end - start
        if n == 0:
            continue
        group = r[members]
        if n == 1 and (baseline != "none" or scale == "group"):
            out[members] = group if singleton == "raw" else _zero_like(group)
            continue
        shifted = group - group[0]
        centred = shifted - shifted.mean()
        if baseline == "none":
            centred = group
        elif baseline == "leave_one_out":
            centred = centred * (n / (n - 1))
        if scale != "none":
            std = standard_deviation(group, ddof) if scale == "group" else batch_std
            # std is NaN, not 0, when a reward is: NaN must not turn into a plausible 0.
            centred = torch.where(std == 0, _zero_like(centred), centred / (std + eps))
        out[members] = centred
    return out


def standard_deviation(r: Tensor, ddof: int) -> Tensor:
    """0-d standard deviation of r [N], N >= 1, exactly 0 where all are equal."""
    shifted = r - r[0]
    centred = shifted - shifted.mean()
    return (centred.square().sum() / max(r.numel() - ddof, 1)).sqrt()


def _zero_like(r: Tensor) -> Tensor:
    """0, or NaN where r is not finite."""
    return r * 0.0


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    offsets: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "sequence-mean",
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped policy loss (eq. 4, 5 and 7) over flat tokens, differentiable in `logprobs`.

    Args:
        logprobs, old_logprobs, loss_mask: [N]; old_logprobs None means on-policy.
        offsets: [S + 1] int64 with offsets[S] <= N, where each sequence starts.
        advantages, weights: [N], or [S] (a value per sequence).
        ref_logprobs: [N] or None.
    Returns:
        the loss (0-d, differentiable), its gradient [N] in closed form, the metrics
        [len(METRICS)].
    """
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    tokens, sequences = logprobs.shape[0], offsets.shape[0] - 1
    position = torch.arange(tokens, device=logprobs.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    valid = (loss_mask != 0) & (sequence < sequences) & (position >= offsets[0])
    picked = valid.nonzero().squeeze(-1)
    sequence = sequence[picked]

    def per_token(values: Tensor) -> Tensor:
        index = picked if values.shape[0] == tokens else sequence
        return values.detach()[index].to(dtype)

    new = logprobs[picked].to(dtype)
    a = per_token(advantages)
    raw = new - new.detach() if old_logprobs is None else new - per_token(old_logprobs)
    log_ratio = raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    policy, flat, dual = _surrogate(ratio, a, clip_low, clip_high, dual_clip)
    slope = torch.where(flat | _clamped(raw), 0.0, -ratio * a)
    finite = raw.isfinite() & a.isfinite()
    if weights is not None:
        w = per_token(weights)
        policy, slope = policy * w, slope * w
        finite = finite & w.isfinite()
    divergence = torch.zeros_like(policy)
    if ref_logprobs is not None:
        gap = per_token(ref_logprobs) - new
        finite = finite & gap.isfinite()
        divergence, divergence_slope = _kl(gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), kl)
        # Not 0 * NaN: without a coefficient a broken reference only shows in the metrics.
        if kl_coef != 0:
            policy = policy + kl_coef * divergence
            slope = slope + kl_coef * torch.where(_clamped(gap), 0.0, divergence_slope)
    share = _share(sequence, sequences, aggregation, normalizer, dtype)
    loss = (policy * share).sum()
    with torch.no_grad():
        gradient = torch.zeros_like(logprobs, dtype=dtype)
        gradient[picked] = slope * share
        low = (a < 0) & (ratio < 1 - clip_low)
        high = (a > 0) & (ratio > 1 + clip_high)
        metrics = _metrics(low, high, dual, log_ratio, divergence, ratio, finite)
    return loss, gradient, metrics


def _surrogate(
    ratio: Tensor, a: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token loss, where it is constant in the ratio, and where by the dual clip."""
    clipped = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    constant = ratio * a > clipped * a
    policy = -torch.where(constant, clipped * a, ratio * a)
    if dual_clip is None:
        return policy, constant, torch.zeros_like(constant)
    dual = (a < 0) & (policy > -dual_clip * a)
    return torch.where(dual, -dual_clip * a, policy), constant | dual, dual


def _clamped(log_ratio: Tensor) -> Tensor:
    """Where the clamp takes the gradient away; NaN is not clamped and stays visible."""
    return log_ratio.abs() > LOG_RATIO_LIMIT


def _kl(gap: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Per-token estimator of KL(policy || reference) and its derivative by the log-probability.

    gap = ref_logprob - logprob; k1, k2, k3 of Schulman, "Approximating KL divergence" (2020).
    """
    if kind == "k1":
        return -gap, torch.ones_like(gap)
    if kind == "k2":
        return 0.5 * gap.square(), -gap
    return gap.expm1() - gap, -gap.expm1()


def _share(
    sequence: Tensor,
    sequences: int,
    aggregation: str,
    normalizer: Tensor | float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The factor of each valid token's loss in the total."""
    counts = torch.zeros(sequences, dtype=dtype, device=sequence.device)
    counts = counts.index_add(0, sequence, torch.ones_like(sequence, dtype=dtype))
    if normalizer is None:
        tokens = aggregation == "token-mean"
        normalizer = (counts.sum() if tokens else (counts > 0).sum()).clamp(min=1)
    share = (
        counts[sequence] if aggregation == "sequence-mean" else torch.ones_like(counts[sequence])
    )
    return 1.0 / (share * normalizer)


def _metrics(
    low: Tensor,
    high: Tensor,
    dual: Tensor,
    log_ratio: Tensor,
    divergence: Tensor,
    ratio: Tensor,
    finite: Tensor,
) -> Tensor:
    count = torch.tensor(float(low.shape[0]), dtype=ratio.dtype, device=ratio.device)
    fractions = [
        term.to(ratio.dtype).sum() / count.clamp(min=1)
        for term in (low, high, dual, -log_ratio, divergence, ratio)
    ]
    biggest = ratio.max() if ratio.numel() else torch.zeros_like(count)
    values = [*fractions, biggest, count, (~finite).to(ratio.dtype).sum()]
    assert len(values) == len(METRICS)
    return torch.stack(values)
