"""Checks and shapes of the arguments that the policy losses have in common."""

import torch
from torch import Tensor

from r1v3.kernels.arguments import AGGREGATIONS, KL_ESTIMATORS, as_scalar, check_choice


def check_options(
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl: str,
    aggregation: str,
    normalizer: Tensor | float | None,
) -> None:
    """Raise a ValueError for options that make no sense."""
    check_choice("kl", kl, KL_ESTIMATORS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"clip_low and clip_high must be >= 0, got clip_low={clip_low}, clip_high={clip_high}"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be > 1 or None, got {dual_clip}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer must be one number, got a tensor of shape {list(normalizer.shape)}"
            )
    elif normalizer is None:
        if aggregation == "constant":
            raise ValueError('aggregation "constant" needs a normalizer, got None')
    elif not normalizer > 0:
        raise ValueError(f"normalizer must be > 0, got {normalizer}")


def sequence_layout(logprobs: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int, int]:
    """How [B, T] or packed [N] tokens divide into sequences, without work on a device.

    Returns:
        int64 offsets [S + 1] of packed ones, or None; the length of all others, or 0; S.
    """
    if not logprobs.is_floating_point():
        raise ValueError(f"logprobs must be floating point, got {logprobs.dtype}")
    if cu_seqlens is None:
        if logprobs.dim() != 2:
            raise ValueError(
                "logprobs must be [B, T], or [N] together with cu_seqlens, "
                f"got shape {list(logprobs.shape)}"
            )
        rows, length = logprobs.shape
        return None, length, rows
    if logprobs.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            "packed logprobs must be [N] and cu_seqlens [S + 1], "
            f"got {list(logprobs.shape)} and {list(cu_seqlens.shape)}"
        )
    offsets = cu_seqlens.to(device=logprobs.device, dtype=torch.int64).contiguous()
    return offsets, 0, cu_seqlens.shape[0] - 1


def sequence_offsets(logprobs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [S + 1] where the sequences of [B, T] or packed [N] tokens begin and end."""
    offsets, length, sequences = sequence_layout(logprobs, cu_seqlens)
    if offsets is not None:
        return offsets
    return torch.arange(sequences + 1, device=logprobs.device, dtype=torch.int64) * length


def per_sequence_or_token(
    name: str, values: Tensor, shape: tuple[int, ...], sequences: int
) -> Tensor:
    """`values` flat, of one per token or one per sequence; where both fit, per token."""
    if tuple(values.shape) == shape:
        return values
    if tuple(values.shape) in ((sequences,), (sequences, 1)):
        values = values.reshape(-1)
        # [B, 1] log-probabilities: one value per token and per sequence is the same thing.
        return values
    raise ValueError(
        f"{name} must have shape {[sequences]} (per sequence) or {list(shape)} (per token), "
        f"got {list(values.shape)}"
    )


def as_normalizer(normalizer: Tensor | float | None) -> Tensor | None:
    """A 0-d tensor without gradient, or None."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        return normalizer.detach().reshape(())
    return as_scalar(normalizer)
