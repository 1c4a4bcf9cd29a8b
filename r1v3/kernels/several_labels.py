"""K labels for each row: their logits, log-probabilities and gradients, beside the kernels.

The kernels read a row for its statistics and write its gradient; of the labels' K logits they know
nothing. Those are gathered, which reads K elements more for each row, and their columns of the
gradient are computed from them and written after the kernel, which may overwrite the logits:

    dlogits_t = [g_t - p_t (g + g_H (log p_t + H))] / T

with g the sum of a row's K upstream gradients, and g_t that over the labels that are t. Elsewhere
g_t is 0. Nothing here waits for a device, and all that is allocated is [n, K].
"""

import torch
import torch.distributed as dist
from torch import Tensor

from r1v3.kernels import reference, vocab_parallel
from r1v3.kernels.row_labels import RowLabels


def target_logits(logits: Tensor, labels: RowLabels) -> Tensor:
    """Logits [n, K] of the labels in float32 (float64 for float64), 0 for one that is not here."""
    ids = labels.token_ids
    assert ids is not None
    dtype = reference.accumulation_dtype(logits)
    if ids.numel() == 0 or logits.shape[-1] == 0:
        return logits.new_zeros(ids.shape, dtype=dtype)
    logits = torch.atleast_2d(logits)
    columns, here = _columns(labels, logits.shape[-1])
    return torch.where(here, logits[_places(logits, labels, columns)].to(dtype), 0.0)


def target_logprobs(targets: Tensor, labels: RowLabels, width: int, saved: Tensor) -> Tensor:
    """Log-probabilities [n, K] of the labels.

    Args:
        targets: [n, K] from `target_logits`, added up over tiles; overwritten.
        width: columns of the logits, where the labels have no shard.
        saved: [n, 3] = (m, log s, entropy) of the rows.
    """
    ids = labels.token_ids
    assert ids is not None
    if labels.group and targets.numel():  # all but one are 0: no order of addition changes a bit
        dist.all_reduce(targets, group=vocab_parallel.process_group(labels.group))
    m, log_s = saved[:, :1], saved[:, 1:2]
    gap = torch.where(targets == -torch.inf, -torch.inf, targets - m)
    logprobs = reference.over(gap, labels.temperature) - log_s
    vocab, shard = labels.columns_on_device(width)
    size = vocab if shard is None else shard[1]
    logprobs = torch.where((ids >= 0) & (ids < size), logprobs, torch.nan)
    return torch.where(ids == reference.IGNORED_TOKEN, 0.0, logprobs)


def summed_gradients(grad_logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """float64 [n, 1 + K]: a row's sum of its K gradients, then each label's over those equal to it.

    Args:
        grad_logprobs: [n, K] upstream; token_ids: [n, K], of which -100 adds nothing.
    """
    ignored = token_ids == reference.IGNORED_TOKEN
    given = torch.where(ignored, 0.0, grad_logprobs.double())
    if given.shape[1] == 0:
        return given.new_zeros(given.shape[0], 1)
    # In orders that depend on K alone, run to run and whatever the batch.
    total = given
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = torch.cat([total[:, :half] + total[:, half : 2 * half], total[:, 2 * half :]], 1)
    ordered, order = token_ids.contiguous().sort(dim=1, stable=True)
    sums, step = given.gather(1, order), 1
    while step < sums.shape[1]:
        equal = ordered[:, step:] == ordered[:, :-step]
        sums[:, step:] += torch.where(equal, sums[:, :-step], 0.0)
        step *= 2
    last = torch.searchsorted(ordered, token_ids.contiguous(), right=True) - 1
    return torch.cat([total, sums.gather(1, last)], 1)


def target_gradients(
    logits: Tensor, labels: RowLabels, saved: Tensor, summed: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """Gradients [n, K] of the labels' logits, in float64; any number for one that is not here.

    Args:
        saved: [n, 3] = (m, log s, entropy) of the rows.
        summed: [n, 1 + K] from `summed_gradients`; grad_entropy: [n] or None.
    """
    x, degrees = target_logits(logits, labels).double(), labels.temperature
    m, log_s, entropy = saved.double().split(1, dim=1)
    z = reference.over(x - m, degrees) - log_s
    p = z.exp()
    total, own = summed.double()[:, :1], summed.double()[:, 1:]
    gradient = own - p * total
    needed = (own != 0).any(1, keepdim=True)
    if grad_entropy is not None:
        pull = grad_entropy.double()[:, None]
        gradient = gradient - pull * torch.where(p == 0, 0.0, p * (z + entropy))
        needed = needed | (pull != 0)
    if labels.softcap:
        gradient = gradient * (1 - (x / labels.softcap).square())
    dead = (m == -torch.inf) & ~log_s.isnan()
    if isinstance(degrees, Tensor):
        degrees = degrees[:, None]
        needed = needed & (degrees != 0)
    elif degrees == 0:
        return torch.zeros_like(gradient)
    return torch.where(needed & ~dead, gradient / degrees, 0.0)


def write_gradients(out: Tensor, labels: RowLabels, gradients: Tensor) -> None:
    """Put the labels' gradients [n, K] into out [..., V], where the rest of theirs is."""
    if gradients.numel() == 0 or out.shape[-1] == 0:
        return
    out = torch.atleast_2d(out)
    columns, here = _columns(labels, out.shape[-1])
    # One that is not here repeats one of its row that is, or what stands in the first column.
    one = here.to(torch.uint8).argmax(1, keepdim=True)
    column = columns.gather(1, one)
    first = out[_places(out, labels, column)].to(gradients.dtype)
    value = torch.where(here.gather(1, one), gradients.gather(1, one), first)
    places = _places(out, labels, torch.where(here, columns, column))
    out[places] = torch.where(here, gradients, value).to(out.dtype)


def _columns(labels: RowLabels, width: int) -> tuple[Tensor, Tensor]:
    """Columns [n, K] of the labels, 0 for one that is not here, and whether it is."""
    assert labels.token_ids is not None
    vocab, shard = labels.columns_on_device(width)
    ids = columns = labels.token_ids.to(torch.int64)
    here = ids < vocab
    if shard is not None:
        columns = ids - shard[0]
        here = (columns >= 0) & (columns < vocab) & (ids < shard[1])
    here = here & (ids >= 0)
    return torch.where(here, columns, 0), here


def _places(x: Tensor, labels: RowLabels, columns: Tensor) -> tuple[Tensor, ...]:
    """Index of the rows' columns [n, k] in x [..., V], whatever its strides."""
    rows = labels.rows
    if rows is None:
        rows = torch.arange(columns.shape[0], device=columns.device)
    return (*(index[:, None] for index in torch.unravel_index(rows, x.shape[:-1])), columns)
