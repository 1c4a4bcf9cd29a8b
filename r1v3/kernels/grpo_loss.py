"""The clipped GRPO policy loss (Skywork-R1V3 report, eq. 4, 5 and 7) from log-probabilities.

One pass gives the loss, its gradient and the metrics; the backward is one multiplication.
"""

import torch
from torch import Tensor

from r1v3.kernels import devices, host, reference
from r1v3.kernels.arguments import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    METRICS,
    check_shape,
)
from r1v3.kernels.grpo_arguments import (
    as_normalizer,
    check_options,
    per_sequence_or_token,
    sequence_layout,
)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "sequence-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss of padded [B, T] or packed [N] tokens.

    Per token, with r = exp(clamp(logprob - old_logprob, -20, 20)):

        l = -weight * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * KL

    For A < 0 and a dual_clip c, the min is bounded below by c A (Ye et al. 2020). Tokens with
    loss_mask 0 are selected out before any arithmetic, whatever they hold.

    Args:
        logprobs: [B, T], or [N] with cu_seqlens; the only input that gets a gradient.
        old_logprobs: the same shape, or None when the policy is the one that sampled.
        advantages: [B] (packed [S]) or per token. Packed with S == N is read per token.
        loss_mask: the shape of logprobs, not 0 where a token counts.
        ref_logprobs: the shape of logprobs, or None for no KL term.
        clip_low, clip_high: distances of the clip range from 1.
        dual_clip: > 1, or None.
        kl_coef: weight of the KL to the reference.
        kl: "k1", "k2" or "k3" (Schulman 2020), on ref_logprob - logprob clamped to +-20.
        aggregation: "sequence-mean" (eq. 7: mean over a sequence's tokens, then over
            sequences), "token-mean" (DAPO), "sequence-sum" (sums, then mean over sequences)
            or "constant" (sum / normalizer, Dr.GRPO).
        cu_seqlens: [S + 1] int offsets of packed sequences, from 0 to at most N.
        normalizer: > 0, what the sum is divided by. None counts this call's sequences with a
            valid token ("sequence-mean", "sequence-sum") or its valid tokens ("token-mean").
            To split a batch exactly, pass the same global number to every part: sequences,
            tokens or the constant. A 0-d tensor avoids a host synchronisation.
        weights: truncated importance weights of the policy term, [B] ([S]) or per token.

    Returns:
        loss, 0-d float32 (float64 for float64 logprobs), and the metrics: detached 0-d tensors
        under `METRICS`. Fractions and means are over this call's valid tokens; clip_low_fraction
        counts r < 1 - clip_low with A < 0, clip_high_fraction r > 1 + clip_high with A > 0;
        approx_kl is the mean of old - new; nonfinite counts valid tokens with a non-finite
        log-ratio, advantage, weight or reference log-ratio.

    Raises:
        ValueError: for a shape, name or bound that makes no sense.
    """
    check_options(clip_low, clip_high, dual_clip, kl, aggregation, normalizer)
    offsets, length, sequences = sequence_layout(logprobs, cu_seqlens)
    shape = tuple(logprobs.shape)
    check_shape("loss_mask", loss_mask, shape)
    for name, tensor in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if tensor is not None:
            check_shape(name, tensor, shape)
    dtype = reference.accumulation_dtype(logprobs)
    mask = loss_mask if loss_mask.dtype == torch.bool else loss_mask != 0
    loss, metrics = _PolicyLoss.apply(
        logprobs.reshape(-1).to(dtype).contiguous(),
        _flat(old_logprobs, dtype),
        _flat(per_sequence_or_token("advantages", advantages, shape, sequences), dtype),
        mask.reshape(-1).contiguous(),
        _flat(ref_logprobs, dtype),
        None
        if weights is None
        else _flat(per_sequence_or_token("weights", weights, shape, sequences), dtype),
        offsets,
        length,
        as_normalizer(normalizer),
        clip_low,
        clip_high,
        0.0 if dual_clip is None else dual_clip,
        kl_coef,
        KL_ESTIMATORS.index(kl),
        AGGREGATIONS.index(aggregation),
    )
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))


def _flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().reshape(-1).to(dtype).contiguous()


class _PolicyLoss(torch.autograd.Function):
    """The op's loss, differentiable by the log-probabilities alone, and its metrics."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        loss, gradient, metrics = torch.ops.r1v3.grpo_loss.default(*arguments)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss, _grad_metrics):  # type: ignore[no-untyped-def]
        rest = (None,) * 14
        if grad_loss is None:
            return None, *rest
        (gradient,) = ctx.saved_tensors
        return grad_loss * gradient, *rest


