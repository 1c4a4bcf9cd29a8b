"""`python -m benchmarks.device`: build, test and measure on a GPU in one call of ten minutes.

Needs torch, Triton, numpy, and for the steps that use them pytest, setuptools, pybind11 and nvcc;
no network, no git and no installation. What fails or takes too long is noted, and the next step
goes on. The results are in OUTPUT/device.json from the first step on, everything that the steps
print in OUTPUT/log.txt.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.device import plan, process
from benchmarks.device.plan import ROOT, Step
from benchmarks.device.record import Record, State

EXAMPLES = """examples:
  python -m benchmarks.device --commit $(git describe --always --dirty --abbrev=40)
  python -m benchmarks.device --plan                    the steps and their times, and nothing else
  python -m benchmarks.device build logits_grpo_loss    some of the steps
  python -m benchmarks.device training_step             a whole GRPO step, which must be asked for

The exit status is 1 when a step has failed, took too long or had no time.
"""
# Left for the table when the time is over.
RESERVE = 4.0
# With less a step would only show that it had too little.
LEAST_SECONDS = 5.0


class Interrupted(Exception):
    """A signal asks the run to end."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 and a message on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help="of those that --plan shows (default: all)")
    add("--output", type=Path, default=Path("device-results"), metavar="DIR",
        help="folder of the results (default: %(default)s)")  # fmt: skip
    add("--seconds", type=float, default=plan.SECONDS, metavar="S", help="for all (%(default)g)")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="default: %(default)s")
    add("--arch", default="90", help="to build for, as nvcc names it (%(default)s: H100, H200)")
    add(
        "--commit",
        metavar="NAME",
        help="where there is no git: what `git describe --always --dirty --abbrev=40` prints",
    )
    add(
        "--rivals",
        type=Path,
        default=ROOT / ".rivals",
        metavar="DIR",
        help="packages that `make device-rivals` has fetched (default: .rivals)",
    )
    add("--shapes", choices=("small", "full"), help="default: full on CUDA, small on the CPU")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes of the tests (%(default)s)")  # fmt: skip
    add("--plan", action="store_true", help="print the steps and their times, and end")
    options = parser.parse_args(arguments)
    for name in ("seconds", "workers"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be > 0, got {getattr(options, name):g}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output}: is a file, not a directory")
    return options


def lacking(step: Step) -> str:
    """Say what the step needs that is not there; empty where nothing lacks."""
    path = step.environment.get("PYTHONPATH")
    for need in step.needs:
        kind, name = need.split()
        if kind == "program":
            there = shutil.which(name) is not None
        else:
            there = importlib.util.find_spec(name) is not None or (
                path is not None and (Path(path) / name).is_dir()
            )
        if not there:
            return f"there is no {need}"
    return ""


class Run:
    """Steps one after the other, within the seconds that there are."""

    def __init__(self, steps: list[Step], output: Path, seconds: float) -> None:
        self.steps, self.log, self.seconds = steps, output / "log.txt", seconds
        self.record = Record(output / "device.json", steps)
        self._start = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds for the steps to come."""
        return self.seconds - RESERVE - (time.monotonic() - self._start)

    def all(self) -> None:
        """Run the steps; an interruption ends the one that runs, and the run."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.record.write()
        try:
            for i, step in enumerate(self.steps):
                state = self.record.states[step.name]
                self._one(step, state, sum(s.planned for s in self.steps[i:]))
                self.record.seconds = time.monotonic() - self._start
                self.record.write()
                note = f": {state.note}" if state.note else ""
                print(
                    f"[{self.record.seconds:4.0f} s] {step.name}: {state.status} in "
                    f"{state.seconds:.0f} s (planned {step.planned:.0f}){note}",
                    flush=True,
                )
                if step.decides and state.status != "passed":
                    self._skip_rest("there is nothing to run it on")
                    break
        except Interrupted as error:
            for state in self.record.states.values():
                if state.status == "running":
                    state.status, state.note = "interrupted", str(error)
            self._skip_rest(str(error))
        self.record.seconds = time.monotonic() - self._start
        self.record.write()

    def _skip_rest(self, note: str) -> None:
        for state in self.record.states.values():
            if state.status == "waiting":
                state.status, state.note = "skipped", note

    def _one(self, step: Step, state: State, planned_from_here: float) -> None:
        missing = lacking(step)
        if missing:
            state.status, state.note = "absent", missing
            return
        if self.left < LEAST_SECONDS:
            state.status, state.note = "skipped", "there was no time left"
            return
        state.status = "running"
        self.record.write()
        seconds = step.seconds(self.left, planned_from_here)
        command = [*step.command, *([f"{seconds:.0f}"] if step.shares_time else [])]
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n===== {step.name}: {' '.join(command)}\n")
        limit = min(step.limit, self.left)
        begin = time.monotonic()
        try:
            ended = process.run(
                command, folder=ROOT, environment=environment(step), log=self.log, limit=limit,
                meanwhile=lambda: self.record.read(step),
            )  # fmt: skip
        finally:
            state.seconds = round(time.monotonic() - begin, 1)
            self.record.read(step)
        if ended.status is None:
            state.status, state.note = "timed out", f"ended after {limit:.0f} s"
        elif ended.status:
            state.status = "failed"
            state.note = f"exit status {ended.status}: {ended.last_line}"
        else:
            state.status = "passed"


def environment(step: Step) -> dict[str, str]:
    """Variables of the step's processes: this tree's modules before the rivals'."""
    paths = [str(ROOT), step.environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
    return {
        **step.environment,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def interrupt(number: int, _frame: FrameType | None) -> None:
    """End the run where it is."""
    raise Interrupted(f"the run was ended by {signal.Signals(number).name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 1 unless all have passed."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="device-") as parts:
        shapes = options.shapes or ("small" if options.device == "cpu" else "full")
        everything = plan.steps(
            plan.Setting(
                options.device, Path(parts), options.arch, options.commit, options.rivals,
                options.workers, shapes,
            )
        )  # fmt: skip
        try:
            steps = plan.chosen(everything, options.steps)
        except ValueError as error:
            print(f"python -m benchmarks.device: {error}", file=sys.stderr)
            return 2
        if options.plan:
            print(f"{'step':<28} {'planned':>7} {'limit':>7}")
            for step in steps:
                print(f"{step.name:<28} {step.planned:>7.0f} {step.limit:>7.0f}  {lacking(step)}")
            print(f"{'':<28} {sum(step.planned for step in steps):>7.0f} {options.seconds:>7.0f}")
            return 0
        run = Run(steps, options.output, options.seconds)
        kept = {
            number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            run.all()
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
    print()
    print(run.record.table())
    print(f"\nresults: {run.record.target}")
    return 0 if run.record.ok else 1


if __name__ == "__main__":
    sys.exit(main())
