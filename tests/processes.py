"""Several real processes of one job on this machine: started, waited for, and ended."""

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Seconds after which a process that should long have ended is taken to hang. Tests do not measure
# time with it: beside other programs, a machine may be twenty times as slow.
PATIENCE = 1800
# Bytes that a process of the tests, or one that it starts, may allocate. Most need about 1 GB;
# those of more than 2^31 elements need 9 GB.
MEMORY_LIMIT = 12 << 30


@dataclass
class Session:
    """State that the test processes of one session share; tests/conftest.py fills it in."""

    folder: Path | None = None


SESSION = Session()


def made_once(name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """A folder that all test processes share, and what `make` gave (as JSON) when it made it.

    The first process that asks calls `make` with the folder; others wait and read.
    """
    assert SESSION.folder is not None
    folder = SESSION.folder / name
    result = folder.with_name(f"{name}.json")
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            folder.mkdir()
            result.write_text(json.dumps(make(folder)), encoding="utf-8")
    return folder, json.loads(result.read_text(encoding="utf-8"))


def marked(cases: Iterable[str], exhaustive: Container[str]) -> list[Any]:
    """Parameters of a test; those that are `exhaustive` are marked `slow`."""
    slow = pytest.mark.slow
    return [pytest.param(case, marks=slow if case in exhaustive else ()) for case in cases]


def slow_chosen(request: pytest.FixtureRequest) -> bool:
    """Whether slow tests of the file that asks for a fixture are among those that will run."""
    return any(
        item.get_closest_marker("slow") is not None and item.path == request.path
        for item in request.session.items
    )


def free_port() -> int:
    """A port of the loopback that nobody listens on.

    Below those that the system gives to connections of other processes, which could take it before
    it is listened on; and drawn anew in every process, unlike what a test's seed would draw.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment() -> dict[str, str]:
    """Environment of every process of a test job: this tree, one thread, no GPU, the loopback."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
    }


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that leads a session, with all it has started there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_ranks(module: str, world: int, folder: Path, *arguments: str, **variables: str) -> None:
    """Run `main(folder, *arguments)` of a module as the ranks of a job; all must end well.

    Each finds RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and `variables` in its environment; what
    it prints is shown on failure. See tests/ranks.py.
    """
    job = [sys.executable, "-m", "tests.ranks", module, str(world), str(folder), *arguments]
    log = folder / "job.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            job,
            cwd=ROOT,
            env={**environment(), "MASTER_PORT": str(free_port()), **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(PATIENCE)
    finally:
        end(process)
    logs = [log, *(folder / f"rank{rank}.log" for rank in range(world))]
    texts = [f"{path.name}: {path.read_text()[-3000:]}" for path in logs if path.exists()]
    assert code == 0, f"exit code {code}\n" + "\n".join(texts)
