"""What a GRPO loss knows of each token before its log-probability."""

import torch
from torch import Tensor


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
