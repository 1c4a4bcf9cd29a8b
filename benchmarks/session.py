"""One run of benchmarks, whose results are in the file after every problem.

The JSON document, schema version 1:

    {"schema": 1, "header": {...}, "problems": [{"op", "mode", "shape", "dtype", "bytes", "flops",
     "yardstick", "yardstick_timing", "implementations": [fields of runner.Result],
     "absent": {label: reason}}], "failed": [{"op", "mode", "shape", "error"}],
     "skipped": [{"op", "mode", "shape"}]}

Times are seconds, memory is bytes. A problem has failed where no result could be had of any
implementation, and is skipped where the time was over.
"""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers, runner
from benchmarks.ops import OPS
from benchmarks.problem import Mode, Size
from r1v3 import files

SCHEMA = 1
SECONDS_PER_TASK: dict[Size, float] = {"small": 0.5, "full": 2.0}
Case = tuple[str, Mode, dict[str, int]]


class Session:
    """Measures problems one after the other.

    Args:
        header: from `machine.header`.
        projects: rivals, as `peers` names them.
        compiled: whether torch.compile is a rival too.
        target: the file, written after every problem, or None.

    Attributes:
        reports: of the problems, and for each the rivals that were absent, by reason.
    """

    def __init__(
        self,
        header: dict[str, Any],
        projects: list[str],
        seconds_per_task: float,
        *,
        compiled: bool = True,
        target: Path | None = None,
    ) -> None:
        self.header, self.projects, self.seconds_per_task = header, projects, seconds_per_task
        self.compiled, self.target = compiled, target
        self._start = time.perf_counter()
        self.reports: list[tuple[runner.ProblemReport, dict[str, str]]] = []
        self.failed: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []

    def has_time(self, seconds: float | None) -> bool:
        """Whether another problem, of the mean length, would end within so many seconds."""
        elapsed, done = time.perf_counter() - self._start, len(self.reports) + len(self.failed)
        return seconds is None or done == 0 or elapsed * (done + 1) / done <= seconds

    def measure(self, case: Case) -> tuple[runner.ProblemReport, dict[str, str]] | None:
        """The report and the absent rivals, or None where the problem has failed."""
        (op, mode, shape), device = case, self.header["device"]
        if device != "cpu":
            torch.cuda.empty_cache()
        try:
            found, absent = peers.find(op, mode, device, self.projects)
            problem = OPS[op].problem(shape, mode, device)
            done = runner.run(problem, found, device, self.seconds_per_task, compiled=self.compiled)
        except Exception as error:  # noqa: BLE001 - the other problems' results count all the same
            self.failed.append({**_named(case), "error": runner.first_line(error)})
            self._write()
            return None
        self.reports.append((done, absent))
        self._write()
        return done, absent

    def skip(self, case: Case) -> None:
        """Note that there was no time for this problem."""
        self.skipped.append(_named(case))
        self._write()

    @property
    def wrong(self) -> list[str]:
        """Titles of the problems that r1v3's own kernel failed."""
        titles = [done.problem.title for done, _ in self.reports if not done.sound]
        return titles + [f"{x['op']} {x['mode']}, {x['shape']}: {x['error']}" for x in self.failed]

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        problems = [{**done.as_json(), "absent": absent} for done, absent in self.reports]
        return {
            "schema": SCHEMA,
            "header": self.header,
            "problems": problems,
            "failed": self.failed,
            "skipped": self.skipped,
        }

    def _write(self) -> None:
        if self.target is not None:
            files.write_json(self.target, self.document())


def cases(ops: list[str], device: str, size: Size) -> list[Case]:
    """The problems of these ops, by shape before mode."""
    return [
        (op, mode, shape)
        for op in ops
        for shape in OPS[op].shapes(device, size)
        for mode in OPS[op].MODES
    ]


def _named(case: Case) -> dict[str, Any]:
    op, mode, shape = case
    return {"op": op, "mode": mode, "shape": shape}
