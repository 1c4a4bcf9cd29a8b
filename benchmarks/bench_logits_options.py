"""Options of the ops on logits, each as a problem of its own.

selected_rows: a few of many rows. tempered: a temperature, which eager code pays for with a pass.
in_place: the gradient over the logits. vocabulary_shard: the kernels of one rank of a group,
beside the whole vocabulary's on the same logits.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import bench_logprobs_and_entropy
from benchmarks.problem import VOCABULARY, Mode, Problem, Size
from r1v3 import kernels
from r1v3.kernels import reference

TEMPERATURE = 0.7
Pair = tuple[Tensor, Tensor]


@dataclass
class Option:
    """A module with one benchmark."""

    MODES: tuple[Mode, ...]
    shapes: Callable[[str, Size], list[dict[str, int]]]
    problem: Callable[[dict[str, int], Mode, str], Problem]


def _rows(device: str, size: Size) -> int:
    return 64 if device == "cpu" else 1024 if size == "small" else 8192


def _one_shape(device: str, size: Size) -> list[dict[str, int]]:
    return [{"T": _rows(device, size), "V": VOCABULARY}]


def _logits(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    shape = {"T": shape["T"], "V": shape["V"]}
    return bench_logprobs_and_entropy.problem(shape, mode, device)


def _selected_rows_shapes(device: str, size: Size) -> list[dict[str, int]]:
    return [{"T": _rows(device, size), "V": VOCABULARY, "n": n} for n in (1, 8, 64)]


def _selected_rows(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """n evenly spaced rows of T: only theirs is the traffic."""
    base = _logits(shape, mode, device)
    rows = torch.arange(shape["n"], device=device) * (shape["T"] // shape["n"])

    def selected(function: Callable[..., Pair]) -> Callable[..., Pair]:
        return lambda logits, token_ids: function(logits, token_ids, rows=rows)

    def eager(logits: Tensor, token_ids: Tensor) -> Pair:
        return bench_logprobs_and_entropy.eager(logits[rows], token_ids[rows])

    return replace(
        base, op="selected_rows", shape=shape, row_inputs=(), upstream=(), differentiated=(),
        ours=selected(kernels.logprobs_and_entropy), eager=eager,
        reference=selected(reference.logprobs_and_entropy),
        bytes_read=base.bytes_read * shape["n"] // shape["T"],
    )  # fmt: skip


def _tempered(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    def eager(logits: Tensor, token_ids: Tensor) -> Pair:
        return bench_logprobs_and_entropy.eager(logits.float() / TEMPERATURE, token_ids)

    def tempered(function: Callable[..., Pair]) -> Callable[..., Pair]:
        return lambda logits, token_ids: function(logits, token_ids, temperature=TEMPERATURE)

    return replace(
        _logits(shape, mode, device), op="tempered", eager=eager,
        ours=tempered(kernels.logprobs_and_entropy),
        reference=tempered(reference.logprobs_and_entropy),
    )  # fmt: skip


def _in_place(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """Every run gets logits of its own, copied before the clock starts."""

    def ours(logits: Tensor, token_ids: Tensor) -> Pair:
        return kernels.logprobs_and_entropy(logits, token_ids, inplace_backward=True)

    base = _logits(shape, mode, device)
    apart = {"r1v3, out of place": base.ours}
    return replace(base, op="in_place", ours=ours, mutated=("logits",), restated=apart)


def world_of_one(device: str) -> dist.ProcessGroup:
    """The group of this process alone."""
    if not dist.is_initialized():
        meeting = Path(tempfile.mkdtemp()) / "rendezvous"
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _vocabulary_shard_shapes(device: str, size: Size) -> list[dict[str, int]]:
    # 18,976 columns are one of eight shards.
    return [{"T": _rows(device, size), "V": vocab} for vocab in (18_976, VOCABULARY)]


def _vocabulary_shard(shape: dict[str, int], mode: Mode, device: str) -> Problem:
    """A group of one rank: its local kernels and the merge, a collective with nobody."""
    group = world_of_one(device)

    def ours(logits: Tensor, token_ids: Tensor) -> Pair:
        return kernels.logprobs_and_entropy(logits, token_ids, group=group)

    base = _logits(shape, mode, device)
    return replace(base, op="vocabulary_shard", ours=ours, restated={"r1v3, whole": base.ours})


OPTIONS = {
    "selected_rows": Option(("forward",), _selected_rows_shapes, _selected_rows),
    "tempered": Option(("forward", "backward"), _one_shape, _tempered),
    "in_place": Option(("backward",), _one_shape, _in_place),
    "vocabulary_shard": Option(
        ("forward", "backward"), _vocabulary_shard_shapes, _vocabulary_shard
    ),
}
