"""A whole study through the real verbs, killed and run again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import PATIENCE, ROOT
from tests.tiny_run import home, write_configs

FILES = {
    "train_data": "{data}/data/grpo.parquet",
    "validation_data": "{data}/data/grpo_validation.parquet",
}


def write_study(folder: Path) -> None:
    configs = write_configs(folder)
    base = str(home() / "base")
    study = {
        "title": "Tiny",
        "report": "nothing",
        "seeds": [0],
        "stages": {
            "data": {"verb": "data", "config": f"{configs}/data.yaml"},
            "grpo": {"verb": "grpo", "config": f"{configs}/grpo.yaml",
                     "settings": FILES | {"model": base, "curriculum.validate_by": "domain"}},
            "select": {"verb": "select", "config": f"{configs}/select.yaml",
                       "settings": {"run": "{grpo}"}},
            "score": {"verb": "eval", "config": f"{configs}/eval.yaml",
                      "settings": {"model": "{select}/models/selected", "budgets": [],
                                   "data": ["{data}/data/test_in_domain.parquet"]}},
        },
        "arms": {"default": {}, "hot": {"grpo": {"optimizer.learning_rate": 0.01}}},
        "measure": ["score"],
        "findings": [
            {"claim": "hot is longer", "report": "-", "of": "tokens", "expect": "higher",
             "this": {"stage": "score", "arm": "hot"}, "than": {"stage": "score"}},
            {"claim": "hot gains", "report": "-", "of": "reward", "expect": "higher",
             "this": {"stage": "grpo", "arm": "hot"}, "than": {"stage": "grpo"}},
        ],
        "figures": [{"draw": "steps", "title": "t", "stage": "grpo", "of": ["reward"]}],
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(study))


def study(folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "r1v3", "study", "tiny.yaml", "--out", "out", "--jobs", "1"]
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)


def result(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "out/tiny/study.json").read_text())
    for key in ("seconds", "environment", "study"):
        del record[key]
    return record


def running(folder: Path) -> list[int]:
    """Processes that hold a lock of a run of this study."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(link.startswith(str(folder / "out/locks")) for link in links):
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_a_killed_study_gives_the_same_numbers(tmp_path: Path) -> None:
    """Fails if a study that was killed with its runs, or alone, ends with other numbers than one
    that ran through, or a second start of a finished one runs anything."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_study(whole)
    assert study(whole).wait(PATIENCE) == 0
    write_study(parts)
    rng = random.Random(1)
    for also_runs in (True, False):
        process = study(parts)
        time.sleep(rng.uniform(10, 25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for number in running(parts) if also_runs else []:
            os.kill(number, signal.SIGKILL)
    assert study(parts).wait(PATIENCE) == 0
    expected = result(whole)
    assert result(parts) == json.loads(json.dumps(expected).replace(str(whole), str(parts)))
    assert expected["training"] and len(expected["scores"]) == 6  # three modes of two arms
    assert all(one["verdict"] != "not measured" for one in expected["findings"])
    logs = {path: path.stat().st_mtime_ns for path in (parts / "out/logs").glob("*.log")}
    assert study(parts).wait(PATIENCE) == 0
    assert {path: path.stat().st_mtime_ns for path in (parts / "out/logs").glob("*.log")} == logs
