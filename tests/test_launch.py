"""The Slurm script, run by bash with commands of Slurm that note what they were asked."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import PATIENCE, ROOT

SCRIPT = ROOT / "configs/r1v3-38b/launch/slurm.sh"


class Cluster:
    """A folder of submission; its srun leaves checkpoints and ends as it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        (folder / "grpo.yaml").write_text("# settings\nrun: runs/mine   # where\nsteps: 4\n")
        self.command("scontrol", 'if [[ $1 == show ]]; then echo node0; else echo "$*" >>queue; fi')
        self.command("scancel", 'echo "$*" >>signals; touch saved')

    def command(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def begin(self, step: int | None, run: str = "runs/mine") -> None:
        """Leave what a stage does when it ends: its settings, and a checkpoint."""
        (self.folder / run / "config").mkdir(parents=True, exist_ok=True)
        (self.folder / run / "config/grpo.yaml").touch()
        if step is not None:
            path = self.folder / run / f"checkpoints/grpo/step-{step:06d}"
            path.mkdir(parents=True, exist_ok=True)

    def start(self, *overrides: str, restarts: int = 0) -> "subprocess.Popen[bytes]":
        slurm = {
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "node[0-7]",
            "SLURM_JOB_NUM_NODES": "8",
            "SLURM_JOB_ID": "77",
            "SLURM_RESTART_COUNT": str(restarts),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), "grpo", "grpo.yaml", *overrides],
            cwd=self.folder,
            env={**os.environ, **slurm},
            stderr=subprocess.DEVNULL,
        )

    def queued(self) -> int:
        """Count how often the job was put back into the queue."""
        queue = self.folder / "queue"
        lines = queue.read_text().splitlines() if queue.exists() else []
        assert set(lines) <= {"requeue 77"}
        return len(lines)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    return Cluster(tmp_path)


def test_a_stage_that_ends_well_is_not_queued_again(cluster: Cluster) -> None:
    """Fails if a finished job would start over."""
    cluster.command("srun", 'echo "$*" >started')
    cluster.begin(4)
    assert cluster.start().wait(PATIENCE) == 0
    assert cluster.queued() == 0
    assert "grpo grpo.yaml" in (cluster.folder / "started").read_text()


def test_a_wrong_setting_is_not_tried_again(cluster: Cluster) -> None:
    """Fails if 64 GPUs start three times for a misspelled key."""
    cluster.command("srun", "exit 1")
    assert cluster.start().wait(PATIENCE) == 1
    assert cluster.queued() == 0


@pytest.mark.parametrize("run", ["runs/mine", "runs/other"])
def test_failures_without_a_new_checkpoint_are_limited(cluster: Cluster, run: str) -> None:
    """Fails if a job that cannot go on is queued for ever, or one that does go on is given up."""
    cluster.command("srun", "exit 1")
    overrides = [] if run == "runs/mine" else ["steps=9", f"run={run}"]
    cluster.begin(None, run)
    for attempt in range(1, 6):
        assert cluster.start(*overrides, restarts=attempt - 1).wait(PATIENCE) == 1
        assert cluster.queued() == min(attempt, 3)
    cluster.begin(20, run)
    for attempt in range(1, 6):
        cluster.start(*overrides, restarts=9).wait(PATIENCE)
        assert cluster.queued() == 3 + min(attempt, 3)
    cluster.begin(40, run)
    cluster.start(*overrides, restarts=9).wait(PATIENCE)
    assert cluster.queued() == 7


def test_a_queued_job_goes_on(cluster: Cluster) -> None:
    """Fails if the second start would refuse to write over the first."""
    cluster.command("srun", 'echo "$*" >>started')
    for restarts in (0, 1):
        cluster.start("seed=1", restarts=restarts).wait(PATIENCE)
    first, second = (cluster.folder / "started").read_text().splitlines()
    assert first.endswith("grpo grpo.yaml seed=1")
    assert second.endswith("grpo grpo.yaml seed=1 --resume")


def test_the_end_of_the_time_saves_and_queues_whatever_the_failures(cluster: Cluster) -> None:
    """Fails if a job at its time limit ends for good, or is counted as a failure."""
    cluster.command("srun", "touch running; while [[ ! -e saved ]]; do sleep 0.05; done; exit 130")
    cluster.begin(20)
    job = cluster.start()
    while not (cluster.folder / "running").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE) == 130
    assert cluster.queued() == 1
    assert (cluster.folder / "signals").read_text() == "--signal=USR1 77.0\n"
    assert not (cluster.folder / "runs/mine/failures-grpo").exists()
