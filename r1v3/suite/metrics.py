"""From outcomes to a score with its interval, and to the gain of one checkpoint over another.

Outcomes are [questions, samples] of 0/1. Units are what is drawn as one when a benchmark is
written: a question, the rotations of one, a set of questions on one figure. Each component of a
score is a ratio of sums over units; the score is the mean of its components.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from r1v3.evaluation import statistics
from r1v3.suite.question import Question

RESAMPLES = 2000
_SEED = 20250708


@dataclass(frozen=True)
class Units:
    """Outcomes by unit.

    Attributes:
        right: float64 [units, samples, components], sums of what is right.
        of: float64 [units, components], what they are out of.
        components: names.
    """

    right: np.ndarray
    of: np.ndarray
    components: tuple[str, ...] = ("accuracy",)


Grouping = Callable[[Sequence[Question], np.ndarray], Units]


@dataclass(frozen=True)
class Measured:
    """A score in [0, 1] with its 95 % interval; `parts` are its components."""

    value: float
    low: float
    high: float
    units: int
    samples: int
    parts: dict[str, float]


def each_question(questions: Sequence[Question], outcomes: np.ndarray) -> Units:
    """Every question is a unit: plain accuracy."""
    return Units(outcomes[:, :, None].astype(np.float64), np.ones((len(questions), 1)))


def groups_of(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Numbers of the questions of every unit, in order of their first question."""
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(question.unit or question.id, []).append(i)
    return groups


def all_of_each_unit(questions: Sequence[Question], outcomes: np.ndarray) -> Units:
    """A unit is right if all its questions are."""
    rows = [outcomes[places].min(axis=0) for places in groups_of(questions).values()]
    return Units(np.stack(rows)[:, :, None].astype(np.float64), np.ones((len(rows), 1)))


def measure(units: Units) -> Measured:
    """Score units, averaged over samples.

    Plain 0/1 outcomes of equal weight have Wilson's interval, clustered by unit (`statistics`);
    others the percentile interval of 2,000 bootstrap samples of units, always the same ones.
    """
    count, samples, _ = units.right.shape
    values = _ratios(units, np.ones((1, count)))[0]
    value = float(values.mean())
    plain = len(units.components) == 1 and (units.of == 1).all()
    if plain and np.isin(units.right, (0.0, 1.0)).all():
        scored = statistics.score(units.right[:, :, 0], np.zeros((count, samples)))
        low, high = scored.low, scored.high
    else:
        spread = _ratios(units, _resamples(count)).mean(axis=1)
        low, high = _interval(spread, value, count, least=0.0)
    parts = dict(zip(units.components, (float(v) for v in values), strict=True))
    return Measured(value, low, high, count, samples, parts)


def gain(before: Units, after: Units) -> Measured:
    """Score of `after` minus that of `before` on the same units, with its interval.

    Raises:
        ValueError: they have not the same number of units.
    """
    if len(before.right) != len(after.right):
        raise ValueError(
            f"a gain needs the same questions on both sides: {len(before.right)} and "
            f"{len(after.right)} units"
        )
    count = len(before.right)
    plain = len(before.components) == 1 and (before.of == 1).all()
    binary = all(np.isin(units.right, (0.0, 1.0)).all() for units in (before, after))
    values = [_ratios(units, np.ones((1, count)))[0] for units in (before, after)]
    parts = {name: float(b - a) for name, a, b in zip(before.components, *values, strict=True)}
    samples = min(before.right.shape[1], after.right.shape[1])
    if plain and binary:
        found = statistics.paired_gain(before.right[:, :, 0], after.right[:, :, 0])
        return Measured(found.mean, found.low, found.high, count, samples, parts)
    weights = _resamples(count)
    spread = (_ratios(after, weights) - _ratios(before, weights)).mean(axis=1)
    mean = float((values[1] - values[0]).mean())
    low, high = _interval(spread, mean, count, least=-1.0)
    return Measured(mean, low, high, count, samples, parts)


def _interval(spread: np.ndarray, value: float, count: int, *, least: float) -> tuple[float, float]:
    """Percentiles of a bootstrap around a value in [least, 1].

    Where all units are alike the bootstrap says nothing; then it is as far as `statistics` goes
    for a gain: Wilson's upper bound for zero events in as many trials.
    """
    if np.ptp(spread) < 1e-12:
        half = statistics.zero_event_bound(count)
        return max(value - half, least), min(value + half, 1.0)
    low, high = (float(q) for q in np.quantile(spread, (0.025, 0.975)))
    return min(low, value), max(high, value)


def _ratios(units: Units, weights: np.ndarray) -> np.ndarray:
    """Components [B, C] under weights [B, units]."""
    right = weights @ units.right.mean(axis=1)
    of = weights @ units.of
    return np.divide(right, of, out=np.zeros_like(right), where=of > 0)


def _resamples(count: int) -> np.ndarray:
    """Number of times that each of `count` units is drawn, [RESAMPLES, count]."""
    drawn = np.random.default_rng(_SEED).multinomial(
        count, np.full(count, 1 / count), size=RESAMPLES
    )
    return drawn.astype(np.float64)
