"""The Triton kernels, run by Triton's interpreter through the whole suite of this folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
SUITE = (
    "logprobs_and_entropy",
    "logits_memory",
    "group_advantages",
    "grpo_loss",
    "grpo_edges",
    "logits_grpo_loss",
    "linear",
    "linear_grpo",
    "linear_edges",
    "linear_persistent",
    "row_temperature",
    "several_labels",
    "softcap",
    "ban_tokens",
    "sample_tokens",
    "properties",
    "device_contract",
)


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_kernels_pass_the_suite(chosen: str) -> None:
    """Fails if a Triton kernel breaks any property that the CPU kernels are tested for.

    A process of its own, because Triton reads TRITON_INTERPRET when it is imported.
    """
    files = [str(HERE / f"test_{name}.py") for name in SUITE]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, *files],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert " passed" in result.stdout, result.stdout[-2000:]
