"""Selection of a checkpoint by the entropy of its critical tokens.

The Skywork-R1V3 report (section 5, figure 5) selects, without a benchmark, the checkpoint whose
critical reasoning tokens (see `critical_tokens`) have the highest entropy, and shows that this
follows validation accuracy. The correlation of the two is measured and written beside the choice.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from r1v3.config import Select
from r1v3.files import replace_directory, temporary_sibling, write_json
from r1v3.trainer.checkpoint import model_files
from r1v3.trainer.metrics import read_metrics

_ENTROPY_WINDOW = 5
Rule = Literal["critical_entropy", "validation_accuracy"]
_RULE_TEXT = {
    "critical_entropy": "highest mean entropy (nats) at critical tokens",
    "validation_accuracy": "highest validation accuracy",
}


@dataclass(frozen=True)
class CheckpointRecord:
    """The measurements of one checkpoint; None where a value is missing.

    Entropies are in nats, accuracies in [0, 1]; `validation_low` and `validation_high` bound the
    accuracy's confidence interval.
    """

    name: str
    step: int
    critical_entropy: float | None
    critical_entropy_after: float | None = None
    critical_tokens: int | None = None
    validation_accuracy: float | None = None
    validation_low: float | None = None
    validation_high: float | None = None


@dataclass(frozen=True)
class Selection:
    """The selected record among `records` (by step), the rule, and the reasons for exclusions.

    `spearman` and `pearson` correlate critical entropy with validation accuracy over the
    `correlated` checkpoints that have both; None for fewer than three, or if one is constant.
    """

    records: tuple[CheckpointRecord, ...]
    selected: CheckpointRecord
    rule: str
    spearman: float | None
    pearson: float | None
    correlated: int
    excluded: dict[str, str] = field(default_factory=dict)


def select_checkpoint(
    records: Sequence[CheckpointRecord],
    *,
    rule: Rule = "critical_entropy",
    tolerance: float = 0.0,
) -> Selection:
    """Select the checkpoint with the highest value of `rule`; among equals the latest.

    Args:
        tolerance: values this close to the highest count as equal to it (nats or accuracy).
    Raises:
        ValueError: an unknown rule, a negative tolerance, two records of one name, or no record
            with a value; gives the reason for each.
    """
    if rule not in _RULE_TEXT:
        raise ValueError(f"rule must be one of {', '.join(_RULE_TEXT)}, got {rule!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    records = sorted(records, key=lambda record: (record.step, record.name))
    names = [record.name for record in records]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"checkpoint names must differ; {sorted(twice)} occur more than once")
    excluded = {}
    values: list[tuple[float, CheckpointRecord]] = []
    for record in records:
        value = getattr(record, rule)
        reason = _why_not(record, rule, value)
        if reason:
            excluded[record.name] = reason
        else:
            values.append((value, record))
    if not values:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in excluded.items())
        raise ValueError(f"no checkpoint can be selected by {rule} ({reasons or 'none given'})")
    highest = max(value for value, _ in values)
    selected = [record for value, record in values if value >= highest - tolerance][-1]
    within = f", within {tolerance:g}" if tolerance else ""
    entropies, accuracies = _measured_pairs(records)
    return Selection(
        records=tuple(records),
        selected=selected,
        rule=f"{_RULE_TEXT[rule]}{within}; ties: later step",
        spearman=pearson(_ranks(entropies), _ranks(accuracies)),
        pearson=pearson(entropies, accuracies),
        correlated=len(entropies),
        excluded=excluded,
    )


def write_selection(run_dir: str | Path, selection: Selection) -> Path:
    """Write `<run_dir>/selection.json` atomically; return its path."""
    checkpoints: list[dict[str, Any]] = []
    for record in selection.records:
        checkpoints.append(asdict(record) | {"selected": record is selection.selected})
    path = Path(run_dir) / "selection.json"
    write_json(
        path,
        {
            "checkpoints": checkpoints,
            "rule": selection.rule,
            "spearman": selection.spearman,
            "pearson": selection.pearson,
            "correlated": selection.correlated,
            "excluded": selection.excluded,
        },
    )
    return path


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the correlation of two samples; None below three points or without variance."""
    if len(x) < 3 or min(x) == max(x) or min(y) == max(y):
        return None
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    centered_x, centered_y = [a - mean_x for a in x], [b - mean_y for b in y]
    norm_x, norm_y = math.hypot(*centered_x), math.hypot(*centered_y)
    if norm_x == 0 or norm_y == 0:
        return None
    # Normalized before multiplying: products of small numbers would underflow.
    pairs = zip(centered_x, centered_y, strict=True)
    return max(-1.0, min(1.0, math.fsum((a / norm_x) * (b / norm_y) for a, b in pairs)))


