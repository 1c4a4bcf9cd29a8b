"""The one document of a run on a device, and its short table.

Schema version 1:

    {"schema": 1, "benchmark": "device", "date", "seconds", "header": {...}, "probes": {...},
     "steps": [{"name", "status", "note", "planned", "limit", "seconds"}],
     "tests": {...}, "racecheck": {...}, "training_step": {...},
     "ops": {op: {"problems", "failed", "skipped"}}}

A status is "waiting", "running", "passed", "failed", "timed out", "interrupted", "skipped" (there
was no time) or "absent" (something that the step needs is not there). What a step has written so
far is in the document while it runs, and stays there however it ends.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.device.plan import MACHINE, Step
from r1v3 import files

SCHEMA = 1
GOOD = ("passed", "absent")
# Steps that are no op.
SINGLE = ("probes", "tests", "racecheck", "training_step")


@dataclass
class State:
    """The end of a step, or how far it is."""

    name: str
    planned: float
    limit: float
    status: str = "waiting"
    note: str = ""
    seconds: float = 0.0


class Record:
    """The document, written again whenever one of the results has changed."""

    def __init__(self, target: Path, steps: list[Step]) -> None:
        self.target, self.steps = target, steps
        self.states = {s.name: State(s.name, s.planned, s.limit) for s in steps}
        self.seconds = 0.0
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._parts: dict[str, dict[str, Any]] = {}
        self._changed: dict[str, int] = {}

    @property
    def ok(self) -> bool:
        """Whether no step has failed, or had no time."""
        return all(state.status in GOOD for state in self.states.values())

    def read(self, step: Step) -> None:
        """Take over what the step has written, if it is new, and write the document."""
        if step.result is None:
            return
        try:
            changed = step.result.stat().st_mtime_ns
            if self._changed.get(step.name) == changed:
                return
            self._parts[step.name] = files.read_json_object(step.result)
        except (OSError, ValueError):
            return
        self._changed[step.name] = changed
        self.write()

    def part(self, name: str) -> dict[str, Any]:
        """The document that a step has written so far."""
        return self._parts.get(name, {})

    def document(self) -> dict[str, Any]:
        """The JSON document."""
        named = {name: dict(part) for name, part in self._parts.items()}
        facts = named.pop(MACHINE, {})
        for part in named.values():
            part.pop("header", None)  # the machine's, once more
            part.pop("schema", None)
        singles = {name: named.pop(name) for name in SINGLE if name in named}
        return {
            "schema": SCHEMA,
            "benchmark": "device",
            "date": self._date,
            "seconds": round(self.seconds, 1),
            "header": facts.get("header", {}),
            "steps": [asdict(state) for state in self.states.values()],
            **singles,
            "ops": named,
        }

    def write(self) -> None:
        """Write the document, complete or not at all."""
        files.write_json(self.target, self.document())

    def table(self) -> str:
        """Steps, failed tests and r1v3's times, at most 100 columns wide."""
        lines = [f"{'step':<28} {'status':<12} {'seconds':>7} {'planned':>7}  note"]
        for state in self.states.values():
            lines.append(
                f"{state.name:<28} {state.status:<12} {state.seconds:>7.0f} "
                f"{state.planned:>7.0f}  {state.note}"[:160].rstrip()
            )
        for test in self.part("tests").get("failed", [])[:20]:
            lines.append(f"failed: {test['test']}: {test['message']}"[:160])
        rows = [
            row
            for name, part in self._parts.items()
            for problem in part.get("problems", [])
            if (row := _row(problem)) is not None and name in self.states
        ]
        if rows:
            lines += ["", f"{'op, mode and shape':<56} {'r1v3':>9} {'% best':>7} "
                      f"{'x eager':>7} {'x compile':>9}  next best"]  # fmt: skip
            lines += rows
        return "\n".join(lines)


def _row(problem: Mapping[str, Any]) -> str | None:
    """One problem's line; its "% best" is of a copy, sum or matrix product of the same work."""
    shape = " ".join(f"{name}={size}" for name, size in problem["shape"].items())
    title = f"{problem['op']} {problem['mode'].replace('forward+backward', 'both')} {shape}"
    by_name = {i["implementation"]: i for i in problem["implementations"]}
    ours = by_name.get("r1v3")
    if ours is None or ours["timing"] is None:
        return f"{title:<56} {(ours or {}).get('note', 'no result')}"[:160]
    others = [i for name, i in by_name.items() if not name.startswith(("r1v3", "torch"))]
    timed = [i for i in others if i["timing"] is not None]
    best = min(timed, key=lambda i: i["timing"]["median"], default=None)
    rival = "" if best is None else f"{best['implementation']} {best['times_ours']:.2f} x"
    host = " (waits for the host)" if ours["timing"]["late"] else ""
    return (
        f"{title:<56} {_duration(ours['timing']['median']):>9} "
        f"{ours['percent_of_yardstick']:>7.0f} {_factor(ours['over_eager']):>7} "
        f"{_factor(ours['over_compile']):>9}  {rival}{host}"
    ).rstrip()


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _duration(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"
