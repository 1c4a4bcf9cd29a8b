"""Softmax statistics of rows whose logits come in tiles of columns."""

import torch
from torch import Tensor

from r1v3.kernels import several_labels, softmax_rows
from r1v3.kernels.linear.head import TiledHead


class RowStatistics:
    """(max, sum, weighted sum, target) of n rows, collected by tiles and merged in their order.

    Args:
        token_ids: [n] global ids or -100, or [n, K].
    """

    def __init__(self, head: TiledHead, token_ids: Tensor) -> None:
        self.head, self.token_ids = head, token_ids
        self._tiles: list[list[Tensor]] = []
        self._targets: Tensor | None = None
        if token_ids.dim() == 2:
            shape = token_ids.shape
            self._targets = head.weight.new_zeros(shape, dtype=head.result)

    def add(self, columns: slice, rows: slice, logits: Tensor) -> None:
        """Take the logits of these columns and rows: all rows of the first columns, and so on."""
        if rows.start == 0:
            self._tiles.append([])
        labels = self.head.labels(self.token_ids[rows], columns, rows)
        if self._targets is not None:
            self._targets[rows] += several_labels.target_logits(logits, labels)
            labels = labels._replace(token_ids=None)
        self._tiles[-1].append(softmax_rows.statistics(logits, labels))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [n], or [n, K], entropy [n], (m, log s, entropy) [n, 3]."""
        if not self._tiles:  # there are no rows, or no columns in this shard
            n = self.token_ids.shape[0]
            nothing = self.head.weight.new_empty(n, 0, dtype=self.head.result)
            self.add(slice(0, 0), slice(0, n), nothing)
        stats = torch.cat([torch.cat(blocks, dim=1) for blocks in self._tiles])
        labels = self.head.labels(self.token_ids)
        if self._targets is None:
            return softmax_rows.merge(stats, labels, 0)
        _, entropy, saved = softmax_rows.merge(stats, labels._replace(token_ids=None), 0)
        return several_labels.target_logprobs(self._targets, labels, 0, saved), entropy, saved
