"""Ranks that a program starts itself: they work together, end together, and say what ended them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from r1v3.config import Stage
from r1v3.local_job import local_job
from r1v3.ranks import Ranks, leave_job
from tests.processes import PATIENCE, ROOT, end, environment


@pytest.fixture(autouse=True)
def alone() -> None:
    """Tests that ran before in this process may have left it in a group of one."""
    leave_job()


def test_a_rank_of_a_job_starts_no_other(tmp_path: Path) -> None:
    """Fails if a job would silently be joined with the wrong ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with (
            pytest.raises(RuntimeError, match="a rank of another job already"),
            local_job(stage(tmp_path), leave_a_note, tmp_path),
        ):
            pass
    finally:
        leave_job()


def stage(folder: Path, processes: int = 2) -> Stage:
    return Stage(run=folder, processes=processes)


def leave_a_note(folder: Path) -> None:
    ranks = Ranks(dist.group.WORLD)
    seen = ranks.gather((os.environ["RANK"], os.environ["LOCAL_RANK"], os.getpid()))
    (folder / f"rank{ranks.rank}").write_text(f"{len({pid for *_, pid in seen})} processes")


def fail(folder: Path) -> None:
    raise ValueError(f"no picture in {folder.name}")


def die(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_the_others(folder: Path) -> None:
    (folder / "waiting").write_text(str(os.getpid()))
    Ranks(dist.group.WORLD).barrier()


class Unpicklable:
    """A task whose argument a rank cannot even read."""

    def __reduce__(self) -> tuple[object, ...]:
        return (fail, (Path("nowhere"),))


def test_the_ranks_of_a_job_talk_to_each_other(tmp_path: Path) -> None:
    """Fails if a rank is not started, is told another's number, or the environment stays changed:
    the next stage of the program would take itself for a rank."""
    before = dict(os.environ)
    with local_job(stage(tmp_path, 3), leave_a_note, tmp_path):
        leave_a_note(tmp_path)
    assert dict(os.environ) == before and not dist.is_initialized()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {f"rank{rank}": "3 processes" for rank in range(3)}


@pytest.mark.parametrize("told", [{"WORLD_SIZE": "2"}, {}])
def test_nothing_is_started_beside_torchrun_or_for_one_process(
    tmp_path: Path, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if every rank of torchrun would start ranks of its own."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with local_job(stage(tmp_path, 2 if told else 1), fail, tmp_path):
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [
        (fail, None, "rank 1: ValueError: no picture in test_"),
        (die, None, r"rank 1 \(process \d+\) ended with exit code -9; .* go on with --resume"),
        (leave_a_note, Unpicklable(), r"rank 1 \(process \d+\) ended with exit code 1"),
    ],
)
def test_a_rank_that_fails_ends_the_job_and_says_why(
    tmp_path: Path, function: object, argument: object, reason: str
) -> None:
    """Fails if the first rank waits for a dead one, or blames the connection."""
    with (
        pytest.raises(RuntimeError, match=reason),
        local_job(stage(tmp_path), function, argument or tmp_path),  # type: ignore[arg-type]
    ):
        wait_for_the_others(tmp_path)
    assert not dist.is_initialized() and "RANK" not in os.environ


def test_an_error_of_the_first_rank_is_raised_as_it_is(tmp_path: Path) -> None:
    """Fails if the person who misspelled a file reads that a rank has died, or ranks are left."""
    with (
        pytest.raises(FileNotFoundError, match="mine"),
        local_job(stage(tmp_path), wait_for_the_others, tmp_path),
    ):
        while not (tmp_path / "waiting").exists():
            time.sleep(0.01)
        raise FileNotFoundError("mine")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "waiting").read_text()), 0)


PARENT = """
import sys, time
from pathlib import Path
from tests.test_local_job import local_job, stage, wait_for_the_others

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with local_job(stage(folder), wait_for_the_others, folder):
        time.sleep(3600)
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_ranks_end_with_the_first_one(tmp_path: Path, number: int) -> None:
    """Fails if a killed program leaves ranks behind, which hold memory and cores for ever."""
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        note = tmp_path / "waiting"
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        rank = int(note.read_text())
        parent.send_signal(number)
        assert parent.wait(PATIENCE) != 0
        while Path(f"/proc/{rank}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(f"/proc/{rank}").exists()
    finally:
        end(parent)
