"""The processes of one job, and their messages: a handful of calls over gloo."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")
_A_DAY = timedelta(days=1)


def shard_range(count: int, rank: int, size: int) -> range:
    """Part `rank` of `count` things in `size` parts: contiguous, the earlier parts one larger."""
    base, extra = divmod(count, size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


class Ranks:
    """A group of processes that run the same program; without a group, this process alone.

    Values travel pickled between processes of one job, which trust each other; many numbers go as
    tensors, by `sum`, `table` and `exchange`. Every call but `is_main` and `shard` is collective.

    Args:
        patient: the same processes with a longer time limit, for work that only the first one does.
    """

    def __init__(
        self, group: ProcessGroup | None = None, patient: ProcessGroup | None = None
    ) -> None:
        self.group, self._patient = group, patient or group
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

    def call_all(self, work: Callable[[], T]) -> list[T]:
        """Call `work` on every rank; return everyone's results in rank order, on every rank.

        An error of any rank is raised on every rank. The ranks wait for the slowest as long as it
        takes, up to a day.
        """
        if self.group is None:
            return [work()]
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, _outcome(work), group=self._patient)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]

    def divide(self, count: int, work: Callable[[range], list[T]]) -> list[T]:
        """Call `work` on every rank with its part of `count` things; return all results in order.

        Errors and waiting are those of `call_all`.
        """
        return [one for part in self.call_all(lambda: work(self.shard(count))) for one in part]

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor on the host up over the ranks, in place; return it."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def table(self, rows: Mapping[int, Tensor], count: int, width: int) -> Tensor:
        """Collect the rows of a table, of which every rank has some and none two, on every rank.

        Args:
            rows: [width] each, by their number.

        Returns:
            float64 [count, width], the same bits however the rows were divided; a row that no rank
            has is zero.
        """
        found = torch.zeros(count, width, dtype=torch.float64)
        for number, row in rows.items():
            found[number] = row
        return self.sum(found)

    def exchange(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send bytes to each rank, and return those that each rank has sent here.

        Args:
            outgoing: uint8 [n] for every rank, this one among them.
            sizes: bytes that come from every rank.
        """
        if self.group is None:
            return list(outgoing)
        # What stays here is not a message.
        here = outgoing[self.rank]
        sent = [one if rank != self.rank else one[:0] for rank, one in enumerate(outgoing)]
        due = [size if rank != self.rank else 0 for rank, size in enumerate(sizes)]
        found = torch.empty(sum(due), dtype=torch.uint8)
        lengths = [len(one) for one in sent]
        dist.all_to_all_single(found, torch.cat(sent), due, lengths, group=self.group)
        parts = list(found.split(due))
        parts[self.rank] = here
        return parts

    def broadcast(self, value: T) -> T:
        """The first rank's value."""
        return self._broadcast(value, self.group)

    def _broadcast(self, value: T, group: ProcessGroup | None) -> T:
        if group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on the main rank; return its result or raise its error on every rank.

        The others wait as long as it takes, up to a day, and end when the main rank dies.
        """
        if self.group is None:
            return function()
        nothing: tuple[Any, Exception | None] = None, None
        outcome = _outcome(function) if self.is_main else nothing
        value, failure = self._broadcast(outcome, self._patient)
        if failure is not None:
            raise failure
        return value


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Call a function; return its result and None, or None and the error that it raised."""
    try:
        return function(), None
    except Exception as error:
        return None, error


ALONE = Ranks()


def join_job(device: str, timeout_seconds: float, store: dist.Store | None = None) -> Ranks:
    """Join the processes that torchrun, or `local_job`, started; without them, this one is alone.

    On CUDA a rank takes the device of its local rank and the default group is NCCL's; on the CPU it
    is gloo's. The calls of `Ranks` always use gloo.

    Args:
        timeout_seconds: a collective that waits longer ends the job, except for work that only the
            first rank does.
        store: where the ranks meet; None for the address that torchrun has told.

    Raises:
        ValueError: there are several processes, and this one is not told which it is.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and "RANK" not in os.environ:
        raise ValueError(
            f"WORLD_SIZE is {size} and RANK is not set: start the processes with torchrun, or "
            "unset WORLD_SIZE to run alone"
        )
    on_cpu, timeout = torch.device(device).type == "cpu", timedelta(seconds=timeout_seconds)
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        if store is not None:
            rank = int(os.environ["RANK"])
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=int(size), timeout=timeout
            )
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(group, dist.new_group(backend="gloo", timeout=_A_DAY))


def leave_job() -> None:
    """Take this process out of its job, if it is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other ranks have died or hang."""
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|NCCL|ProcessGroup", str(error))
    )
