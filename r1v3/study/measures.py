"""The values that a finding compares: of answers, question by question, or of training steps."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1v3.config import Comparison, Side
from r1v3.evaluation.statistics import Score, score
from r1v3.report.run_folder import number
from r1v3.study.plan import Plan, Run
from r1v3.trainer.metrics import read_metrics

# Neighboring steps resemble each other; so many blocks of them count as independent.
BLOCKS = 8


def values(plan: Plan, side: Side, seed: int, finding: Comparison) -> np.ndarray | None:
    """Return what a side of a comparison measured with one seed; None where it was not.

    Returns:
        float64 [questions, samples]; of training steps [blocks, 1], the means over blocks of steps.
    """
    run = plan.run(side.arm, seed, side.stage)
    if run.verb == "eval":
        return answer_values(run, side.mode, finding.of, finding.where)
    return step_values(run, finding.of, side.part)


def answer_values(run: Run, mode: str, of: str, where: str) -> np.ndarray | None:
    """Return one measure of the answers of an evaluation, [questions, samples]."""
    record = evaluation(run)
    kind, _, limit = mode.partition("-")
    answers = record.get("answers", {}).get("slow" if kind == "cut" else mode)
    if answers is None or of not in answers:
        return None
    found = _array(answers[of])
    if kind == "cut":
        # What a response of up to so many tokens would have held of this one.
        tokens = _array(answers["tokens"])
        whole = tokens <= int(limit)
        found = np.minimum(tokens, int(limit)) if of == "tokens" else np.where(whole, found, 0.0)
    return found[questions_of(run, where)]


def questions_of(run: Run, where: str) -> np.ndarray:
    """Return the mask [questions] of those in domain, out of domain, or of a domain or difficulty.

    Raises:
        ValueError: no question is of that kind.
    """
    facts = evaluation(run)["questions"]
    domains = np.array([str(domain) for domain in facts["domain"]])
    difficulties = np.array([str(one) for one in facts["difficulty"]])
    outside = np.isin(domains, list(run.config.out_of_domain))
    named = {
        "all": np.ones(len(domains), dtype=bool),
        "in_domain": ~outside,
        "out_of_domain": outside,
    }
    mask = named.get(where, (domains == where) | (difficulties == where))
    if not mask.any():
        known = sorted({*named, *domains, *difficulties} - {"None"})
        raise ValueError(f"no question of {run.key} is of {where!r}; known: {', '.join(known)}")
    return mask


def mode_score(run: Run, mode: str, where: str) -> Score | None:
    """Return accuracy and mean tokens of a mode with their interval, or None."""
    correct = answer_values(run, mode, "correct", where)
    tokens = answer_values(run, mode, "tokens", where)
    return None if correct is None or tokens is None else score(correct, tokens)


def step_values(run: Run, of: str, part: tuple[float, float]) -> np.ndarray | None:
    """Return the means of a metric over blocks of the steps in a part of a stage, [blocks, 1].

    A block without a value is NaN; without any the result is None.
    """
    lines = metric_lines(run)
    first, last = round(part[0] * len(lines)), round(part[1] * len(lines))
    found = [number(line.get(of)) for line in lines[first:last]]
    if not any(value is not None for value in found):
        return None
    blocks = np.array_split(np.array(found, dtype=np.float64), min(BLOCKS, len(found)))
    means = [block[np.isfinite(block)].mean() if np.isfinite(block).any() else np.nan
             for block in blocks]  # fmt: skip
    return np.array(means)[:, None]


def series(run: Run, of: str) -> tuple[list[float], list[float]]:
    """Return the steps of a training run with a metric, and its values."""
    pairs = [(line["step"], number(line.get(of))) for line in metric_lines(run)]
    return [s for s, v in pairs if v is not None], [v for _, v in pairs if v is not None]


def metric_lines(run: Run) -> list[dict[str, Any]]:
    """Return the metrics of a training run, step by step; none where it has not run."""
    try:
        return _metric_lines(*_version(run.folder / "metrics" / f"{run.verb}.jsonl"))
    except FileNotFoundError:
        return []


def evaluation(run: Run) -> dict[str, Any]:
    """Return the record of an evaluation; empty where it has not run."""
    try:
        return _record(*_version(run.folder / "evaluation" / f"{run.config.name}.json"))
    except FileNotFoundError:
        return {}


def checkpoint_pairs(
    select: Run, scores: Sequence[tuple[int, Run]], of: str, where: str
) -> tuple[list[float | None], list[float | None]]:
    """Return a measure of the selection and the accuracy of each checkpoint that was scored."""
    try:
        selection = _record(*_version(select.folder / "selection.json"))
    except FileNotFoundError:
        return [], []
    measured = {entry["step"]: entry.get(of) for entry in selection["checkpoints"]}
    found = [(measured.get(step), mode_score(run, "slow", where)) for step, run in scores]
    return [m for m, _ in found], [None if s is None else s.accuracy for _, s in found]


def _array(rows: list[list[float | None]]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def _version(file: Path) -> tuple[Path, int]:
    """A file and when it was written, by which what was read of it is kept."""
    return file.resolve(), file.stat().st_mtime_ns


@functools.lru_cache(maxsize=64)
def _metric_lines(file: Path, written: int) -> list[dict[str, Any]]:
    return read_metrics(file)


@functools.lru_cache(maxsize=64)
def _record(file: Path, written: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
