"""Stages in two processes of this machine: they learn, score and resume as in one."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1v3.data.recipe import share_out
from tests.tiny_run import (
    digest,
    finished,
    home,
    leftovers,
    result,
    stage_arguments,
    succeed,
    verb,
    write_configs,
)

TWO = "processes=2"


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.slow), "grpo"])
def test_two_processes_learn_the_bits_of_one(tmp_path: Path, stage: str) -> None:
    """Fails if a laptop's two cores would learn something else than one, after a kill as well."""
    whole, changes = finished(stage)
    write_configs(tmp_path)
    killed = verb(tmp_path, *stage_arguments(stage), TWO, at=len(changes) // 2)
    assert killed.code == -signal.SIGKILL, killed.output
    succeed(tmp_path, *stage_arguments(stage), TWO, "--resume")
    split, alone = result(tmp_path / "run", stage), result(whole / "run", stage)
    # Logits of fewer rows at a time differ in their last bits, and so does what is measured of the
    # rollout; what is learned does not.
    for ours, theirs in zip(split.pop("metrics"), alone.pop("metrics"), strict=True):
        assert ours.pop("entropy_histogram") == theirs.pop("entropy_histogram")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert split == alone
    assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
def test_a_budget_of_tokens_repeats_its_bits_and_learns_as_one_process(tmp_path: Path) -> None:
    """Fails if the shares of two processes depend on chance, or a part of a group gets lost."""
    found: list[Any] = []
    for number, processes in enumerate((TWO, TWO, "processes=1")):
        folder = tmp_path / str(number)
        write_configs(folder)
        succeed(folder, *stage_arguments("grpo"), processes, "micro_batch_tokens=90", "steps=2")
        found.append(result(folder / "run", "grpo"))
    assert found[0] == found[1]
    for ours, theirs in zip(found[0]["metrics"], found[2]["metrics"], strict=True):
        for key in ("loss", "grad_norm", "tokens", "reward", "entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """Fails if questions are left out, answered twice or graded in another's place."""
    found: list[Any] = []
    for processes in ("processes=1", TWO):
        folder = tmp_path / processes
        write_configs(folder)
        data = [
            str(home() / f"run/data/test_{name}.parquet") for name in ("in_domain", "out_of_domain")
        ]
        model = f"model={home() / 'base'}"
        succeed(
            folder, "eval", "configs/eval.yaml", model, processes, f"data={json.dumps(data)}",
            "run=run", "name=base",
        )  # fmt: skip
        scores = json.loads((folder / "run/evaluation/base.json").read_text())
        # Batches of another size round a mean entropy otherwise.
        entropies = np.concatenate(
            [np.ravel(kept.pop("entropy")) for kept in scores["answers"].values()]
        )
        found.append((scores, entropies, digest(folder / "run/transcripts/base.json")))
    assert found[0][::2] == found[1][::2]
    assert found[0][1] == pytest.approx(found[1][1], abs=3e-5)


def test_an_error_is_told_once(tmp_path: Path) -> None:
    """Fails if every process complains, or one is left waiting for the other."""
    write_configs(tmp_path)
    arguments = [*stage_arguments("grpo"), TWO, "train_data=nowhere.parquet"]
    assert "nowhere.parquet" in verb(tmp_path, *arguments).error()


def test_work_is_shared_out_whole_and_evenly() -> None:
    """Fails if a dataset is left out or built twice, or one process does nearly all."""
    counts = {"a": 6000, "b": 400, "c": 4096, "d": 1024, "e": 510, "f": 500}
    for parts in (1, 2, 3, 9):
        shares = share_out(counts, parts)
        assert sorted(name for share in shares for name in share) == sorted(counts)
        largest = max(sum(counts[name] for name in share) for share in shares)
        assert largest <= max(6000, 1.1 * sum(counts.values()) / parts)
    assert share_out(counts, 1) == [list(counts)]
