"""Scores of repeated sampling, with intervals that are clustered by question.

Q questions, K samples per question. The mean of all Q x K outcomes is Avg@K (Skywork-R1V3 report,
table 1, uses K = 5). The K samples of one question are correlated, so the question is the unit of
sampling (E. Miller, "Adding error bars to evals", 2024, arXiv:2411.00640, section 2.2).
All intervals are two-sided 95 %.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """Avg@K of one set: accuracy and its interval in [0, 1], tokens per response on average."""

    accuracy: float
    low: float
    high: float
    questions: int
    samples: int
    tokens: float


@dataclass(frozen=True)
class Gain:
    """Mean difference of two scores on the same questions, with its interval, in [-1, 1]."""

    mean: float
    low: float
    high: float
    questions: int
    samples: int


@dataclass(frozen=True)
class Correlation:
    """Correlation of n complete pairs; None where it is undefined (n < 3 or a constant side).

    `spearman_p` is the two-sided probability of a |rho| at least this large by chance.
    """

    pearson: float | None
    spearman: float | None
    spearman_p: float | None
    n: int


def _outcomes(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name} has shape {array.shape}; it must be [questions, samples], not empty"
        )
    if not np.isin(array, (0.0, 1.0)).all():
        bad = array[~np.isin(array, (0.0, 1.0))].flat[0]
        raise ValueError(f"{name} holds {bad}; every outcome must be 0 or 1")
    return array


def _quantile(questions: int) -> float:
    """Student's t for the mean over `questions`; one question gets the widest, with df 1."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, max(questions - 1, 1)))


