"""The manager process through which checkpoint writers report to their rank.

It is a file of its own, without torch, because the spawned process imports it.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing.managers import SyncManager


def _end_with_parent() -> None:
    """Exit when the rank has ended, for whatever reason, and not before.

    torchrun sends SIGTERM to every process that a rank has started, while the rank still has to
    save. A killed rank sends nothing.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def start() -> SyncManager:
    """Start a manager of queues that a process shares with the processes it forks."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_end_with_parent)
    return manager
