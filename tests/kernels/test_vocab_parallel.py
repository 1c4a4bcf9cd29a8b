"""A vocabulary sharded over gloo ranks gives what the whole vocabulary gives."""

import os
from pathlib import Path

import pytest
import torch

from tests.processes import run_ranks


@pytest.mark.parametrize(
    "world,implementation",
    [
        pytest.param(2, "cpu", marks=pytest.mark.slow),
        pytest.param(3, "cpu", marks=pytest.mark.slow),
        (4, "cpu"),
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
    device = "cuda" if implementation == "cuda" else "cpu"
    variables = {"TRITON_INTERPRET": str(int(implementation == "triton"))}
    if device == "cuda":
        devices = ",".join(str(i) for i in range(torch.cuda.device_count()))
        variables["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", devices)
    run_ranks("tests.kernels.vocab_parallel_worker", world, tmp_path, device, **variables)
    outputs = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others, strict=True))
