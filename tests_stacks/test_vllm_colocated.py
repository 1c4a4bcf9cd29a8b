"""vLLM in the training process: GRPO of the demo's model, and its sampler after it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests_stacks.serving import ROOT, r1v3
from tests_stacks.vllm_serving import (
    BATCHED_TOKENS,
    LARGEST_GAP,
    assert_grpo_trained,
    environment,
    grpo_settings,
)

pytest.importorskip("vllm")

ARGUMENTS = {"enforce_eager": True, "max_num_batched_tokens": BATCHED_TOKENS, "max_num_seqs": 16}


def test_grpo_trains_with_vllm_in_its_process(tmp_path: Path) -> None:
    """Fails if vLLM refuses new weights once it has packed the first, keeps the old ones, or its
    log-probs leave the trainer's: in any step, or in a mode or budget after the last."""
    write = r1v3("tests_stacks.digits", "write", tmp_path, "12")
    subprocess.run(write, cwd=ROOT, check=True)
    samples = tmp_path / "samples.parquet"
    settings = [
        *grpo_settings(tmp_path / "run", samples),
        *("rollout.engine=vllm", f"rollout.vllm={json.dumps(ARGUMENTS)}"),
    ]
    command = [sys.executable, "-m", "tests_stacks.vllm_colocated_case", str(samples), *settings]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert_grpo_trained(tmp_path / "run")
    differences = json.loads(done.stdout.splitlines()[-1])
    assert set(differences) == {"slow", "nothink", "nowait", "budget 0", "budget 6"}
    assert all(value is not None and value < LARGEST_GAP for value in differences.values()), (
        differences
    )
