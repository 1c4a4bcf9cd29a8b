"""Further processes of this machine for a job of several ranks, in the place of torchrun."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch.distributed as dist

from r1v3.config import Stage
from r1v3.ranks import is_lost_peer, join_job, leave_job

# How long a rank may take to end after its last collective call before it is killed.
_GRACE_SECONDS = 10.0


@contextmanager
def local_job(
    stage: Stage,
    function: Callable[..., object],
    *arguments: object,
    meanwhile: Callable[[], object] = lambda: None,
    **options: object,
) -> Iterator[None]:
    """Make this process rank 0 of a job whose other ranks call `function` meanwhile.

    The block must take part in the same collective calls as `function`. Nothing is done where
    `stage.processes` is 1, and under torchrun, which has started the ranks. The ranks talk over
    loopback, and end with this process.

    Args:
        stage: says how many ranks there are, and on which device.
        function: importable by its name; its arguments are pickled.
        meanwhile: called here, while the other ranks start.

    Raises:
        RuntimeError: another rank ended on its own, which the message explains; or this process is
            in another job.
    """
    if stage.processes == 1 or "WORLD_SIZE" in os.environ:
        meanwhile()
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of another job already")
    before = dict(os.environ)
    size = str(stage.processes)
    told = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    seconds = stage.parallel.timeout_seconds
    store = _store(0, stage.processes, seconds, is_master=True)
    told["MASTER_PORT"] = str(store.port)
    if loopback := [name for _, name in socket.if_nameindex() if name.startswith("lo")]:
        told["GLOO_SOCKET_IFNAME"] = loopback[0]
    os.environ.update(told | _number(0))
    others: list[_Rank] = []
    try:
        work = (stage.device, seconds, function, arguments, options)
        others += [_Rank(told | _number(rank), work) for rank in range(1, stage.processes)]
        meanwhile()
        for other in others:
            other.wait_until_ready()
        join_job(stage.device, seconds, store)
        yield
    except BaseException as error:
        reasons = [reason for other in others if (reason := other.reason()) is not None]
        for other in others:
            other.process.kill()
        if is_lost_peer(error) and reasons:
            raise RuntimeError(reasons[0]) from error
        raise
    finally:
        leave_job()
        os.environ.clear()
        os.environ.update(before)
        for other in others:
            other.end()


class _Rank:
    """Another rank, and the pipe through which it says that it is ready, and why it has failed."""

    def __init__(self, environment: dict[str, str], work: tuple[object, ...]) -> None:
        self.name = f"rank {environment['RANK']}"
        context = multiprocessing.get_context("spawn")
        self.told, its_end = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(
            target=_be_rank, args=(environment, its_end, *work)
        )
        self.process.start()
        its_end.close()

    def wait_until_ready(self) -> None:
        """Wait until it can join the job.

        Raises:
            RuntimeError: it ended before.
        """
        try:
            self.told.recv()
        except EOFError:
            raise RuntimeError(self.reason()) from None

    def reason(self) -> str | None:
        """Say why it has failed, if it has; None otherwise."""
        if not self.told.poll(1.0):
            return None
        try:
            return f"{self.name}: {self.told.recv()}"
        except EOFError:
            self.process.join()
        if self.process.exitcode == 0:
            return None
        return (
            f"{self.name} (process {self.process.pid}) ended with exit code "
            f"{self.process.exitcode}; checkpoints are kept: go on with --resume"
        )

    def end(self) -> None:
        """Wait until it has ended; kill it if it does not."""
        self.process.join(_GRACE_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _number(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _store(port: int, processes: int, seconds: float, *, is_master: bool) -> dist.TCPStore:
    """Open the store where the ranks meet; the first one holds it, at a port that is free."""
    return dist.TCPStore(
        "127.0.0.1",
        port,
        processes,
        is_master=is_master,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )


def _be_rank(
    environment: dict[str, str],
    tell: Connection,
    device: str,
    timeout_seconds: float,
    function: Callable[..., object],
    arguments: tuple[object, ...],
    options: dict[str, object],
) -> None:
    """Call `function` as a rank; rank 0 prints what stops them all, and warns of what all see."""
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    _follow_parent()
    tell.send(None)
    try:
        port, size = int(environment["MASTER_PORT"]), int(environment["WORLD_SIZE"])
        join_job(device, timeout_seconds, _store(port, size, timeout_seconds, is_master=False))
        function(*arguments, **options)
    except Exception as error:
        tell.send(f"{type(error).__name__}: {error}")
        sys.exit(1)
    finally:
        leave_job()


def _follow_parent() -> None:
    """End when rank 0 has, however it ends; a signal to all is rank 0's to obey."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
