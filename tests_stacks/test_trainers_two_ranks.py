"""Heads of stacks that divide the vocabulary among ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

from .sources import FOLDER

ROOT = Path(__file__).resolve().parent.parent
STACKS = {"slime": "slime", "nemo-rl": "NeMo-RL", "ms-swift": "ms-swift"}


@pytest.fixture(scope="module")
def said() -> str:
    """The output of the case on two gloo ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    case = [*command, "-m", "tests_stacks.trainers_two_ranks_case"]
    done = subprocess.run(case, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("stack", STACKS)
def test_sharded_heads_equal_float64(stack: str, said: str) -> None:
    """Fails if a sharded head, stock's or r1v3's in its place, is not that of whole logits."""
    if not (FOLDER / stack).is_dir():
        pytest.skip(f"the source of {stack} could not be fetched")
    assert f"{STACKS[stack]}" in said