def wilson_interval(p: float, n: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval (E. B. Wilson, JASA 22, 1927) for a fraction `p` of `n` trials."""
    scale = 1 + z * z / n
    center = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At p = 0 and p = 1 one end is exactly p; rounding must not put it on the wrong side.
    return min(max(center - half, 0.0), p), max(min(center + half, 1.0), p)


def zero_event_bound(trials: int) -> float:
    """Return Wilson's upper bound for the probability of what was never seen in `trials`."""
    return wilson_interval(0.0, trials, _quantile(trials))[1]


def score(correct: ArrayLike, tokens: ArrayLike) -> Score:
    """Return Avg@K with a 95 % interval clustered by question.

    correct: [Q, K] of 0/1. tokens: [Q, K], tokens in each response.

    The interval is Wilson's with Student's t (Q - 1) as quantile and the effective sample size
    n = p(1 - p) / v, v = var(question means) / Q, limited to [Q, Q * K] (N. Dean, M. Pagano,
    J. Surv. Stat. Methodol. 3, 2015). With v = 0 it is Wilson's interval on Q questions. For
    K = 1 it is Wilson's. Unlike mean +- t * se, it keeps its coverage near 0 and 1: with 100
    questions and p = 0.98 the t interval covers the truth 86 to 90 times of 100, this one 91 to 96.

    Raises ValueError for an empty or non-2D input, for outcomes other than 0 and 1 and for
    token counts that are negative, not finite or of another shape.
    """
    outcomes = _outcomes("correct", correct)
    lengths = np.asarray(tokens, dtype=np.float64)
    if lengths.shape != outcomes.shape:
        raise ValueError(
            f"tokens has shape {lengths.shape}; it must be that of correct, {outcomes.shape}"
        )
    if not np.isfinite(lengths).all() or (lengths < 0).any():
        raise ValueError("tokens holds a negative or non-finite count; counts must be >= 0")
    questions, samples = outcomes.shape
    p = float(outcomes.mean())
    variance = float(outcomes.mean(axis=1).var(ddof=1)) / questions if questions > 1 else 0.0
    effective = p * (1 - p) / variance if variance > 0 else float(questions)
    effective = min(max(effective, questions), questions * samples)
    low, high = wilson_interval(p, effective, _quantile(questions))
    return Score(p, low, high, questions, samples, float(lengths.mean()))


def paired_gain(a: ArrayLike, b: ArrayLike) -> Gain:
    """Return the gain of b over a: the mean over questions of (mean of b - mean of a).

    a, b: [Q, K_a] and [Q, K_b] of 0/1, row q of both being the same question. The interval is
    Student's t over the Q differences (Miller 2024, section 4.2), cut to [-1, 1]. Where all
    differences are equal it says nothing; then each side is widened by Wilson's upper bound for
    zero events in Q trials, the fraction of questions that may differ although none was seen to.
    `samples` is the smaller of K_a and K_b.

    Raises ValueError for outcomes that `score` refuses, or different numbers of questions.
    """
    first, second = _outcomes("a", a), _outcomes("b", b)
    if len(first) != len(second):
        raise ValueError(
            f"a has {len(first)} questions and b has {len(second)}; a paired gain needs the same"
            " questions in the same order"
        )
    questions = len(first)
    difference = second.mean(axis=1) - first.mean(axis=1)
    mean = float(difference.mean())
    if np.ptp(difference) == 0:
        half = zero_event_bound(questions)
    else:
        half = _quantile(questions) * float(difference.std(ddof=1)) / math.sqrt(questions)
    samples = min(first.shape[1], second.shape[1])
    return Gain(mean, max(mean - half, -1.0), min(mean + half, 1.0), questions, samples)


def paired_difference(a: ArrayLike, b: ArrayLike) -> Gain:
    """Return the mean over rows of (mean of b - mean of a), for measures of any size.

    a, b: [Q, K_a] and [Q, K_b], row q of both being of the same question. Rows with a value that is
    not finite are left out. The interval is that of `paired_gain` without its limits: Student's t
    over the differences. It is unbounded for fewer than two rows, and where all differences are
    equal but not zero, which say nothing about their scatter.

    Raises ValueError for inputs that are not 2D, or different numbers of rows.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise ValueError(f"a {first.shape} and b {second.shape} must be [Q, K_a] and [Q, K_b]")
    difference = second.mean(axis=1) - first.mean(axis=1)
    difference = difference[np.isfinite(difference)]
    rows, samples = len(difference), min(first.shape[1], second.shape[1])
    if rows == 0:
        return Gain(math.nan, -math.inf, math.inf, 0, samples)
    mean = float(difference.mean())
    if rows < 2 or (np.ptp(difference) == 0 and mean != 0):
        return Gain(mean, -math.inf, math.inf, rows, samples)
    half = _quantile(rows) * float(difference.std(ddof=1)) / math.sqrt(rows)
    return Gain(mean, mean - half, mean + half, rows, samples)


def pooled_spearman(
    samples: Sequence[tuple[Sequence[float | None], Sequence[float | None]]],
) -> tuple[float | None, float | None, float | None, int]:
    """Return Spearman's rho of several samples of pairs together, its interval, and all their n.

    Fisher's transforms of the samples' rhos are averaged with weights n - 3; the variance of one is
    (1 + rho^2 / 2) / (n - 3) (D. Bonett, T. Wright, Psychometrika 65, 2000). A perfect order, whose
    transform is infinite, counts as half a swap of neighbors away from it: then the interval of a
    single sample excludes zero from n = 5 on, where the exact probability is below 5 % as well.
    All are None where no sample has four pairs and a rho.
    """
    weights, transforms, variances, total = [], [], [], 0
    for x, y in samples:
        found = correlation(x, y)
        if found.spearman is None or found.n < 4:
            continue
        most = 1 - 6 / (found.n * (found.n**2 - 1))
        rho = min(max(found.spearman, -most), most)
        weights.append(found.n - 3)
        transforms.append(math.atanh(rho))
        variances.append((1 + rho**2 / 2) / (found.n - 3))
        total += found.n
    if not weights:
        return None, None, None, 0
    share = np.array(weights) / sum(weights)
    center = float(share @ np.array(transforms))
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt(
        float(share**2 @ np.array(variances))
    )
    return math.tanh(center), math.tanh(center - half), math.tanh(center + half), total


def correlation(x: Sequence[float | None], y: Sequence[float | None]) -> Correlation:
    """Return Pearson's r and Spearman's rho of the pairs whose values are both finite.

    Up to n = 8 `spearman_p` is exact, over all n! orders; above, by the t approximation.
    Raises ValueError when x and y differ in length.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} values and y has {len(y)}; they must be pairs")
    pairs = np.array(
        [
            (np.nan if a is None else a, np.nan if b is None else b)
            for a, b in zip(x, y, strict=True)
        ],
        dtype=np.float64,
    ).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    n = len(pairs)
    if n < 3 or (np.ptp(pairs, axis=0) == 0).any():
        return Correlation(None, None, None, n)
    pearson = _pearson(pairs)
    ranks: NDArray[np.float64] = np.stack([stats.rankdata(column) for column in pairs.T], axis=1)
    rho = _pearson(ranks)
    return Correlation(pearson, rho, _spearman_p(ranks, rho), n)


def _pearson(pairs: NDArray[np.float64]) -> float:
    centered = pairs - pairs.mean(axis=0)
    centered /= np.abs(centered).max(axis=0)  # squares of tiny spreads would underflow
    x, y = centered.T
    return min(max(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)), -1.0), 1.0)


def _spearman_p(ranks: NDArray[np.float64], rho: float) -> float:
    n = len(ranks)
    if n > 8:
        if abs(rho) >= 1:
            return 0.0
        t = abs(rho) * math.sqrt((n - 2) / (1 - rho * rho))
        return float(2 * stats.t.sf(t, n - 2))
    centered = ranks - ranks.mean(axis=0)
    orders = centered[np.array(list(itertools.permutations(range(n)))), 1]
    by_chance = np.abs(orders @ centered[:, 0])
    seen = abs(float(centered[:, 0] @ centered[:, 1]))
    return float((by_chance >= seen - 1e-9).mean())
