"""Times, memory and the yardsticks they are compared with, on the CPU and on CUDA."""

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1v3.kernels import cpu

L2_FLUSH_BYTES = 256 * 2**20
CUDA_WARM_UP, CUDA_ROUNDS = 25, 100
CUDA_FEWEST_WARM_UP, CUDA_FEWEST_ROUNDS = 10, 10
# Clock cycles, about 0.1 ms to begin with and 30 ms at most: what takes the host longer waits.
CUDA_HEAD_START, CUDA_LONGEST_HEAD_START = 200_000, 60_000_000
CPU_FEWEST_ROUNDS, CPU_MOST_ROUNDS = 5, 100
SHORTEST_SAMPLE = 1e-3


@dataclass(frozen=True)
class Task:
    """Something to time: `run` gets what the untimed `prepare` returned, once per call."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and 20th and 80th percentile of the samples.

    `late` samples hold time in which a GPU waited for the host.
    """

    median: float
    p20: float
    p80: float
    samples: int
    calls_per_sample: int
    late: int = 0

    @staticmethod
    def of(samples: Sequence[float], calls_per_sample: int = 1, late: int = 0) -> "Timing":
        """Statistics of seconds per call.

        Raises:
            ValueError: without samples.
        """
        if not samples:
            raise ValueError("a timing needs at least one sample, got none")
        ordered = sorted(samples)
        median, p20, p80 = (quantile(ordered, q) for q in (0.5, 0.2, 0.8))
        return Timing(median, p20, p80, len(ordered), calls_per_sample, late)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, interpolated linearly between its neighbors."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def measure(
    tasks: Sequence[Task],
    device: str,
    seconds_per_task: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every task, in turns, so that a slow moment of the machine meets all of them.

    On the CPU, the order within a turn is shuffled, so that no task always finds the caches as
    another left them. Calls shorter than a millisecond are repeated within a sample, after one
    that is not timed, unless they need preparation. On CUDA the L2 cache is overwritten before
    each call, and the device is kept waiting until the host has enqueued it: what is measured is
    the device's time. How long that takes is learned for each task in the rounds of warm-up.
    """
    if device != "cpu":
        return _measure_cuda(tasks, seconds_per_task, clock)
    calls = {task.name: _calls_per_sample(task, clock) for task in tasks}
    samples: dict[str, list[float]] = {task.name: [] for task in tasks}
    order = random.Random(0)
    end = clock() + seconds_per_task * len(tasks)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(CPU_MOST_ROUNDS):
            if turn >= CPU_FEWEST_ROUNDS and clock() > end:
                break
            for task in order.sample(tasks, len(tasks)):
                samples[task.name].append(_sample(task, calls[task.name], clock))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(seconds, calls[name]) for name, seconds in samples.items()}


def _calls_per_sample(task: Task, clock: Callable[[], float]) -> int:
    once = _sample(task, 1, clock)
    if task.prepare is not None or once >= SHORTEST_SAMPLE:
        return 1
    return min(1000, math.ceil(SHORTEST_SAMPLE / max(once, 1e-6)))


def _sample(task: Task, calls: int, clock: Callable[[], float]) -> float:
    prepared = None if task.prepare is None else task.prepare()
    if calls > 1:
        task.run(prepared)
    start = clock()
    for _ in range(calls):
        task.run(prepared)
    return (clock() - start) / calls


def _measure_cuda(
    tasks: Sequence[Task], seconds_per_task: float, clock: Callable[[], float]
) -> dict[str, Timing]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {task.name: [] for task in tasks}
    late = dict.fromkeys(samples, 0)
    head_starts = dict.fromkeys(samples, CUDA_HEAD_START)
    limit = seconds_per_task * len(tasks)
    for most, fewest, share in (
        (CUDA_WARM_UP, CUDA_FEWEST_WARM_UP, 0.25),
        (CUDA_ROUNDS, CUDA_FEWEST_ROUNDS, 0.75),
    ):
        samples, late = {name: [] for name in samples}, dict.fromkeys(late, 0)
        end = clock() + share * limit
        for turn in range(most):
            if turn >= fewest and clock() > end:
                break
            for task in tasks:
                head_start = head_starts[task.name]
                seconds, in_time = _cuda_sample(task, flush, head_start)
                samples[task.name].append(seconds)
                if not in_time:
                    late[task.name] += 1
                    head_starts[task.name] = min(2 * head_start, CUDA_LONGEST_HEAD_START)
    return {name: Timing.of(seconds, late=late[name]) for name, seconds in samples.items()}


def _cuda_sample(task: Task, flush: Tensor, head_start: int) -> tuple[float, bool]:
    """Seconds of one call on the device, and whether the host had enqueued it before it began."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepared = None if task.prepare is None else task.prepare()
    flush.zero_()
    torch.cuda._sleep(head_start)
    start.record()
    task.run(prepared)
    end.record()
    in_time = not start.query()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3, in_time


def peak_extra_bytes(task: Task, device: str) -> int:
    """Most bytes of tensors alive at once during one `prepare` and `run`, above those before.

    Memory that an implementation does not take from torch's allocators is not seen.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task.run(None if task.prepare is None else task.prepare())
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        task.run(None if task.prepare is None else task.prepare())
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def read_sum(n_bytes: int, device: str) -> Task:
    """Reading that many bytes once: a float32 sum, on the CPU by a C loop and torch's threads."""
    x = torch.ones(max(1, n_bytes // 4), device=device)
    if cpu.supports(x):
        return Task("read-sum", lambda _: cpu.read_sum(x))
    return Task("read-sum", lambda _: x.sum())


def copy(n_bytes: int, device: str) -> Task:
    """Moving that many bytes in all, half of them read and half written: a float32 copy."""
    x = torch.ones(max(1, n_bytes // 8), device=device)
    y = torch.empty_like(x)
    return Task("copy", lambda _: y.copy_(x))


def matrix_product(a: Tensor, b: Tensor) -> Task:
    """a [M, K] times b [N, K] transposed; float32 on the CPU, whose bfloat16 may be emulated."""
    if a.device.type == "cpu":
        a, b = a.float(), b.float()
    return Task("matmul", lambda _: a @ b.T)
