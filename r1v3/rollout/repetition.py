"""The share of a completion that repeats itself."""

import torch
from torch import Tensor

WINDOW = 4
# An odd multiplier whose powers spread token ids over 64 bits (P. L'Ecuyer, 1999, table 4).
_MULTIPLIER = 3935559000370003845


def repetition(response_ids: Tensor, mask: Tensor, window: int = WINDOW) -> Tensor:
    """Return the share of each completion's runs of `window` tokens that it has had before.

    Zero for a completion without repeats, and for one of fewer than `window` tokens; near one for
    a completion that says the same thing over and over.

    Args:
        response_ids: int64 [N, R].
        mask: bool [N, R], True at tokens that count, which are consecutive.

    Returns:
        float64 [N].

    Raises:
        ValueError: the shapes differ, or `window` is not positive.
    """
    if response_ids.dim() != 2 or response_ids.shape != mask.shape or window < 1:
        raise ValueError(
            f"response_ids {list(response_ids.shape)} and mask {list(mask.shape)} must be [N, R], "
            f"and window {window} positive"
        )
    rows, width = response_ids.shape
    count = width - window + 1
    if count < 1:
        return torch.zeros(rows, dtype=torch.float64)
    ids, counted = response_ids.cpu().long() + 1, mask.cpu().bool()
    hashes = torch.zeros(rows, count, dtype=torch.int64)
    whole = torch.ones(rows, count, dtype=torch.bool)
    for i in range(window):
        # Integers wrap around; equal runs have equal hashes, others differ but by chance.
        hashes = (hashes + ids[:, i : i + count]) * _MULTIPLIER
        whole &= counted[:, i : i + count]
    ordered, places = hashes.sort(dim=1, stable=True)
    # A run that is not whole may stand between two equal ones: these are sorted apart.
    apart = whole.gather(1, places).long().argsort(dim=1, descending=True, stable=True)
    ordered, kept = ordered.gather(1, apart), whole.sum(1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (torch.arange(1, count)[None] < kept[:, None])
    return again.sum(1).double() / kept.clamp(min=1)