# Not `custom_op`, nor autograd on the op: their wrappers take longer than the kernel.
torch.library.define(
    "r1v3::grpo_loss",
    "(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    "Tensor? weights, Tensor? offsets, SymInt length, Tensor? normalizer, float clip_low, "
    "float clip_high, float dual_clip, float kl_coef, int kl, int aggregation) "
    "-> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# Its results carry no gradient; `_PolicyLoss` does.
_LIBRARY = torch.library.Library("r1v3", "FRAGMENT")
_LIBRARY.impl("grpo_loss", torch.library.fallthrough_kernel, "Autograd")


@torch.library.impl("r1v3::grpo_loss", ("cpu", "cuda"))
def _grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor | None,
    length: int,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
    aggregation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient [N] and the metrics of flat tokens.

    Args:
        offsets: int64 [S + 1] of the sequences; None for sequences of `length` tokens, of which
            the last may be shorter.
    """
    inputs = logprobs, old_logprobs, advantages, mask, ref_logprobs, weights
    bounds, codes = (clip_low, clip_high, dual_clip, kl_coef), (kl, aggregation, len(METRICS))
    if devices.runs_triton(logprobs):
        from r1v3.kernels import grpo_loss_triton

        if normalizer is not None:
            normalizer = normalizer.to(logprobs.device, torch.float32, non_blocking=True)
        return grpo_loss_triton.grpo_loss(*inputs, offsets, length, normalizer, *bounds, *codes)
    if offsets is None:
        offsets = _equal_offsets(logprobs, length)
    if logprobs.device.type == "cpu":
        divisor = _divisor_on_host(normalizer)
        if host.supports(logprobs):
            return host.grpo_loss(*inputs, offsets, divisor, *bounds, *codes)
        _check_offsets(offsets, logprobs.shape[0])
    return reference.grpo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        offsets,
        ref_logprobs=ref_logprobs,
        weights=weights,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip or None,
        kl_coef=kl_coef,
        kl=KL_ESTIMATORS[kl],
        aggregation=AGGREGATIONS[aggregation],
        normalizer=normalizer,
    )


def _equal_offsets(logprobs: Tensor, length: int) -> Tensor:
    tokens = logprobs.shape[0]
    sequences = -(-tokens // length) if length else 0
    offsets = torch.arange(sequences + 1, device=logprobs.device) * length
    return offsets.clamp_(max=tokens)


def _divisor_on_host(normalizer: Tensor | None) -> float:
    """The normalizer as a number, 0 for none."""
    if normalizer is None:
        return 0.0
    divisor = float(normalizer)
    if not divisor > 0:
        raise ValueError(f"normalizer must be > 0, got {divisor}")
    return divisor


def _check_offsets(offsets: Tensor, tokens: int) -> None:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] > tokens or values != sorted(values):
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most the {tokens} tokens, got {values[:16]}"
        )


@torch.library.register_fake("r1v3::grpo_loss")
def _(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    offsets: Tensor | None,
    length: int,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
    aggregation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    metrics = logprobs.new_empty(len(METRICS))
    return logprobs.new_empty(()), torch.empty_like(logprobs), metrics
