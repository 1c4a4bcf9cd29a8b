"""Communication of the ranks over which a vocabulary is sharded.

One gather per forward: (max, sum, weighted sum, target logit), 16 bytes per row and rank. Every
rank then merges in rank order, so all hold the same bits, whatever the timing. K labels for
each row have their logits added up besides, by one all-reduce. The backward needs no communication.

A label's column must be known before that gather, and with it the widths of the other shards. The
ranks exchange those once, at the first call with a group and a width, which waits for the device,
and remember them. Shards of different widths for different heads are fine as long as every rank's
width differs between the heads, or `vocab_size` does.
"""

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

# By the group itself: names are given again after destroy_process_group. As numbers: a tensor that
# is kept may be memory of a CUDA graph that is gone.
_known_bounds: WeakKeyDictionary[
    dist.ProcessGroup, dict[tuple[int, int | None, torch.device], tuple[int, int]]
] = WeakKeyDictionary()


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name a custom op can carry instead of the group; empty for None."""
    return "" if group is None else group.group_name


def process_group(name: str) -> dist.ProcessGroup:
    """The group of this name."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def group_size(name: str) -> int:
    """Ranks of the group of this name, 1 without one."""
    return dist.get_world_size(process_group(name)) if name else 1


def group_rank(name: str) -> int:
    """This process in the group of this name."""
    return dist.get_rank(process_group(name))


def shard_bounds(width: int, vocab_size: int | None, name: str, device: torch.device) -> Tensor:
    """int64 [2] on `device`: this shard's first token id and the true vocabulary size.

    Empty without a group.
    """
    if not name:
        return torch.empty(0, dtype=torch.int64, device=device)
    group = process_group(name)
    known = _known_bounds.setdefault(group, {})
    key = width, vocab_size, device
    if key not in known:
        bounds = _exchange_widths(width, vocab_size, group, device)
        # What a graph under capture computes is there when it is replayed, and not before.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return bounds
        first, true_size = bounds.tolist()
        known[key] = first, true_size
    first, true_size = known[key]
    bounds = torch.full((2,), true_size, dtype=torch.int64, device=device)
    bounds[:1].fill_(first)
    return bounds


def columns(width: int, vocab_size: int | None, shard: Tensor) -> tuple[int, int, int]:
    """First token id here, number of columns that take part, and the true vocabulary size.

    A shard from `shard_bounds` on a device is waited for.
    """
    if shard.numel() == 0:
        vocab = width if vocab_size is None else vocab_size
        return 0, vocab, vocab
    first, true_size = shard.tolist()
    return first, min(width, max(true_size - first, 0)), true_size


def gather_columns(x: Tensor, name: str) -> Tensor:
    """[n, width] of each rank -> [n, sum of widths] on all of them; widths may differ."""
    group = process_group(name)
    widths = torch.full((dist.get_world_size(group),), x.shape[1], device=x.device)
    dist.all_gather(list(widths.split(1)), widths[:1].clone(), group=group)
    known = widths.tolist()
    padded = torch.nn.functional.pad(x, (0, max(known) - x.shape[1]))
    parts = gather_statistics(padded, name)
    return torch.cat([part[:, :w] for part, w in zip(parts, known, strict=True)], 1)


def _exchange_widths(
    width: int, vocab_size: int | None, group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    mine = torch.full((1,), width, dtype=torch.int64, device=device)
    widths = mine.new_empty(dist.get_world_size(group))
    dist.all_gather(list(widths.split(1)), mine, group=group)
    total = widths.sum()
    true_size = total if vocab_size is None else torch.full_like(total, vocab_size)
    bounds = torch.stack([widths[: dist.get_rank(group)].sum(), true_size])
    if device.type == "cpu" and vocab_size is not None and vocab_size > int(total):
        raise ValueError(
            f"vocab_size must be at most the {int(total)} columns of all shards, got {vocab_size}"
        )
    return bounds


def gather_statistics(stats: Tensor, name: str) -> Tensor:
    """[n, 4] of each rank -> [ranks, n, 4] in rank order."""
    group = process_group(name)
    gathered = stats.new_empty(dist.get_world_size(group), *stats.shape)
    # Into one tensor: a list of tensors would be gathered into a copy first. The name is new.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered.view(-1), stats.contiguous().view(-1), group=group)
    return gathered
