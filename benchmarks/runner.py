"""From a problem to results: gate, then time in turns, then memory."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from benchmarks import gate, timing
from benchmarks.problem import Function, Problem
from benchmarks.timing import Task, Timing

OURS, EAGER, COMPILE = "r1v3", "torch eager", "torch.compile"


@dataclass(frozen=True)
class Result:
    """One implementation on one problem; `timing` is None unless its results are right.

    Attributes:
        note: why it was not timed, or what its outputs lack.
        error: largest error against float64: absolute of outputs, relative to the largest entry
            of gradients.
        first_call_seconds: of the checked call, with compilation.
        percent_of_yardstick: speed relative to a copy, sum or matrix product of the same work.
        over_eager, over_compile: how many times faster than these.
        times_ours: how many times r1v3's own time it takes.
    """

    implementation: str
    status: Literal["timed", "refused", "failed"]
    note: str = ""
    error: float | None = None
    first_call_seconds: float | None = None
    timing: Timing | None = None
    peak_extra_bytes: int | None = None
    gigabytes_per_second: float | None = None
    gigaflops_per_second: float | None = None
    percent_of_yardstick: float | None = None
    over_eager: float | None = None
    over_compile: float | None = None
    times_ours: float | None = None


@dataclass(frozen=True)
class ProblemReport:
    """Results on one problem, in the order run, and the yardstick measured among them."""

    problem: Problem = field(repr=False)
    yardstick: str
    yardstick_timing: Timing | None
    results: list[Result]

    def as_json(self) -> dict[str, Any]:
        """The document described in `report`."""
        problem = self.problem
        return {
            "op": problem.op,
            "mode": problem.mode,
            "shape": problem.shape,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "bytes": problem.bytes_read + problem.bytes_written,
            "flops": problem.flops,
            "yardstick": self.yardstick,
            "yardstick_timing": self.yardstick_timing and asdict(self.yardstick_timing),
            "implementations": [asdict(result) for result in self.results],
        }

    @property
    def sound(self) -> bool:
        """Whether r1v3's own kernel passed the gate."""
        return any(r.implementation == OURS and r.status == "timed" for r in self.results)


def run(
    problem: Problem,
    peers: dict[str, Function],
    device: str,
    seconds_per_task: float,
    *,
    compiled: bool = True,
) -> ProblemReport:
    """Check every implementation, then time those whose results are right.

    Args:
        peers: rivals' functions by name; all get the problem's inputs.
        seconds_per_task: about how long each is timed, as far as it is not too few times.
        compiled: whether torch.compile of the eager function is one of them.
    """
    # Earlier problems must not count against torch.compile's limit of recompilations.
    torch.compiler.reset()
    functions = {
        OURS: problem.ours,
        EAGER: problem.eager,
        **({COMPILE: torch.compile(problem.eager, dynamic=False)} if compiled else {}),
        **problem.restated,
        **peers,
    }
    truth = gate.solve(problem)
    # What is kept of a problem must not hold its inputs: a run has dozens, of gigabytes each.
    kept = replace(problem, inputs={}, upstream=())
    checked = {
        name: check(problem, name, function, truth, device) for name, function in functions.items()
    }
    right = [name for name, result in checked.items() if result.status == "timed"]
    tasks = [_task(problem, name, functions[name], device) for name in right]
    yardstick, repeats = _yardstick(problem, device)
    if not tasks:
        return ProblemReport(kept, yardstick.name, None, list(checked.values()))
    timings = timing.measure([*tasks, yardstick], device, seconds_per_task)
    best_possible = timings[yardstick.name].median * repeats
    for task in tasks:
        checked[task.name] = _timed(
            problem, checked[task.name], timings, best_possible,
            timing.peak_extra_bytes(task, device),
        )  # fmt: skip
    return ProblemReport(kept, yardstick.name, timings[yardstick.name], list(checked.values()))


def check(
    problem: Problem, name: str, function: Function, truth: gate.Truth, device: str
) -> Result:
    """Run the function once and compare: "timed" means that it may be timed."""
    start = time.perf_counter()
    try:
        given = gate.answer(problem, function)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        found = gate.errors(problem, truth, given)
    except Exception as error:  # noqa: BLE001 - a rival may raise anything
        return Result(name, "failed", first_line(error))
    worst = max(found.values())
    is_ours = name.startswith(OURS)
    objection = gate.objection(found, truth, given, problem.tolerance, is_ours=is_ours)
    if objection is not None:
        return Result(name, "refused", objection, worst, seconds)
    some = len(given.outputs) < len(truth.answer.outputs)
    note = f"only the first {len(given.outputs)} of the outputs" if some else ""
    return Result(name, "timed", note, worst, seconds)


def first_line(error: BaseException) -> str:
    """Name and first line of an error."""
    line = (str(error).splitlines() or [""])[0][:160]
    return f"{type(error).__name__}: {line}"


def _task(problem: Problem, name: str, function: Function, device: str) -> Task:
    """On CUDA, inputs that are overwritten are copied anew for every run, untimed.

    On the CPU that would take longer than the small ops themselves; there, the values of what has
    been overwritten make no difference.
    """

    def fresh() -> Problem:
        if device == "cpu" or not problem.mutated:
            return problem
        copies = {name: problem.inputs[name].clone() for name in problem.mutated}
        return replace(problem, inputs={**problem.inputs, **copies})

    if problem.mode == "backward":
        return Task(name, gate.run_backward, lambda: gate.record(fresh(), function))
    if problem.mode == "forward":
        run: Callable[[Any], object] = lambda given: gate.run_forward(given or problem, function)  # noqa: E731
    else:
        run = lambda given: gate.run_backward(gate.record(given or problem, function))  # noqa: E731
    return Task(name, run, fresh if device != "cpu" and problem.mutated else None)


def _yardstick(problem: Problem, device: str) -> tuple[Task, float]:
    """The hardware's best at such work, and how many times the problem's work is that."""
    if problem.flops:
        hidden, weight = problem.inputs["hidden"], problem.inputs["weight"]
        once = 2 * hidden.shape[0] * weight.shape[0] * weight.shape[1]
        return timing.matrix_product(hidden, weight), problem.flops / once
    if problem.bytes_written == 0:
        return timing.read_sum(problem.bytes_read, device), 1.0
    return timing.copy(problem.bytes_read + problem.bytes_written, device), 1.0


def _timed(
    problem: Problem,
    result: Result,
    timings: dict[str, Timing],
    best_possible: float,
    peak_extra_bytes: int,
) -> Result:
    own = timings[result.implementation]
    notes = [result.note] if result.note else []
    if own.late:
        notes.append(f"in {own.late} of {own.samples} samples the GPU waited for the host")
    n_bytes = problem.bytes_read + problem.bytes_written
    return replace(
        result,
        note="; ".join(notes),
        timing=own,
        peak_extra_bytes=peak_extra_bytes,
        gigabytes_per_second=n_bytes / own.median / 1e9 if n_bytes else None,
        gigaflops_per_second=problem.flops / own.median / 1e9 if problem.flops else None,
        percent_of_yardstick=100 * best_possible / own.median,
        over_eager=timings[EAGER].median / own.median if EAGER in timings else None,
        over_compile=timings[COMPILE].median / own.median if COMPILE in timings else None,
        times_ours=own.median / timings[OURS].median if OURS in timings else None,
    )
