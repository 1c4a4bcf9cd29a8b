import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from r1v3.evaluation.statistics import (
    correlation,
    paired_difference,
    paired_gain,
    pooled_spearman,
    score,
    wilson_interval,
)


def outcomes(
    seed: int, accuracy: float, questions: int, samples: int, independence: float
) -> np.ndarray:
    """[questions, samples] of 0/1; large `independence`: samples of a question are unrelated."""
    rng = np.random.default_rng(seed)
    ability = rng.beta(independence * accuracy, independence * (1 - accuracy), size=(questions, 1))
    return (rng.random((questions, samples)) < ability).astype(int)


@pytest.mark.parametrize(("p", "n"), [(0.0, 40), (0.03, 60), (0.5, 10), (0.9, 333), (1.0, 7)])
def test_wilson_bounds_are_where_the_score_test_rejects(p: float, n: float) -> None:
    """A wrong closed form would put the bounds off the roots of (p - q)^2 = z^2 q (1 - q) / n."""
    z = 1.959964

    def excess(q: float) -> float:
        return (p - q) ** 2 - z * z * q * (1 - q) / n

    low, high = wilson_interval(p, n, z)
    if p > 0:
        assert low == pytest.approx(optimize.brentq(excess, 1e-12, p - 1e-9), abs=1e-9)
    if p < 1:
        assert high == pytest.approx(optimize.brentq(excess, p + 1e-9, 1 - 1e-12), abs=1e-9)


def test_copies_of_a_sample_add_no_confidence() -> None:
    """Treating samples as independent would shrink the interval when each answer is repeated."""
    once = outcomes(0, 0.7, 80, 1, 2.0)
    single, copied = (
        score(once, once),
        score(np.repeat(once, 5, axis=1), np.repeat(once, 5, axis=1)),
    )
    assert copied.samples == 5
    assert (copied.accuracy, copied.low, copied.high) == pytest.approx(
        (single.accuracy, single.low, single.high)
    )


def test_independent_samples_add_confidence() -> None:
    """Using questions alone as sample size would ignore what more samples tell."""
    values = outcomes(1, 0.6, 150, 8, 1e6)
    seen = score(values, values)
    low, high = wilson_interval(seen.accuracy, values.size, float(stats.t.ppf(0.975, 149)))
    assert seen.high - seen.low == pytest.approx(high - low, rel=0.15)


@pytest.mark.parametrize("value", [0, 1])
def test_interval_of_equal_outcomes_is_wilsons_on_questions(value: int) -> None:
    """Zero variance must not become a zero-width interval, nor count samples as questions."""
    seen = score(np.full((30, 4), value), np.ones((30, 4)))
    z2 = float(stats.t.ppf(0.975, 29)) ** 2
    width = z2 / (30 + z2)
    assert seen.accuracy == value
    assert (seen.low, seen.high) == pytest.approx(
        (value * (1 - width), value + (1 - value) * width)
    )


def test_one_question_says_almost_nothing() -> None:
    seen = score([[1, 1, 1]], [[4, 5, 6]])
    assert seen.low < 0.05 and seen.high == 1.0 and seen.tokens == 5.0


@pytest.mark.parametrize("accuracy", [0.03, 0.5, 0.85, 0.97])
@pytest.mark.parametrize("independence", [0.5, 20.0])
def test_interval_covers_the_truth(accuracy: float, independence: float) -> None:
    """An interval that ignores clustering covers 74 of 100 at independence 0.5; t, 87 near 0."""
    covered = 0
    for seed in range(300):
        values = outcomes(seed, accuracy, 100, 4, independence)
        seen = score(values, values)
        covered += seen.low <= accuracy <= seen.high
    assert covered / 300 > 0.895


def test_tokens_are_averaged_over_all_responses() -> None:
    assert score([[0, 1], [1, 1]], [[10, 20], [30, 60]]).tokens == 30.0


