"""The rows or columns of a checkpoint's tensors that make up a rank's shard of a Megatron weight.

Fusing, padding and tensor parallelism are one thing here: a shard is a list of runs, each a range
of one native tensor along the split dimension; what no run covers is padding and stays zero. The
same list read forwards loads a shard and read backwards restores the native tensors, so that the
two directions cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from r1v3.model.conversion.table import Weight


@dataclass(frozen=True)
class Run:
    """`length` rows (or columns) of native part `part` from `start`, at `at` of the shard."""

    part: int
    start: int
    at: int
    length: int


def interleave(sizes: Sequence[int], units: int) -> list[Run]:
    """Runs of a tensor that takes a piece of each part in turn, `units` times.

    Raises:
        ValueError: a part cannot be divided into `units` equal pieces.
    """
    for size in sizes:
        if size % units:
            raise ValueError(f"a dimension of {size} cannot be divided into {units} equal parts")
    runs: list[Run] = []
    at = 0
    for unit in range(units):
        for part, size in enumerate(sizes):
            width = size // units
            start = unit * width
            if runs and runs[-1].part == part and runs[-1].start + runs[-1].length == start:
                runs[-1] = Run(part, runs[-1].start, runs[-1].at, runs[-1].length + width)
            else:
                runs.append(Run(part, start, at, width))
            at += width
    return runs


def shard_runs(weight: Weight, tensor_parallel: int, rank: int, padded_size: int) -> list[Run]:
    """The runs of one rank's shard of a split weight.

    Args:
        padded_size: the split dimension of the whole weight over all ranks, padding included.
    Raises:
        ValueError: the dimension does not divide over the ranks, or is smaller than its parts.
    """
    assert weight.split is not None
    units = tensor_parallel if weight.units == "ranks" else weight.units
    sizes = [shape[weight.split] for shape in weight.shapes]
    fits = padded_size >= sum(sizes) if weight.padded else padded_size == sum(sizes)
    if not fits or padded_size % tensor_parallel:
        raise ValueError(
            f"{weight.megatron} has {padded_size} along dimension {weight.split} over "
            f"{tensor_parallel} tensor-parallel ranks; the configuration says {sum(sizes)}"
            + (" and padding" if weight.padded else "")
        )
    size = padded_size // tensor_parallel
    low, high = rank * size, (rank + 1) * size
    runs = []
    for run in interleave(sizes, units):
        first, last = max(run.at, low), min(run.at + run.length, high)
        if first < last:
            runs.append(Run(run.part, run.start + first - run.at, first - low, last - first))
    return runs


def covered(runs: Sequence[Run]) -> int:
    """The length of all runs together; the rest of the shard is padding."""
    return sum(run.length for run in runs)
