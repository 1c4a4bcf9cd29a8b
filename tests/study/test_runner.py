"""The runner, with processes that only leave the files of a stage (`tests/study/verb.py`)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from r1v3.study.plan import Plan
from r1v3.study.run import print_commands
from r1v3.study.runner import Runner
from tests.processes import PATIENCE, ROOT
from tests.study.written import planned

OUT = Path("out")
PYTHON = sys.executable
# A study in a process of its own, whose sft run waits.
WAITING = """
import sys
from pathlib import Path
sys.executable = sys.argv[1]
from r1v3.study.runner import Runner
from tests.study.written import planned
plan = planned(seeds=[0], arms={"default": {"sft": {"max_length": 99}}})
Runner(plan.runs, plan.labels(), Path("out"), 2, print).run()
"""


@pytest.fixture(autouse=True)
def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `python` that runs the stand-in for r1v3."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/study/verb.py "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def run(plan: Plan, jobs: int = 2) -> tuple[dict[str, str], list[str]]:
    """Run a plan; what failed, and the lines that were said."""
    said: list[str] = []
    failed = Runner(plan.runs, plan.labels(), OUT, jobs, said.append).run()
    return failed, said


def calls() -> list[str]:
    return Path("calls").read_text().splitlines()


def wait_for(condition: Any) -> None:
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_every_run_is_run_once_after_what_it_needs() -> None:
    """Fails if a run starts before its ancestors have ended, twice, or again when it is done."""
    plan = planned(seeds=[0])
    failed, said = run(plan)
    assert failed == {}
    ends = [line.split()[1] for line in calls() if line.startswith("end")]
    assert ends[:2] == ["data", "sft"] and sorted(ends[2:]) == ["eval"] * 2 + ["grpo"] * 2
    assert len(said) == 7 and "6 runs, 0 are there already; 2 at a time" in said[0]
    assert "6/6" in said[-1] and "done in" in said[-1] and "left" not in said[-1]
    assert "left" in said[1]
    assert run(plan) == ({}, []) and len(calls()) == 12


def test_what_fails_stops_what_needs_it_and_nothing_else() -> None:
    """Fails if one bad arm ends a night's study, or its reason is not told."""
    arms = {"default": {}, "bad": {"sft": {"max_length": 13}}}
    plan = planned(seeds=[0], arms=arms)
    failed, said = run(plan)
    keys = {stage: plan.run("bad", 0, stage).key for stage in ("sft", "grpo", "score")}
    assert set(failed) == set(keys.values())
    assert failed[keys["sft"]].startswith("thirteen is too long; see out/logs/sft-")
    assert failed[keys["score"]] == f"needs {keys['grpo']}"
    assert any("FAILED: thirteen is too long" in line for line in said)
    # Begun once, it is to go on the next time.
    run(plan)
    assert calls()[-1] == "start sft --resume"


def test_a_killed_study_leaves_runs_that_the_next_one_waits_for(folder: Path) -> None:
    """Fails if two processes would write into one run folder after a kill -9, or what the first
    one finished is run again."""
    arms = {"default": {"sft": {"max_length": 99}}}
    plan = planned(seeds=[0], arms=arms)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [PYTHON, "-c", WAITING, sys.executable]
    killed = subprocess.Popen(command, env=environment, cwd=folder)
    wait_for(lambda: killed.poll() or (Path("calls").exists() and "start sft" in calls()))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "another process is at it" in line:
            Path("go").write_text("")

    assert Runner(plan.runs, plan.labels(), OUT, 1, say).run() == {}
    assert [line for line in calls() if "sft" in line] == ["start sft", "end sft"]
    assert any("another process is at it" in line for line in said)


def test_a_study_that_is_asked_to_stop_takes_its_runs_along(folder: Path) -> None:
    """Fails if Ctrl-C leaves processes behind, or ends without saying how to go on."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [PYTHON, "-c", WAITING, sys.executable]
    asked = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE)
    wait_for(lambda: asked.poll() or (Path("calls").exists() and "start sft" in calls()))
    asked.send_signal(signal.SIGTERM)
    _, error = asked.communicate(timeout=PATIENCE)
    assert b"StageInterrupted: the study stopped; its runs are saved" in error
    Path("go").write_text("")
    # Its lock is free, so that nothing is waited for, and the run goes on.
    failed, said = run(planned(seeds=[0], arms={"default": {"sft": {"max_length": 99}}}))
    assert failed == {} and not any("another process" in line for line in said)
    assert [line for line in calls() if "sft" in line] == [
        "start sft", "start sft --resume", "end sft --resume",
    ]  # fmt: skip


def test_commands_are_printed_in_an_order_in_which_they_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if a scheduler is given a run before its ancestors, one that is finished, or a
    configuration that is not there."""
    plan = planned(seeds=[0], arms={"default": {}}, launcher="sbatch go.sh")
    print_commands([plan], plan.runs)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [line.rpartition(" ")[0] for line in lines] == [
        "r1v3 data", "sbatch go.sh sft", "sbatch go.sh grpo", "sbatch go.sh eval",
    ]  # fmt: skip
    assert all(Path(line.split()[-1]).is_file() for line in lines)
    run(plan)
    print_commands([plan], plan.runs)
    assert capsys.readouterr().out == ""