def _measured_pairs(records: Sequence[CheckpointRecord]) -> tuple[list[float], list[float]]:
    """The critical entropies and validation accuracies of the records that have both."""
    entropies, accuracies = [], []
    for record in records:
        entropy, accuracy = record.critical_entropy, record.validation_accuracy
        if _why_not(record, "critical_entropy", entropy) is None and entropy is not None:
            if _why_not(record, "validation_accuracy", accuracy) is None and accuracy is not None:
                entropies.append(entropy)
                accuracies.append(accuracy)
    return entropies, accuracies


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values get the mean of their ranks, as in Spearman's coefficient."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def _why_not(record: CheckpointRecord, rule: Rule, value: float | None) -> str | None:
    if rule == "critical_entropy" and record.critical_tokens == 0:
        return "it emitted no critical tokens"
    if value is None:
        return f"its {rule} was not measured"
    if not math.isfinite(value):
        return f"its {rule} is {value}"
    return None


def select_from_run(config: Select) -> str:
    """Select among the GRPO checkpoints of a run; return the name of the selected one.

    Writes selection.json and `models/selected`. The critical-token entropy of a checkpoint is the
    mean over the last training steps before it, weighted by the number of critical tokens in each.
    If no checkpoint emitted any, validation accuracy decides, and selection.json says so.
    """
    run = Path(config.run)
    lines = {line["step"]: line for line in read_metrics(run / "metrics" / "grpo.jsonl")}
    records = []
    for path in sorted((run / "checkpoints" / "grpo").glob("step-*")):
        step = int(path.name.removeprefix("step-"))
        line = lines.get(step, {})
        window = [lines[s] for s in range(step - _ENTROPY_WINDOW + 1, step + 1) if s in lines]
        records.append(
            CheckpointRecord(
                name=path.name,
                step=step,
                critical_entropy=_weighted(window, "critical_entropy"),
                critical_entropy_after=_weighted(window, "critical_entropy_after"),
                critical_tokens=sum(int(w.get("critical_tokens") or 0) for w in window),
                validation_accuracy=line.get("validation_accuracy"),
                validation_low=line.get("validation_low"),
                validation_high=line.get("validation_high"),
            )
        )
    rule = config.rule
    if rule == "critical_entropy" and all(r.critical_entropy is None for r in records):
        # A policy that never says "Wait" has no critical tokens to select by.
        rule = "validation_accuracy"
    selection = select_checkpoint(records, rule=rule)
    write_selection(run, selection)
    _publish_copy(run / "checkpoints" / "grpo" / selection.selected.name, run / "models/selected")
    return selection.selected.name


def _weighted(lines: list[dict[str, Any]], key: str) -> float | None:
    pairs = [
        (line[key], line["critical_tokens"])
        for line in lines
        if line.get(key) is not None and line.get("critical_tokens")
    ]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _publish_copy(source: Path, target: Path) -> None:
    """Copy the model of a checkpoint, without the trainer's files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = temporary_sibling(target)
    temporary.mkdir()
    for file in model_files(source):
        shutil.copyfile(file, temporary / file.name)
    replace_directory(temporary, target)
