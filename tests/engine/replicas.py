"""The work of a trainer around an engine: micro-batches of a replica, and outputs of all."""

from collections.abc import Sequence
from typing import TypeVar

from r1v3.data.batch import Batch
from r1v3.engine.contract import Engine
from r1v3.model.flops import work_of

T = TypeVar("T")


def own_numbers(engine: Engine, batches: Sequence[Batch]) -> list[int]:
    """The numbers of this replica's micro-batches."""
    return engine.shares([work_of(batch) for batch in batches])[engine.replicas.rank]


def everywhere(engine: Engine, numbers: Sequence[int], found: Sequence[T]) -> list[T]:
    """The outputs of all replicas, in the order of their micro-batches, on every rank."""
    own = dict(zip(numbers, found, strict=True)) if engine.reports else {}
    every = {n: one for part in engine.ranks.gather(own) for n, one in part.items()}
    return [every[n] for n in range(len(every))]