@pytest.mark.parametrize(
    ("correct", "tokens", "message"),
    [
        ([0, 1], [1, 1], "correct has shape"),
        (np.zeros((0, 4)), np.zeros((0, 4)), "correct has shape"),
        ([[0, 0.5]], [[1, 1]], "correct holds 0.5"),
        ([[0, math.nan]], [[1, 1]], "correct holds nan"),
        ([[0, 1]], [[1], [1]], "tokens has shape"),
        ([[0, 1]], [[1, -1]], "tokens holds"),
        ([[0, 1]], [[1, math.inf]], "tokens holds"),
    ],
)
def test_score_names_what_is_wrong(correct: object, tokens: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(correct, tokens)  # type: ignore[arg-type]


def test_paired_gain_is_students_interval_of_question_differences() -> None:
    """Pairing samples instead of questions, or a minus b, would differ from scipy's interval."""
    a, b = outcomes(2, 0.6, 90, 4, 3.0), outcomes(3, 0.8, 90, 6, 3.0)
    gain = paired_gain(a, b)
    reference = stats.ttest_1samp(b.mean(1) - a.mean(1), 0.0).confidence_interval(0.95)
    assert gain.mean == pytest.approx(b.mean() - a.mean())
    assert (gain.low, gain.high) == pytest.approx((reference.low, reference.high))
    assert (gain.questions, gain.samples) == (90, 4)


def test_paired_gain_changes_sign_with_the_order() -> None:
    a, b = outcomes(4, 0.3, 40, 2, 3.0), outcomes(5, 0.5, 40, 2, 3.0)
    one, other = paired_gain(a, b), paired_gain(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))


def test_gain_of_equal_answers_is_not_claimed_to_be_certain() -> None:
    """Zero variance of the differences would give an interval of no width."""
    gain = paired_gain(np.ones((25, 2)), np.ones((25, 2)))
    z2 = float(stats.t.ppf(0.975, 24)) ** 2
    assert gain.mean == 0.0
    assert (gain.low, gain.high) == pytest.approx((-z2 / (25 + z2), z2 / (25 + z2)))


def test_gain_interval_covers_the_truth_when_questions_are_shared() -> None:
    covered, truth = 0, 0.1
    for seed in range(400):
        rng = np.random.default_rng(seed)
        ability = rng.beta(1.0, 1.0, size=(100, 1)) * 0.9
        a, b = rng.random((100, 4)) < ability, rng.random((100, 4)) < ability + truth
        gain = paired_gain(a, b)
        covered += gain.low <= truth <= gain.high
    assert 0.92 < covered / 400 < 0.98


def test_gain_needs_the_same_questions() -> None:
    with pytest.raises(ValueError, match="a has 3 questions and b has 4"):
        paired_gain(np.ones((3, 2)), np.ones((4, 2)))


@pytest.mark.parametrize("n", [4, 6, 30])
def test_correlations_agree_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.integers(0, 5, n).astype(float)  # ties: ranks must be averaged
    y = x + rng.normal(0, 2, n)
    seen = correlation(list(x), list(y))
    assert seen.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert seen.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert seen.n == n
    if n > 8:
        assert seen.spearman_p == pytest.approx(stats.spearmanr(x, y).pvalue)


def test_p_of_a_perfect_order_of_five_is_exact() -> None:
    """The t approximation calls a perfect order of five impossible by chance; it is 2 in 120."""
    assert correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]).spearman_p == pytest.approx(2 / 120)


def test_pairs_with_a_missing_side_are_left_out() -> None:
    seen = correlation([1, 2, None, 3, 4, math.inf], [1, 3, 9, math.nan, 5, 2])
    assert seen.n == 3 and seen.spearman == pytest.approx(1.0)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [2, 1]), ([1, 1, 1], [1, 2, 3])])
def test_undefined_correlation_is_none_and_not_nan(x: list[float], y: list[float]) -> None:
    seen = correlation(x, y)
    assert (seen.pearson, seen.spearman, seen.spearman_p, seen.n) == (None, None, None, len(x))


