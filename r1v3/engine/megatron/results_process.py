"""The helper process through which checkpoint writers tell a rank what they have written.

Its own file, without torch: the process that is spawned imports it and nothing else.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing.managers import SyncManager


def _end_with_parent() -> None:
    """End when the rank does, however it does, and not before.

    torchrun sends SIGTERM to all that a rank has started; the rank still has to save. A rank that
    is killed tells nobody.
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
    """A manager for queues that both a process and what it forks can use."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(_end_with_parent)
    return manager
