"""Threads, forks and linkage of the compiled CPU kernels."""

import multiprocessing
import threading
import time

import numpy as np
import torch

from r1v3 import _C
from tests.kernels.compiled import (
    forward,
)
from tests.processes import PATIENCE


def _child(queue: "multiprocessing.Queue[list[float]]") -> None:
    values = np.arange(2 * 1_200_000, dtype=np.float32).reshape(2, -1) % 97
    stats = np.zeros((2, 4), dtype=np.float32)
    _C.row_statistics(
        values.ctypes.data, 0, 2, 1_200_000, 1_200_000, 0, 0, 1.0, stats.ctypes.data, 2
    )
    queue.put(stats.ravel().tolist())


def test_a_forked_child_can_use_threads() -> None:
    """Fails (by hanging) if worker threads of the parent are expected to exist after a fork."""
    parent: multiprocessing.Queue[list[float]] = multiprocessing.get_context("fork").Queue()
    _child(parent)
    expected = parent.get(timeout=PATIENCE)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(parent,))
    process.start()
    try:
        assert parent.get(timeout=PATIENCE) == expected
    finally:
        process.join(timeout=PATIENCE)
        if process.is_alive():
            process.kill()
    assert process.exitcode == 0


def test_the_lock_of_the_interpreter_is_released() -> None:
    """Fails if a kernel holds the lock: here one thread counts while another computes."""
    logits = torch.zeros(400, 151674)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    forward(logits, capability="portable")
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(start < at < end for at in ticks) >= 3


def test_the_extension_needs_no_torch() -> None:
    """Fails if the module links to torch, whose version it would then depend on."""
    with open(_C.__file__, "rb") as file:
        content = file.read()
    assert b"libtorch" not in content and b"libc10" not in content
