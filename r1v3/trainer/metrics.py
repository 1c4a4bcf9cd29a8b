"""Metrics of training steps: one line of JSON each, and the same numbers as TensorBoard events.

`<run>/metrics/<stage>.jsonl` is the record: `{"step": 7, "loss": 0.31, ...}`, one strict JSON
object per line, steps increasing. A run that was killed and resumed leaves the same file as one
that was not, except for keys that start with "seconds" (wall-clock time) or "machine_" (speed and
device readings). TensorBoard events under `<run>/tensorboard/<stage>`, and a run of Weights &
Biases if configured, show the same numbers.
"""

import json
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from r1v3.files import json_text, write_bytes
from r1v3.trainer.wandb_run import WandbRun

MACHINE_PREFIXES = ("seconds", "machine_")
HISTOGRAM_SUFFIX = "_histogram"


class MetricsLogger:
    """A writer of the metrics of one stage of one run.

    Args:
        run_dir: folder of the run, in which `metrics/` and `tensorboard/` are created.
        stage: name of the stage, such as "grpo"; letters, digits, ".", "_" and "-".
        resume_after: step of the checkpoint that training resumes from; lines of later steps, and
            a last line cut short by a kill, are dropped first. None starts over: the file of an
            earlier attempt is moved to `<stage>.jsonl.previous`.
        tensorboard: also write TensorBoard events.
        histogram_edges: for a key ending in "_histogram", the n + 1 bin edges of its n counts;
            without an entry the edges are 0, 1, 2, ...
        wandb_project: also log to this project of Weights & Biases; see `WandbRun`.
    Raises:
        ValueError: a bad stage name, or an existing file that is not a metrics file.
        ImportError: `wandb_project` is given and wandb is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        *,
        resume_after: int | None = None,
        tensorboard: bool = True,
        histogram_edges: Mapping[str, Sequence[float]] | None = None,
        wandb_project: str | None = None,
    ) -> None:
        if not re.fullmatch(r"\w[\w.-]*", stage, flags=re.ASCII):
            raise ValueError(
                f'stage {stage!r} must be letters, digits, ".", "_" or "-", such as "grpo"'
            )
        self.path = Path(run_dir) / "metrics" / f"{stage}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._wandb: WandbRun | None = None
        if wandb_project is not None:
            self._wandb = WandbRun(
                wandb_project, Path(run_dir), stage, resuming=resume_after is not None
            )
        self._last_step = _prepare(self.path, resume_after)
        self._histogram_edges = dict(histogram_edges or {})
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first_step = 0 if resume_after is None else resume_after + 1
            folder = Path(run_dir) / "tensorboard" / stage
            # purge_step makes TensorBoard hide what an earlier attempt wrote from there on.
            self._events = SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)
        self._file: Any = open(self.path, "ab")

    def log(self, step: int, values: Mapping[str, float | int | list[Any] | None]) -> None:
        """Append one line and flush it to the operating system, so that kill -9 cannot lose it.

        Args:
            step: greater than every step logged before.
            values: numbers, lists of numbers, or None; NaN and infinities are written as null.
        Raises:
            ValueError: a closed logger, a step out of order, or a value of another kind.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step {step} was logged after step {self._last_step} in {self.path}; "
                "log each step once, in increasing order"
            )
        for key, value in values.items():
            _check_value(key, value, self._histogram_edges.get(key))
        self._file.write((json_text({"step": step, **values}) + "\n").encode())
        self._file.flush()
        self._last_step = step
        if self._events is not None:
            for key, value in values.items():
                self._write_event(self._events, step, key, value)
        if self._wandb is not None:
            self._wandb.log(step, values)

    def close(self) -> None:
        """Flush and close both outputs; may be called twice."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_event(self, events: Any, step: int, key: str, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            if key.endswith(HISTOGRAM_SUFFIX) and sum(value) > 0:
                edges = self._histogram_edges.get(key, range(len(value) + 1))
                events.add_histogram_raw(key, global_step=step, **_raw_histogram(value, edges))
        elif value is not None and math.isfinite(value):
            events.add_scalar(key, float(value), global_step=step)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file in order, without a last line that is cut short.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line that is not a JSON object with an integer "step"; names the line.
    """
    return [record for record, _ in _read_lines(Path(path))]


def comparable(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `lines` without the machine's values; two runs of the same seed agree on the rest."""
    return [
        {key: value for key, value in line.items() if not key.startswith(MACHINE_PREFIXES)}
        for line in lines
    ]


def _prepare(path: Path, resume_after: int | None) -> int | None:
    """Drop the lines that a resumed run will write again; return the last step that is kept."""
    if not path.exists():
        return None
    if resume_after is None:
        if path.stat().st_size:
            os.replace(path, path.with_name(f"{path.name}.previous"))
        return None
    kept = [(record, raw) for record, raw in _read_lines(path) if record["step"] <= resume_after]
    content = b"".join(raw + b"\n" for _, raw in kept)
    if content != path.read_bytes():
        write_bytes(path, content)
    return kept[-1][0]["step"] if kept else None


def _read_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    raw_lines = path.read_bytes().split(b"\n")
    cut_short = raw_lines.pop()
    lines = []
    for number, raw in enumerate([*raw_lines, cut_short], start=1):
        is_cut_short = number > len(raw_lines)
        try:
            record = json.loads(raw)
        except ValueError as error:
            if is_cut_short:
                break
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            if is_cut_short:
                break
            raise ValueError(f'{path} line {number} must be an object with an integer "step"')
        lines.append((record, raw))
    return lines


def _check_value(key: str, value: Any, edges: Sequence[float] | None) -> None:
    if key == "step":
        raise ValueError('values must not hold the key "step"; pass it as the first argument')
    items = value if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if item is not None and not isinstance(item, numbers.Real):
            raise ValueError(
                f"metric {key!r} is {item!r} ({type(item).__name__}); it must be a number, "
                "a list of numbers or None (use .item() on a tensor)"
            )
    if key.endswith(HISTOGRAM_SUFFIX) and isinstance(value, (list, tuple)):
        if not all(isinstance(item, numbers.Integral) and int(item) >= 0 for item in value):
            raise ValueError(f"metric {key!r} must be counts per bin (integers >= 0), got {value}")
        if edges is not None and len(edges) != len(value) + 1:
            raise ValueError(
                f"metric {key!r} has {len(value)} bins, which need {len(value) + 1} edges, "
                f"got {len(edges)}"
            )


def _raw_histogram(counts: Sequence[int], edges: Sequence[float]) -> dict[str, Any]:
    centers = [(low + high) / 2 for low, high in zip(edges[:-1], edges[1:], strict=True)]
    filled = [index for index, count in enumerate(counts) if count]
    return {
        "min": float(edges[filled[0]]),
        "max": float(edges[filled[-1] + 1]),
        "num": sum(counts),
        "sum": sum(c * n for c, n in zip(centers, counts, strict=True)),
        "sum_squares": sum(c * c * n for c, n in zip(centers, counts, strict=True)),
        # TensorBoard wants upper limits; an empty first bin carries the lower edge of the first.
        "bucket_limits": [float(edge) for edge in edges],
        "bucket_counts": [0, *counts],
    }
