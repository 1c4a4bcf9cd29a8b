"""Reading a run folder that may be incomplete: a run can stop at any moment.

Every reader returns what is there; what is not there, or cannot be read, is named in `missing`.
The text in these files comes from models and data sets and is untrusted.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from r1v3.config import Monitor
from r1v3.evaluation.statistics import Correlation, Gain, Score, correlation

Record = dict[str, Any]
T = TypeVar("T")

STAGES = ("base", "sft", "grpo", "selected", "connector")
STAGE_NAMES = {
    "base": "Before training",
    "sft": "Cold-start SFT",
    "grpo": "GRPO",
    "selected": "Selected checkpoint",
    "connector": "Connector-only tuning",
}


@dataclass(frozen=True)
class RunFolder:
    """The content of one run folder. Absent parts are empty; `missing` says which, for a reader.

    high_entropy_nats: above this entropy GRPO counted a token in `high_entropy_share`.
    """

    path: Path
    config: str = ""
    environment: Record = field(default_factory=dict)
    summary: Record = field(default_factory=dict)
    selection: Record = field(default_factory=dict)
    sft: list[Record] = field(default_factory=list)
    grpo: list[Record] = field(default_factory=list)
    connector: list[Record] = field(default_factory=list)
    histogram_edges: list[float] = field(default_factory=list)
    high_entropy_nats: float = Monitor().high_entropy_nats
    transcripts: dict[str, list[Record]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def number(value: object) -> float | None:
    """`value` as a finite float, or None for anything else (null, NaN, text, a bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:  # JSON integers have no upper bound
        return None
    return result if math.isfinite(result) else None


def series(records: list[Record], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, in order of step, without the lines that lack it."""
    points = [(number(r.get("step")), number(r.get(key))) for r in records]
    kept = sorted((s, v) for s, v in points if s is not None and v is not None)
    return [s for s, _ in kept], [v for _, v in kept]


def read_score(value: object) -> Score | None:
    """A Score from its dict in summary.json; None when a number is absent or not finite."""
    if not isinstance(value, dict):
        return None
    numbers = {key: number(value.get(key)) for key in Score.__dataclass_fields__}
    if any(v is None for v in numbers.values()):
        return None
    accuracy, low, high, questions, samples, tokens = (v or 0.0 for v in numbers.values())
    return Score(accuracy, low, high, int(questions), int(samples), tokens)


def read_gain(value: object) -> Gain | None:
    """A Gain from its dict in summary.json; None when a number is absent or not finite."""
    if not isinstance(value, dict):
        return None
    numbers = {key: number(value.get(key)) for key in Gain.__dataclass_fields__}
    if any(v is None for v in numbers.values()):
        return None
    mean, low, high, questions, samples = (v or 0.0 for v in numbers.values())
    return Gain(mean, low, high, int(questions), int(samples))


def stage_names(summary: Record) -> list[str]:
    """Stages in the summary, in the order of the recipe, unknown ones last."""
    stages = summary.get("stages")
    present = list(stages) if isinstance(stages, dict) else []
    if isinstance(summary.get("base"), dict) and "base" not in present:
        present.append("base")
    return [s for s in STAGES if s in present] + sorted(set(present) - set(STAGES))


def stage_modes(summary: Record, stage: str) -> Record:
    """Decoding mode -> {"in_domain", "out_of_domain", "domains"} of one stage; {} if absent."""
    stages = summary.get("stages")
    entry = stages.get(stage) if isinstance(stages, dict) else None
    if entry is None and stage == "base":
        entry = summary.get("base")
    modes = entry.get("modes") if isinstance(entry, dict) else None
    return (
        {k: v for k, v in modes.items() if isinstance(v, dict)} if isinstance(modes, dict) else {}
    )


@dataclass(frozen=True)
class Checkpoint:
    """One candidate of the selection. Entropies in nats, accuracies in [0, 1]."""

    step: float
    entropy: float
    entropy_after: float | None
    accuracy: float
    low: float
    high: float
    selected: bool


def checkpoints(selection: Record) -> list[Checkpoint]:
    """Candidates of selection.json that have a step, an entropy and an accuracy, by step."""
    found = []
    entries = selection.get("checkpoints")
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        step, entropy = number(entry.get("step")), number(entry.get("critical_entropy"))
        accuracy = number(entry.get("validation_accuracy"))
        if step is None or entropy is None or accuracy is None:
            continue
        low, high = number(entry.get("validation_low")), number(entry.get("validation_high"))
        found.append(
            Checkpoint(
                step,
                entropy,
                number(entry.get("critical_entropy_after")),
                accuracy,
                accuracy if low is None else low,
                accuracy if high is None else high,
                entry.get("selected") is True,
            )
        )
    return sorted(found, key=lambda c: c.step)


def entropy_correlation(found: list[Checkpoint]) -> Correlation:
    """Correlation over checkpoints of critical-token entropy with validation accuracy."""
    return correlation([c.entropy for c in found], [c.accuracy for c in found])


def read_run(run_dir: str | Path) -> RunFolder:
    """Read everything a run left in `run_dir`. Raises ValueError when it is not a folder."""
    path = Path(run_dir)
    if not path.is_dir():
        raise ValueError(f"run_dir is {str(path)!r}, which is not a folder; give a run's folder")
    missing: list[str] = []
    config = _read(path / "config.yaml", str, missing) or ""
    metrics = {
        stage: _read(path / "metrics" / f"{stage}.jsonl", _json_lines, missing) or []
        for stage in ("sft", "grpo", "connector")
    }
    edges = _read(path / "metrics" / "entropy_histogram_edges.json", _json_list, missing) or []
    grpo_config = _read(path / "config" / "grpo.yaml", _yaml_mapping, missing) or {}
    monitor = grpo_config.get("monitor")
    threshold = number(monitor.get("high_entropy_nats")) if isinstance(monitor, dict) else None
    transcripts = {
        file.stem: [t for t in _read(file, _json_list, missing) or [] if isinstance(t, dict)]
        for file in sorted((path / "transcripts").glob("*.json"))
    }
    if not transcripts:
        missing.append("transcripts: none were written")
    return RunFolder(
        path=path,
        config=config,
        environment=_read(path / "environment.json", _json_object, missing) or {},
        summary=_read(path / "summary.json", _json_object, missing) or {},
        selection=_read(path / "selection.json", _json_object, missing) or {},
        histogram_edges=[e for e in map(number, edges) if e is not None],
        high_entropy_nats=Monitor().high_entropy_nats if threshold is None else threshold,
        transcripts=transcripts,
        missing=missing,
        **metrics,
    )


def _read(file: Path, parse: Callable[[str], T], missing: list[str]) -> T | None:
    inside = file.parent.name in ("config", "metrics")
    name = f"{file.parent.name}/{file.name}" if inside else file.name
    try:
        return parse(file.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        missing.append(f"{name}: not written")
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{name}: cannot be read ({error})")
    return None


def _json_object(text: str) -> Record:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _yaml_mapping(text: str) -> Record:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(value, dict):
        raise ValueError("not a YAML mapping")
    return value


def _json_list(text: str) -> list[Any]:
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError("not a JSON list")
    return value


def _json_lines(text: str) -> list[Record]:
    """Objects of a JSONL file. A line cut off by an interrupted run is left out."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
