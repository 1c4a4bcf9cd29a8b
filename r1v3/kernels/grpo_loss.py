"""The clipped GRPO policy loss (Skywork-R1V3 report, eq. 4, 5 and 7) from log-probabilities.

One pass gives the loss, its gradient and the metrics; the backward is one multiplication.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from r1v3.kernels import cpu, devices, reference
from r1v3.kernels.arguments import METRICS
from r1v3.kernels.grpo_terms import GrpoInputs, GrpoOptions, gives_token_losses
from r1v3.kernels.registration import register_op


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
    ratio_clip: str = "ppo",
    kl_coef: float = 0.0,
    kl: str = "k3",
    unbiased_kl: bool = False,
    aggregation: str = "sequence-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss of padded [B, T] or packed [N] tokens.

    Per token, with r = exp(clamp(logprob - old_logprob, -20, 20)):

        l = -weight * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * KL

    For A < 0 and a dual_clip c, the min is bounded below by c A (Ye et al. 2020). With ratio_clip
    "cispo" (MiniMax-M1, arXiv:2506.13585) the clipped ratio is a factor without gradient, so that
    every token, whatever its ratio, keeps the gradient -weight * clip(r) A:

        l = -weight * stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A logprob + kl_coef * KL

    Tokens with loss_mask 0 are selected out before any arithmetic, whatever they hold.

    Args:
        logprobs: [B, T], or [N] with cu_seqlens; the only input that gets a gradient.
        old_logprobs: the same shape, or None when the policy is the one that sampled.
        advantages: [B] (packed [S]) or per token. Packed with S == N is read per token.
        loss_mask: the shape of logprobs, nonzero where a token counts.
        ref_logprobs: the shape of logprobs, or None for no KL term.
        clip_low, clip_high: distances of the clip range from 1; a clip_low of 1 is no lower bound.
        dual_clip: > 1, or None, which it must be with ratio_clip "cispo".
        ratio_clip: "ppo" (the min above) or "cispo".
        kl_coef: weight of the KL to the reference.
        kl: "k1", "k2" or "k3" (Schulman 2020), on g = ref_logprob - logprob clamped to +-20. The
            derivatives by logprob are 1, -g and 1 - exp(g), and 0 beyond the clamp: with k3 one
            token of g = 19.5 weighs 2.9e8 (TRL does not bound it either; verl clamps the value to
            +-10, which takes the gradient away above g = 2.6). k2's expected gradient is that of
            the KL (arXiv:2506.09477); k1's is 0.
        unbiased_kl: multiply the estimate by r, with the gradient through both factors: then the
            expected value is the KL of this policy on tokens that another one sampled, and the
            expected gradient is its gradient, with k1 and k3 (DeepSeek-V3.2, arXiv:2512.02556).
        aggregation: "sequence-mean" (eq. 7: mean over a sequence's tokens, then over
            sequences), "token-mean" (DAPO), "sequence-sum" (sums, then mean over sequences),
            "constant" (sum / normalizer, Dr.GRPO) or "none" (the loss of each token).
        cu_seqlens: [S + 1] int offsets of packed sequences, from 0 to at most N.
        normalizer: > 0, the divisor of the sum. None counts this call's sequences with a
            valid token ("sequence-mean", "sequence-sum") or its valid tokens ("token-mean").
            To split a batch exactly, pass the same global number to every part: sequences,
            tokens or the constant.
        weights: truncated importance weights of the policy term, [B] ([S]) or per token.

    Nothing waits for a CUDA device, but in float64, which is there to compare with.

    Returns:
        loss, 0-d float32 (float64 for float64 logprobs), with aggregation "none" of the shape of
        logprobs and zero where the mask is False, and the metrics: detached 0-d tensors
        under `METRICS`. Fractions and means are over this call's valid tokens; clip_low_fraction
        counts r < 1 - clip_low with A < 0, clip_high_fraction r > 1 + clip_high with A > 0, both
        whatever A with ratio_clip "cispo";
        approx_kl is the mean of old - new; nonfinite counts valid tokens with a non-finite
        log-ratio, advantage, weight or reference log-ratio.

    Raises:
        ValueError: if shapes do not match, a name is not known, a clip range is negative, dual_clip
            is at most 1 or comes with ratio_clip "cispo", or normalizer is not > 0 or missing where
            the aggregation needs one.
    """
    options = GrpoOptions(
        clip_low, clip_high, dual_clip, ratio_clip, kl_coef, kl, unbiased_kl, aggregation
    )
    if not logprobs.is_floating_point():
        raise ValueError(f"logprobs must be floating point, got {logprobs.dtype}")
    logprobs = logprobs.to(reference.accumulation_dtype(logprobs))
    inputs = GrpoInputs.of(
        logprobs, old_logprobs, advantages, loss_mask, ref_logprobs, weights, cu_seqlens,
        normalizer, options,
    )  # fmt: skip
    loss, metrics = loss_and_metrics(logprobs.reshape(-1), inputs)
    return loss.view(logprobs.shape) if aggregation == "none" else loss, metrics


