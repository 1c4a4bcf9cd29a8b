"""What a language head needs from the other ranks: hidden rows in, their gradient summed out."""

import torch
import torch.distributed as dist
from torch import Tensor

from r1v3.kernels import vocab_parallel


def group_size(group: str) -> int:
    """Ranks of the group of this name, 1 without one."""
    return dist.get_world_size(vocab_parallel._group(group)) if group else 1


def gather_hidden(hidden: Tensor, group: str) -> Tensor:
    """[n, H] of each rank -> [ranks x n, H] in rank order."""
    gathered = hidden.new_empty(group_size(group), *hidden.shape)
    dist.all_gather(
        list(gathered.unbind()), hidden.contiguous(), group=vocab_parallel._group(group)
    )
    return gathered.flatten(0, 1)


class HiddenReduction:
    """Sums the gradient of hidden over a group while the caller multiplies something else.

    Args:
        group: name of the process group, or empty: then nothing is summed.
        total: rows of hidden, those of all ranks with sequence_parallel.
        picked: int64 [n], which of them have a gradient, or None for all of them in order.
        sequence_parallel: each rank keeps the gradient of its own total / ranks rows.
    """

    def __init__(
        self, group: str, total: int, picked: Tensor | None, *, sequence_parallel: bool
    ) -> None:
        self.group, self.total, self.picked = group, total, picked
        self.sequence_parallel = sequence_parallel
        self._pending: list[dist.Work | None] = []
        self._own: Tensor | None = None

    def start(self, gradient: Tensor, rows: slice) -> None:
        """Start summing these rows of the gradient [n, H]; the rows before them are complete.

        They must not be touched until `finish`.
        """
        if self.group and not self.sequence_parallel:
            group = vocab_parallel._group(self.group)
            self._pending.append(dist.all_reduce(gradient[rows], group=group, async_op=True))
        elif self.group and rows.stop == gradient.shape[0]:
            self._scatter(gradient)

    def finish(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of all hidden rows, or of this rank's, in this dtype."""
        if self.sequence_parallel and self._own is None:
            self._scatter(gradient)  # of no rows: `start` was never called
        for work in self._pending:
            if work is not None:
                work.wait()
        self._pending.clear()
        if self._own is not None:
            return self._own.to(dtype)
        return self._spread(gradient.to(dtype))

    def _scatter(self, gradient: Tensor) -> None:
        group = vocab_parallel._group(self.group)
        parts = self._spread(gradient).chunk(group_size(self.group))
        self._own = torch.empty_like(parts[0])
        work = dist.reduce_scatter(self._own, list(parts), group=group, async_op=True)
        self._pending.append(work)

    def _spread(self, gradient: Tensor) -> Tensor:
        if self.picked is None:
            return gradient
        full = gradient.new_zeros(self.total, gradient.shape[1])
        return full.index_copy_(0, self.picked, gradient)
