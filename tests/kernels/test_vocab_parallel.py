"""A vocabulary sharded over gloo ranks gives what the whole vocabulary gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "world,implementation",
    [
        (2, "host"),
        (3, "host"),
        (4, "host"),
        (3, "triton"),
        pytest.param(2, "cuda", marks=pytest.mark.gpu),
        pytest.param(3, "cuda", marks=pytest.mark.gpu),
        pytest.param(4, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_sharded_equals_whole(world: int, implementation: str, tmp_path: Path) -> None:
    """Fails if a shard, even, uneven or all padding, changes an output or a gradient.

    The ranks' outputs must have the same bits, or tensor-parallel ranks drift apart.
    """
    command = [sys.executable, "-m", "tests.kernels.vocab_parallel_worker"]
    device = "cuda" if implementation == "cuda" else "cpu"
    environment = {**os.environ, "TRITON_INTERPRET": str(int(implementation == "triton"))}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path), device],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        reports = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [report for rank, report in zip(ranks, reports, strict=True) if rank.returncode]
    assert not failed, "\n".join(failed)
    outputs = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others, strict=True))
