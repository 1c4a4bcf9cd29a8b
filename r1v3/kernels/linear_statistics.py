"""Softmax statistics of rows whose logits come in tiles of columns."""

import torch
from torch import Tensor

from r1v3.kernels import devices, host, reference, vocab_parallel


def vocabulary_bounds(weight: Tensor, vocab_size: int | None, group: str) -> Tensor:
    """int64 [2] on the weight's device: id of its first row, and the true vocabulary size."""
    if group:
        return vocab_parallel.shard_bounds(weight.shape[0], vocab_size, group, weight.device)
    size = weight.shape[0] if vocab_size is None else vocab_size
    return size * torch.arange(2, device=weight.device)


def shifted(bounds: Tensor, columns: int) -> Tensor:
    """The bounds of a shard that starts this many columns further."""
    return torch.add(bounds, 1 - torch.arange(2, device=bounds.device), alpha=columns)


def check_token_ids_on_host(token_ids: Tensor, bounds: Tensor) -> None:
    """Raises ValueError for a label outside the vocabulary; on a GPU that would be a wait."""
    if token_ids.is_cuda or token_ids.numel() == 0:
        return
    size = int(bounds[1])
    bad = ((token_ids < 0) | (token_ids >= size)) & (token_ids != reference.IGNORED_TOKEN)
    if bool(bad.any()):
        raise ValueError(
            f"token_ids must be in [0, {size}) or {reference.IGNORED_TOKEN}, "
            f"got {token_ids[bad][:8].tolist()}"
        )


class RowStatistics:
    """Collects (max, sum, weighted sum, target) of n rows tile by tile, and merges them in order.

    Args:
        token_ids: [n] global ids or -100.
        bounds: of the shard, from `vocabulary_bounds`; group: its name, or empty.
    """

    def __init__(self, token_ids: Tensor, temperature: float, bounds: Tensor, group: str) -> None:
        self.token_ids, self.temperature = token_ids, temperature
        self.bounds, self.group = bounds, group
        self._tiles: list[list[Tensor]] = []
        self._triton = False
        check_token_ids_on_host(token_ids, bounds)

    def add(self, columns: slice, rows: slice, logits: Tensor) -> None:
        """Takes the logits of these columns and rows: all rows of the first columns, and so on."""
        if rows.start == 0:
            self._tiles.append([])
        ids = self.token_ids[rows]
        shard = shifted(self.bounds, columns.start)
        self._triton = devices.runs_triton(logits) and self.temperature > 0
        if self._triton:
            from r1v3.kernels import logits_triton

            parts = logits_triton.row_statistics(
                logits, ids, None, self.temperature, logits.shape[1], shard
            )
        else:
            parts = _on_host(logits, ids, self.temperature, shard)[None]
        self._tiles[-1].append(parts)

    def add_whole(self, stats: Tensor) -> None:
        """Takes what a Triton kernel found out about all rows and columns, [n, 4]."""
        self._tiles, self._triton = [[stats[None]]], True

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [n], entropy [n], (m, log s, entropy) [n, 3]."""
        stats = torch.zeros(1, *self.token_ids.shape, 4, device=self.token_ids.device)
        stats[..., 0] = -torch.inf
        if self._tiles:
            stats = torch.cat([torch.cat(blocks, dim=1) for blocks in self._tiles])
        if self._triton:
            from r1v3.kernels import logits_triton

            if self.group:
                merged = logits_triton.merge_parts(stats, self.temperature)
                stats = vocab_parallel.gather_statistics(merged, self.group)
            return logits_triton.finalize(stats, self.token_ids, self.temperature, 0, self.bounds)
        stats = reference.join_statistics(stats, self.temperature)[None]
        if self.group:
            stats = vocab_parallel.gather_statistics(stats[0], self.group)
        ignored = self.token_ids == reference.IGNORED_TOKEN
        return reference.merge_statistics(stats, ignored, self.temperature)


def _on_host(logits: Tensor, token_ids: Tensor, temperature: float, shard: Tensor) -> Tensor:
    first, true_size = shard.tolist()
    inside = logits[:, : max(true_size - first, 0)]
    ids = token_ids.to(torch.int64) - first
    if temperature == 0 or not host.supports(logits):
        return reference.row_statistics(inside, ids, temperature)
    stats = torch.empty(logits.shape[0], 4)
    host.row_statistics(inside, None, ids, temperature, stats)
    return stats
