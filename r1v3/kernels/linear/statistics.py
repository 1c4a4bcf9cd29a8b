"""Softmax statistics of rows whose logits come in tiles of columns."""

import torch
from torch import Tensor

from r1v3.kernels import cpu, devices, reference, vocab_parallel
from r1v3.kernels.linear.head import TiledHead
from r1v3.kernels.reference import IGNORED_TOKEN


class RowStatistics:
    """(max, sum, weighted sum, target) of n rows, collected by tiles and merged in their order.

    Args:
        token_ids: [n] global ids or -100.
    """

    def __init__(self, head: TiledHead, token_ids: Tensor) -> None:
        self.head, self.token_ids = head, token_ids
        self._tiles: list[list[Tensor]] = []
        self._triton = False

    def add(self, columns: slice, rows: slice, logits: Tensor) -> None:
        """Take the logits of these columns and rows: all rows of the first columns, and so on."""
        if rows.start == 0:
            self._tiles.append([])
        ids, temperature = self.token_ids[rows], self.head.temperature
        shard = self.head.shard(columns)
        self._triton = devices.runs_triton(logits) and temperature > 0
        if self._triton:
            from r1v3.kernels.triton import logits_statistics

            parts = logits_statistics.row_statistics(
                logits, ids, None, temperature, logits.shape[1], shard
            )
        else:
            parts = _on_cpu(logits, ids, temperature, shard)[None]
        self._tiles[-1].append(parts)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [n], entropy [n], (m, log s, entropy) [n, 3]."""
        temperature, group = self.head.temperature, self.head.group
        stats = torch.zeros(1, *self.token_ids.shape, 4, device=self.token_ids.device)
        stats[..., 0] = -torch.inf
        if self._tiles:
            stats = torch.cat([torch.cat(blocks, dim=1) for blocks in self._tiles])
        if self._triton:
            from r1v3.kernels.triton import logits_statistics as triton

            if group:
                merged = triton.merge_parts(stats, temperature)
                stats = vocab_parallel.gather_statistics(merged, group)
            return triton.finalize(stats, self.token_ids, temperature, 0, self.head.bounds)
        stats = reference.join_statistics(stats, temperature)[None]
        if group:
            stats = vocab_parallel.gather_statistics(stats[0], group)
        ignored = self.token_ids == IGNORED_TOKEN
        return reference.merge_statistics(stats, ignored, temperature)


def _on_cpu(logits: Tensor, token_ids: Tensor, temperature: float, shard: Tensor) -> Tensor:
    first, true_size = shard.tolist()
    inside = logits[:, : max(true_size - first, 0)]
    ids = token_ids.to(torch.int64) - first
    if temperature == 0 or not cpu.supports(logits):
        return reference.row_statistics(inside, ids, temperature)
    stats = torch.empty(logits.shape[0], 4)
    cpu.row_statistics(inside, None, ids, temperature, stats)
    return stats
