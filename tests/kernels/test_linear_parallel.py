"""A language head sharded over gloo ranks gives what the whole head gives."""

from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from tests.kernels.linear_parallel_worker import GROUPS
from tests.processes import run_ranks


@pytest.mark.skipif(INTERPRETED, reason="the arithmetic is tested without a group")
def test_sharded_equals_whole(tmp_path: Path) -> None:
    """Fails if a shard, even, uneven or all padding, changes an output or a gradient.

    With all-reduce, with reduce-scatter of sequence-parallel rows and without either; results of
    all ranks must have the same bits, or tensor-parallel ranks drift apart.
    """
    run_ranks("tests.kernels.linear_parallel_worker", 4, tmp_path)
    for members, _ in GROUPS:
        results = [
            torch.load(tmp_path / f"{len(members)} {place}.pt", weights_only=True)
            for place in range(len(members))
        ]
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
