"""Messages between the processes of one job, besides tensors: a handful of calls over gloo."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")


def shard_range(count: int, rank: int, size: int) -> range:
    """Part `rank` of `count` things in `size` parts: contiguous, the earlier parts one larger."""
    base, extra = divmod(count, size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


class Ranks:
    """A group of processes that run the same program; without a group, this process alone.

    Values travel pickled between processes of one job, which trust each other. Every call but
    `is_main` and `shard` is collective.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes files and talks to the user."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """This rank's part of `count` things; see `shard_range`."""
        return shard_range(count, self.rank, self.size)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(self.group)

    def gather(self, value: T) -> list[T]:
        """Everyone's values in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """The first rank's value."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on the main rank; return its result or raise its error on every rank."""
        if self.group is None:
            return function()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = function(), None
            except Exception as error:
                outcome = None, error
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return value


ALONE = Ranks()