def loss_and_metrics(logprobs: Tensor, inputs: GrpoInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `grpo_loss` of flat log-probabilities [N] in the dtype of the inputs."""
    loss, metrics = _GrpoLoss.apply(
        logprobs.contiguous(), inputs.terms, inputs.mask, inputs.offsets, inputs.length,
        inputs.normalizer, inputs.options.as_floats(),
    )  # fmt: skip
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))


def loss_and_metrics_of_head(
    logprobs: Tensor, entropy: Tensor, shape: tuple[int, ...], inputs: GrpoInputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `loss_and_metrics`, with "entropy", "token_entropy" and "token_logprobs" of this shape.

    Args:
        entropy: [N], zero where the mask is False.
    """
    loss, metrics = loss_and_metrics(logprobs, inputs)
    metrics["entropy"] = entropy.sum() / metrics["tokens"].clamp(min=1)
    metrics["token_entropy"] = entropy.view(shape)
    metrics["token_logprobs"] = logprobs.detach().view(shape)
    return loss, metrics


class _GrpoLoss(torch.autograd.Function):
    """The op's loss, differentiable in the log-probabilities alone, and its metrics.

    Not autograd on the op: its wrappers take longer than the kernel.
    """

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        loss, gradient, metrics = _grpo_loss_op(*arguments)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss, _grad_metrics):  # type: ignore[no-untyped-def]
        rest = (None,) * 6
        if grad_loss is None:
            return None, *rest
        (gradient,) = ctx.saved_tensors
        return grad_loss * gradient, *rest


def _grpo_loss(
    logprobs: Tensor,
    terms: list[Tensor | None],
    mask: Tensor,
    offsets: Tensor | None,
    length: int,
    normalizer: Tensor | None,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient [N] and the metrics of flat tokens.

    With aggregation "none" the losses are [N], and the gradient is that of each token's own.

    Args:
        terms, mask, offsets, normalizer: as `GrpoInputs` has them.
        length: without offsets, of the sequences, of which the last may be shorter.
        options: from `GrpoOptions.as_floats`.
    """
    if devices.runs_triton(logprobs):
        from r1v3.kernels.triton import grpo_loss as triton

        if normalizer is not None:
            normalizer = normalizer.to(torch.float32)
        return triton.grpo_loss(logprobs, terms, mask, offsets, length, normalizer, options)
    if offsets is None:
        offsets = _equal_offsets(logprobs, length)
    if logprobs.device.type == "cpu":
        divisor = _divisor_on_cpu(normalizer)
        if cpu.supports(logprobs):
            return cpu.grpo_loss(logprobs, terms, mask, offsets, divisor, options)
        _check_offsets(offsets, logprobs.shape[0])
    advantages, old_logprobs, ref_logprobs, weights = terms
    assert advantages is not None
    return reference.grpo_loss(
        logprobs, old_logprobs, advantages, mask, offsets, ref_logprobs=ref_logprobs,
        weights=weights, normalizer=normalizer, **asdict(GrpoOptions.of_floats(options)),
    )  # fmt: skip


def _fake_grpo_loss(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    metrics = logprobs.new_empty(len(METRICS))
    loss = logprobs.new_empty(logprobs.shape if gives_token_losses(rest[-1]) else ())
    return loss, torch.empty_like(logprobs), metrics


_grpo_loss_op = register_op("grpo_loss", _grpo_loss, fake=_fake_grpo_loss)


def _equal_offsets(logprobs: Tensor, length: int) -> Tensor:
    tokens = logprobs.shape[0]
    sequences = -(-tokens // length) if length else 0
    offsets = torch.arange(sequences + 1, device=logprobs.device) * length
    return offsets.clamp_(max=tokens)


def _divisor_on_cpu(normalizer: Tensor | None) -> float:
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
