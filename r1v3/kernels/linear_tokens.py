"""What a GRPO loss knows of each token before its log-probability, and its slope after."""

import torch
from torch import Tensor

from r1v3.kernels.arguments import AGGREGATIONS

# Tokens that one program of the loss kernel works on, where no sequence matters.
LOSS_BLOCK = 1024


def sequence_of_tokens(offsets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Per token of n, the number of its sequence, and whether it is in any.

    Args:
        offsets: int64 [S + 1], where each sequence starts.
    """
    position = torch.arange(n, device=offsets.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    return sequence, (sequence < offsets.shape[0] - 1) & (position >= offsets[0])


def per_token(values: Tensor, sequence: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] from a value per token or per sequence."""
    values = values.detach().reshape(-1).to(dtype)
    if values.shape[0] == sequence.shape[0]:
        return values
    # The last one stands for tokens in no sequence, which do not count.
    return values[sequence.clamp(max=values.shape[0] - 1)]


def share_of_tokens(
    mask: Tensor,
    sequence: Tensor,
    sequences: int,
    aggregation: str,
    normalizer: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What the loss of each token [N] is multiplied with in the total; 0 outside the mask.

    Args:
        mask: bool [N]; sequence: int64 [N], `sequences` where a token is in none.
    """
    counts = torch.zeros(sequences + 1, dtype=dtype, device=mask.device)
    counts = counts.index_add(0, sequence, mask.to(dtype))
    if normalizer is not None:
        divisor = normalizer.to(mask.device, dtype, non_blocking=True)
    elif aggregation == "token-mean":
        divisor = counts.sum().clamp(min=1)
    else:
        divisor = (counts > 0).sum().clamp(min=1)
    if aggregation == "sequence-mean":
        divisor = divisor * counts[sequence].clamp(min=1)
    return torch.where(mask, 1.0, 0.0).to(dtype) / divisor


def slope_of_tokens(
    logprobs: Tensor,
    mask: Tensor,
    share: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    options: tuple[float, float, float, float, int],
) -> Tensor:
    """d loss / d logprob [n], 0 outside the mask.

    Args:
        share: from `share_of_tokens`; options: clip_low, clip_high, dual_clip, kl_coef, kl.
    """
    _, slope, _ = torch.ops.r1v3.grpo_loss(
        logprobs, old_logprobs, advantages, mask, ref_logprobs, weights, None, LOSS_BLOCK,
        logprobs.new_ones(()), *options, AGGREGATIONS.index("constant"),
    )  # fmt: skip
    return slope.mul_(share)  # type: ignore[no-any-return]
