"""A language head sharded over gloo ranks gives what the whole head gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import INTERPRETED
from tests.kernels.linear_parallel_worker import GROUPS
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(INTERPRETED, reason="the arithmetic is tested without a group")
def test_sharded_equals_whole(tmp_path: Path) -> None:
    """Fails if a shard, even, uneven or all padding, changes an output or a gradient.

    With all-reduce, with reduce-scatter of sequence-parallel rows and without either; results of
    all ranks must have the same bits, or tensor-parallel ranks drift apart.
    """
    command = [sys.executable, "-m", "tests.kernels.linear_parallel_worker"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        reports = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [report for rank, report in zip(ranks, reports, strict=True) if rank.returncode]
    assert not failed, "\n".join(failed)
    for members, _ in GROUPS:
        results = [
            torch.load(tmp_path / f"{len(members)} {place}.pt", weights_only=True)
            for place in range(len(members))
        ]
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
