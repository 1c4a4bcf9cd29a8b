"""Completions on their way from the ranks that sampled them to those that need them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from r1v3.ranks import Ranks
from r1v3.rollout.contract import Rollout
from r1v3.rollout.copies import Copies


def own_rows(rollout: Rollout, copies: Copies, prompts: int, group_size: int) -> Rollout:
    """Return the rows that this rank answers for, of a rollout of `Sampler.complete`."""
    rows, first = copies.rows(prompts, group_size), copies.prompts(prompts).start * group_size
    return rollout.rows(rows.start - first, rows.stop - first)


def everywhere(
    rollout: Rollout, copies: Copies, prompts: int, group_size: int, pad_id: int
) -> Rollout:
    """Give every rank all completions of `Sampler.complete`, entropies too."""
    every = range(prompts * group_size)
    return exchange_rows(
        own_rows(rollout, copies, prompts, group_size),
        copies.rows(prompts, group_size),
        [every] * copies.ranks.size,
        copies.ranks,
        pad_id=pad_id,
        entropy=True,
    )


def exchange_rows(
    rollout: Rollout,
    own: Sequence[int],
    wanted: Sequence[Sequence[int]],
    ranks: Ranks,
    *,
    pad_id: int,
    entropy: bool = False,
) -> Rollout:
    """Give every rank the completions that it needs, and no others, as tensors.

    Args:
        rollout: the completions that this rank sends.
        own: their numbers; every number is one rank's.
        wanted: for every rank the numbers of those that it needs, the same on every rank.
        entropy: send entropies too; they are NaN otherwise.

    Returns:
        The completions `wanted[ranks.rank]`, in that order.
    """
    place = {number: i for i, number in enumerate(own)}
    if ranks.size == 1:
        return rollout.take([place[number] for number in wanted[0]])
    count = 1 + max((max(rows) for rows in wanted if rows), default=-1)
    facts = torch.stack([rollout.mask.sum(1), rollout.finished.long()], 1)
    known = {n: torch.tensor([ranks.rank, *facts[i]]) for i, n in enumerate(own) if n < count}
    owners, length, finished = ranks.table(known, count, 3).long().unbind(1)
    outgoing = [
        _packed(rollout, [place[n] for n in rows if n in place], entropy) for rows in wanted
    ]
    needed = torch.tensor(list(wanted[ranks.rank]), dtype=torch.int64)
    senders, sizes = owners[needed], length[needed]
    per_token = 13 if entropy else 9
    due = [per_token * int(sizes[senders == rank].sum()) for rank in range(ranks.size)]
    parts = ranks.exchange(outgoing, due)
    mask = torch.arange(max(1, int(sizes.amax()) if len(sizes) else 1)) < sizes[:, None]
    found = Rollout(
        torch.full(mask.shape, pad_id),
        mask,
        torch.zeros(mask.shape),
        torch.zeros(mask.shape).masked_fill(mask, math.nan),
        torch.zeros_like(mask),
        finished[needed].bool(),
    )
    for rank, part in enumerate(parts):
        _unpack(part, found, mask & (senders == rank)[:, None], entropy)
    return found


def _packed(rollout: Rollout, rows: Sequence[int], entropy: bool) -> Tensor:
    """The bytes of some rows: all token ids, then all log-probs, and so on."""
    mask = rollout.mask[rows]
    parts = [
        rollout.response_ids[rows][mask].int(),
        rollout.logprobs[rows][mask].float(),
        *([rollout.entropy[rows][mask].float()] if entropy else []),
        rollout.sampled[rows][mask],
    ]
    return torch.cat([part.view(torch.uint8) for part in parts])


def _unpack(packed: Tensor, into: Rollout, where: Tensor, entropy: bool) -> None:
    """Write the bytes of `_packed` to these tokens."""
    count = int(where.sum())
    if not count:
        return
    words = packed[: len(packed) - count].clone().view(torch.int32).split(count)
    into.response_ids[where] = words[0].long()
    into.logprobs[where] = words[1].view(torch.float32)
    if entropy:
        into.entropy[where] = words[2].view(torch.float32)
    into.sampled[where] = packed[len(packed) - count :].bool()
