"""The stages as ranks on megatron-core: they learn what one process learns, survive kills and
polite stops under torchrun, and resume to the same bits."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r1v3.model.internvl import load_model
from r1v3.trainer.metrics import comparable, read_metrics
from tests.processes import PATIENCE, end, environment, free_port, run_ranks
from tests.tiny_run import finished, home, leftovers, stage_arguments, succeed, write_configs

pytest.importorskip("megatron.core")
SPLIT = ["engine=megatron", "parallel.tensor=2", "parallel.pipeline=2"]


class Job:
    """A verb under torchrun in `folder`, with what it prints."""

    def __init__(self, folder: Path, ranks: int, *arguments: str, entry: str = "r1v3") -> None:
        self.log = folder / f"log-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        # A step and its checkpoint take longer than torchrun's 30 s where cores are scarce.
        command += ["--shutdown-timeout", "200", "--master-port", str(free_port())]
        command += ["-m", *entry.split(), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment(), "R1V3_TEST_JOB": str(self.log)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait(self, limit: float = PATIENCE) -> int:
        """The exit code; what the job has started ends with it, or is ended and complained of."""
        try:
            code = self.process.wait(limit)
            deadline = time.monotonic() + PATIENCE
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
            left = self.alive()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit} s: {self.output()}") from None
        finally:
            end(self.process)
            for pid in self.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert not left, f"processes {left} outlive the job"
        return code

    def alive(self) -> list[int]:
        """Processes with this job's mark; torchrun gives each rank a session of its own."""
        mark, found = f"R1V3_TEST_JOB={self.log}\0".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            # Gone meanwhile, or not ours to read.
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found


def run(folder: Path, ranks: int, *arguments: str) -> None:
    job = Job(folder, ranks, *arguments)
    assert job.wait() == 0, job.output()


def grpo(*more: str) -> list[str]:
    return [*stage_arguments("grpo"), *SPLIT, *more]


@functools.cache
def whole() -> Path:
    """An uninterrupted GRPO stage at TP2 x PP2, as torchrun would start it."""
    folder = home() / "megatron-grpo"
    write_configs(folder)
    run_ranks("tests.trainer.forked_rank", 4, folder, *grpo())
    return folder


def lines(folder: Path, stage: str = "grpo") -> list[dict[str, object]]:
    return comparable(read_metrics(folder / "run/metrics" / f"{stage}.jsonl"))


def weights(folder: Path) -> bytes:
    return (folder / "run/models/grpo/model.safetensors").read_bytes()


def test_the_split_run_is_the_single_process() -> None:
    """Fails if ranks at TP2 x PP2 would sample, reward or learn something else than `hf`."""
    is_the_single_process(whole())


@pytest.mark.slow
def test_a_run_with_a_divided_context_is_the_single_process(tmp_path: Path) -> None:
    """Fails if context-parallel ranks would sample, reward or learn something else than `hf`."""
    write_configs(tmp_path)
    context = ["engine=megatron", "parallel.context=2"]
    run_ranks("tests.trainer.forked_rank", 2, tmp_path, *stage_arguments("grpo"), *context)
    is_the_single_process(tmp_path)


def is_the_single_process(folder: Path) -> None:
    single, _ = finished("grpo")
    for found, wanted in zip(lines(folder), lines(single), strict=True):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert sum(float(line["grad_norm"]) > 0 for line in lines(whole())) >= 2  # type: ignore[arg-type]
    checkpoints = whole() / "run/checkpoints/grpo"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000004"]
    listed = json.loads((checkpoints / "step-000002/manifest.json").read_text())["files"]
    assert "model.safetensors" in listed and any(name.startswith("megatron/") for name in listed)


@pytest.mark.slow
def test_stops_and_kills_change_no_bit(tmp_path: Path) -> None:
    """Fails if SIGTERM loses a step, a dead rank leaves the others hanging or what is left behind
    unusable, or `--resume` goes on to something else."""
    write_configs(tmp_path)
    metrics = tmp_path / "run/metrics/grpo.jsonl"
    arguments, entry = grpo("checkpoint_every=1"), "tests.trainer.signaled_rank"
    stopped = Job(tmp_path, 4, *arguments, entry=f"{entry} stop 2")
    assert stopped.wait() != 0
    taken = len(read_metrics(metrics))
    assert taken in (2, 3), stopped.output()
    said = f"grpo stopped at step {taken} of 4 and was saved; go on with --resume"
    assert said in stopped.output(), stopped.output()
    saved = tmp_path / f"run/checkpoints/grpo/step-{taken:06d}"
    assert (saved / "manifest.json").is_file()

    killed = Job(tmp_path, 4, *arguments, "--resume", entry=f"{entry} kill {taken + 1}")
    assert killed.wait() != 0
    assert time.time() - (tmp_path / "signaled").stat().st_mtime < 120
    said = "another rank has died or hangs; checkpoints are kept: go on with --resume"
    assert said in killed.output(), killed.output()
    assert "Signal 9 (SIGKILL)" in killed.output(), killed.output()
    assert len(read_metrics(metrics)) == taken, "killed elsewhere than in the step"

    run(tmp_path, 4, *arguments, "--resume")
    assert lines(tmp_path) == lines(whole())
    assert weights(tmp_path) == weights(whole())
    assert leftovers(tmp_path / "run") == []


def test_one_process_goes_on_from_four(tmp_path: Path) -> None:
    """Fails if a run is tied to its cluster, or megatron needs torchrun for a single process."""
    write_configs(tmp_path)
    shutil.copytree(whole() / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/models")
    shutil.rmtree(tmp_path / "run/checkpoints/grpo/step-000004")
    succeed(tmp_path, *stage_arguments("grpo"), "engine=megatron", "--resume")
    for found, wanted in zip(lines(tmp_path), lines(whole()), strict=True):
        for key in ("loss", "reward", "grad_norm", "entropy", "tokens"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "connector"])
def test_supervised_stages_run_split(tmp_path: Path, stage: str) -> None:
    """Fails if SFT or connector tuning at TP2 learns something else than in one process."""
    single, _ = finished(stage)
    write_configs(tmp_path)
    run(tmp_path, 2, *stage_arguments(stage), "engine=megatron", "parallel.tensor=2")
    for found, wanted in zip(lines(tmp_path, stage), lines(single, stage), strict=True):
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    start = dict(load_model(home() / "base").named_parameters())
    trained = dict(load_model(tmp_path / f"run/models/{stage}").named_parameters())
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, start[name])}
    projector = {name for name in trained if "multi_modal_projector" in name}
    assert moved == (projector if stage == "connector" else set(trained))