def test_tiny_spreads_do_not_underflow() -> None:
    assert correlation([1e-200, 2e-200, 3e-200], [1, 2, 4]).pearson == pytest.approx(
        stats.pearsonr([1, 2, 3], [1, 2, 4]).statistic
    )


def test_correlation_needs_pairs() -> None:
    with pytest.raises(ValueError, match="x has 1 values and y has 2"):
        correlation([1], [1, 2])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=7))
def test_spearman_sees_only_the_order(pairs: list[tuple[int, int]]) -> None:
    bend: Callable[[float], float] = math.exp
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    plain, bent = correlation(x, y), correlation([bend(a) for a in x], y)
    assert plain.spearman == (None if bent.spearman is None else pytest.approx(bent.spearman))
    assert plain.spearman_p == (None if bent.spearman_p is None else pytest.approx(bent.spearman_p))


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_interval_holds_the_accuracy_and_stays_in_range(q: int, k: int, random: object) -> None:
    values = [[random.randint(0, 1) for _ in range(k)] for _ in range(q)]  # type: ignore[attr-defined]
    seen = score(values, np.ones((q, k)))
    assert 0.0 <= seen.low <= seen.accuracy <= seen.high <= 1.0
    assert seen.low < seen.high


def test_a_difference_of_any_size_has_students_interval() -> None:
    """Fails if lengths or entropies are cut to [-1, 1] like accuracies, a question without a value
    counts as zero, or two equal differences count as certain."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(50, 20, (40, 3)), rng.normal(30, 20, (40, 2))
    found = paired_difference(a, b)
    expected = stats.ttest_rel(b.mean(1), a.mean(1)).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with_gap = np.vstack([a, [[math.nan] * 3]]), np.vstack([b, [[1.0, 2.0]]])
    assert paired_difference(*with_gap) == found
    shifted = paired_difference(a, a + 2)
    assert shifted.mean == pytest.approx(2) and (shifted.high == math.inf or shifted.low > 1.9)
    same = paired_difference(a, a)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    alone = paired_difference(a[:1], b[:1])
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    assert paired_difference([[math.nan]], [[1.0]]).questions == 0
    with pytest.raises(ValueError, match="must be"):
        paired_difference(a, b[:5])


@pytest.mark.parametrize("n", [4, 5, 6, 7, 8])
def test_a_rank_correlation_excludes_zero_about_where_its_exact_p_does(n: int) -> None:
    """Fails if a verdict over checkpoints says `seen` for orders that chance gives, or never."""
    rng = np.random.default_rng(n)
    agree = 0
    for _ in range(60):
        x, y = rng.permutation(n).tolist(), rng.permutation(n).tolist()
        rho, low, high, count = pooled_spearman([(x, y)])
        exact = correlation(x, y).spearman_p
        assert rho is not None and low is not None and high is not None and exact is not None
        assert count == n and low <= rho <= high
        agree += (low > 0 or high < 0) == (exact < 0.05)
        if low > 0 or high < 0:
            assert exact < 0.08
    assert agree >= 57
    perfect = pooled_spearman([(list(range(n)), list(range(n)))])[1]
    assert perfect is not None and (perfect > 0) == (n >= 5)


def test_seeds_narrow_a_rank_correlation() -> None:
    """Fails if several seeds count as one, or a seed without pairs takes the others away."""
    one = ([1.0, 2, 3, 4, 5, 6], [1.0, 2, 3, 4, 6, 5])
    _, low, high, n = pooled_spearman([one])
    _, low3, high3, n3 = pooled_spearman([one, one, one, ([1.0, 2], [1.0, 2]), ([], [])])
    assert low is not None and high is not None and low3 is not None and high3 is not None
    assert (n, n3) == (6, 18) and low < low3 and high3 < high
    assert pooled_spearman([([1.0] * 5, [1.0, 2, 3, 4, 5])]) == (None, None, None, 0)
