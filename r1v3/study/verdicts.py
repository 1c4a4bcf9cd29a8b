"""The verdict of each finding, from an interval and from nothing else.

Differences are paired: by question for answers (all samples of a question are averaged first), by
block of steps for metrics of training. Those of all seeds are pooled; the interval is 95 %. A claim
that something is higher is `seen` where the interval lies above zero, `opposite` where it lies
below, and `not seen` where it holds zero; lower is the mirror image. That two are equal is `seen`
where the interval lies within the margin on both sides of zero, `opposite` where it lies outside.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from r1v3.config import Comparison, RankCorrelation, Side
from r1v3.evaluation.statistics import Gain, paired_difference, paired_gain, pooled_spearman
from r1v3.study.measures import checkpoint_pairs, values
from r1v3.study.plan import Plan, Run

SEEN, NOT_SEEN, OPPOSITE, UNMEASURED = "seen", "not seen", "opposite", "not measured"


@dataclass(frozen=True)
class Finding:
    """A claim of the report beside what was measured.

    Attributes:
        claim, report: what the report says, and its numbers.
        compared: what is compared, in words.
        values: the means of `than` and of `this`, or nothing for a correlation.
        mean, low, high: difference or correlation with its interval; None where unbounded.
        count: pairs.
        seeds: the same of each seed alone, by seed.
        verdict: see the module.
        percent: whether the numbers are fractions that are shown in percent.
    """

    claim: str
    report: str
    compared: str
    values: tuple[float, float] | None
    mean: float | None
    low: float | None
    high: float | None
    count: int
    seeds: dict[int, dict[str, Any]]
    verdict: str
    percent: bool


def find_all(plan: Plan) -> list[Finding]:
    """Judge every finding of a study."""
    compared = [_compare(plan, one) for one in plan.study.findings]
    return compared + [_correlate(plan, one) for one in plan.study.correlations]


def verdict(expect: str, low: float | None, high: float | None, margin: float | None = None) -> str:
    """Return the verdict that follows from an interval; an end that is None is unbounded."""
    least, most = -np.inf if low is None else low, np.inf if high is None else high
    if expect == "equal":
        assert margin is not None
        if -margin <= least and most <= margin:
            return SEEN
        return OPPOSITE if least > margin or most < -margin else NOT_SEEN
    if expect == "lower":
        least, most = -most, -least
    return SEEN if least > 0 else OPPOSITE if most < 0 else NOT_SEEN


def _compare(plan: Plan, one: Comparison) -> Finding:
    pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for seed in plan.study.seeds:
        than, this = values(plan, one.than, seed, one), values(plan, one.this, seed, one)
        if than is not None and this is not None:
            pairs[seed] = _same_blocks(than, this)
    compared = f"{one.of.replace('_', ' ')}: {describe(one.this)} against {describe(one.than)}"
    if _of_answers(plan, one):
        compared += f", {one.where.replace('_', ' ')}"
    percent = one.of in ("correct", "high_entropy_share", "repetition", "truncated") or (
        one.of.endswith("accuracy")
    )
    if len(pairs) < len(plan.study.seeds):
        return Finding(
            one.claim, one.report, compared, None, None, None, None, 0, {}, UNMEASURED, percent
        )
    binary = one.of == "correct"
    every_than, every_this = zip(*pairs.values(), strict=True)
    whole = _gain(every_than, every_this, binary)
    seeds = {seed: _plain(_gain([than], [this], binary)) for seed, (than, this) in pairs.items()}
    plain = _plain(whole)
    means = [_mean(every_than), _mean(every_this)]
    return Finding(
        claim=one.claim,
        report=one.report,
        compared=compared,
        values=(means[0], means[1]),
        mean=plain["mean"],
        low=plain["low"],
        high=plain["high"],
        count=whole.questions,
        seeds=seeds,
        verdict=verdict(one.expect, plain["low"], plain["high"], one.margin),
        percent=percent,
    )


def _of_answers(plan: Plan, one: Comparison) -> bool:
    return plan.study.stages[one.this.stage.partition("@")[0]].verb == "eval"


def _same_blocks(than: np.ndarray, this: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both cut to the blocks that both have; questions are as many on both sides."""
    if than.shape[1] == this.shape[1] == 1 and len(than) != len(this):
        count = min(len(than), len(this))
        return than[:count], this[:count]
    return than, this


def _gain(than: Sequence[np.ndarray], this: Sequence[np.ndarray], binary: bool) -> Gain:
    return (paired_gain if binary else paired_difference)(
        np.concatenate(than), np.concatenate(this)
    )


def _mean(parts: Sequence[np.ndarray]) -> float:
    """The mean over all rows that have a value."""
    return float(np.nanmean(np.concatenate([part.mean(1) for part in parts])))


def _plain(gain: Gain) -> dict[str, Any]:
    """Numbers of a gain; None where they are not finite."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in asdict(gain).items()
    }


def describe(side: Side) -> str:
    """Name a side for a reader."""
    parts = [side.stage]
    if side.arm != "default":
        parts.append(side.arm)
    if side.mode != "slow":
        parts.append(side.mode)
    if side.part != (0.0, 1.0):
        parts.append(f"steps {100 * side.part[0]:.0f} to {100 * side.part[1]:.0f} %")
    return " ".join(parts)


def scored_checkpoints(plan: Plan, arm: str, seed: int, stage: str) -> list[tuple[int, Run]]:
    """Return the evaluations of a stage with `steps`, by step."""
    steps = plan.study.stages[stage].steps
    return [(step, plan.run(arm, seed, f"{stage}@{step}")) for step in steps]


def _correlate(plan: Plan, one: RankCorrelation) -> Finding:
    samples = {}
    for seed in plan.study.seeds:
        scores = scored_checkpoints(plan, one.arm, seed, one.scores)
        select = plan.run(one.arm, seed, one.select)
        samples[seed] = checkpoint_pairs(select, scores, one.of, one.where)
    rho, low, high, count = pooled_spearman(list(samples.values()))
    seeds = {}
    for seed, sample in samples.items():
        one_rho, one_low, one_high, n = pooled_spearman([sample])
        seeds[seed] = {"mean": one_rho, "low": one_low, "high": one_high, "questions": n}
    judged = UNMEASURED if rho is None else verdict(one.expect, low, high)
    return Finding(
        claim=one.claim,
        report=one.report,
        compared=f"Spearman's rho of {one.of.replace('_', ' ')} and accuracy over checkpoints",
        values=None,
        mean=rho,
        low=low,
        high=high,
        count=count,
        seeds=seeds,
        verdict=judged,
        percent=False,
    )
