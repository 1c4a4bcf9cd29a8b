"""Scores of groups against numbers that were worked out by hand."""

import numpy as np
import pytest

from r1v3.suite.benchmarks import BENCHMARKS
from r1v3.suite.metrics import Measured, Units, gain, measure
from r1v3.suite.question import Question
from r1v3.suite.table import Row
from tests.suite.files import FILES, Rows


def questions(key: str, rows: Rows | None = None) -> list[Question]:
    """The questions of a benchmark's file of 12 rows, or of other rows."""
    benchmark = BENCHMARKS[key]
    given = FILES[benchmark.files[0].name]() if rows is None else rows
    asked = [
        benchmark.question(Row(cells, 1 if cells.get("image") else 0), i)
        for i, cells in enumerate(given)
    ]
    return [one for one in asked if one is not None]


def measured(key: str, *wrong: str, view: str | None = None) -> Measured:
    """The score if all answers but those to these rows are right, in one run."""
    asked = questions(key)
    assert set(wrong) <= {one.id for one in asked}
    outcomes = np.array([[one.id not in wrong] for one in asked])
    benchmark = BENCHMARKS[key]
    return measure((benchmark.views[view] if view else benchmark.grouping)(asked, outcomes))


def test_mmbench_needs_every_rotation() -> None:
    """Fails if a question counts by the rotation that happened to be right."""
    assert measured("mmbench").value == 1
    assert measured("mmbench", "6").value == pytest.approx(2 / 3)
    assert measured("mmbench", "3000007", "1000007").value == pytest.approx(2 / 3)
    assert measured("mmbench", "5", "1000006", "2000007").value == 0
    assert measured("mmbench").units == 3


def test_mmbench_averages_the_and_of_each_run() -> None:
    """Fails if runs are averaged before the AND over rotations."""
    asked = questions("mmbench")
    outcomes = np.ones((len(asked), 2), dtype=bool)
    outcomes[0, 0] = outcomes[3, 1] = False  # rotations of the same question, in different runs
    assert measure(BENCHMARKS["mmbench"].grouping(asked, outcomes)).value == pytest.approx(2 / 3)


def test_hallusionbench_is_the_mean_of_three() -> None:
    """Fails if answers, figures or questions of a set are counted in another way."""
    one = measured("hallusionbench", "set_VD_chart_0_1_0")
    assert one.parts == pytest.approx({"aAcc": 11 / 12, "fAcc": 3 / 4, "qAcc": 5 / 6})
    assert one.value == pytest.approx((11 / 12 + 3 / 4 + 5 / 6) / 3)
    same_figure = measured("hallusionbench", "set_VD_chart_0_1_0", "set_VD_chart_0_1_1")
    assert same_figure.parts == pytest.approx({"aAcc": 10 / 12, "fAcc": 3 / 4, "qAcc": 4 / 6})
    same_question = measured("hallusionbench", "set_VD_chart_1_1_2", "set_VD_chart_1_2_2")
    assert same_question.parts == pytest.approx({"aAcc": 10 / 12, "fAcc": 2 / 4, "qAcc": 5 / 6})
    assert one.units == 2


@pytest.mark.parametrize(
    ("key", "lacking", "named"),
    [
        ("mmbench", "1000006", "question 6"),
        ("mmbench", "5", "question 5"),
        ("mmbench", "3000007", "question 7"),
        ("hallusionbench", "set_VD_chart_0_1_0", "set chart_0"),
        ("hallusionbench", "set_VD_chart_1_2_2", "set chart_1"),
        ("wemath", "0", "2steps 10"),
        ("wemath", "5", "2steps 11"),
        ("wemath", "8", "3steps 10"),
        ("wemath", "9", "3steps 10"),
    ],
)
def test_a_partial_set_is_refused_by_name(key: str, lacking: str, named: str) -> None:
    """Fails if a missing row makes an AND easier."""
    asked = [one for one in questions(key) if one.id != lacking]
    BENCHMARKS[key].check(questions(key))
    with pytest.raises(ValueError, match=named):
        BENCHMARKS[key].check(asked)


# 2steps 10, rows 0 to 2; 2steps 11, rows 3 to 5; 3steps 10, rows 6 to 9: the last one is the whole.
@pytest.mark.parametrize(
    ("wrong", "strict", "loose"),
    [
        ((), 3, 3),
        (("0",), 2, 3),  # one of two steps wrong: by rote if strict, mastered if loose
        (("0", "1"), 2, 2),  # both wrong and the whole right: by rote in both
        (("2",), 2.5, 2.5),  # the whole alone is wrong: inadequate generalization
        (("0", "2"), 2, 2),  # insufficient knowledge
        (("0", "1", "2"), 2, 2),
        (("6",), 2, 3),
        (("6", "7", "8"), 2, 2),
        (("9",), 2.5, 2.5),
        (("2", "5", "9"), 1.5, 1.5),
        (("7", "9"), 2, 2),
        (("0", "3", "6"), 0, 3),
    ],
)
def test_wemath_counts_composites(wrong: tuple[str, ...], strict: float, loose: float) -> None:
    """Fails if rote memorization, generalization or knowledge is counted in another way, or over
    525 composites that are not there."""
    assert measured("wemath", *wrong).value == pytest.approx(strict / 3)
    assert measured("wemath", *wrong, view="loose").value == pytest.approx(loose / 3)
    assert measured("wemath", *wrong).units == 3


def test_intervals_hold_their_score_and_narrow_with_units() -> None:
    """Fails if a bootstrap misses its own value, or says 0 +- 0 where all units are alike."""
    rng = np.random.default_rng(0)
    widths = []
    for count in (10, 40, 160):
        right = rng.integers(0, 2, (count, 5, 3)).astype(float)
        found = measure(Units(right, np.ones((count, 3)), ("a", "b", "c")))
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[0] > widths[1] > widths[2]
    alike = measure(Units(np.zeros((5, 2, 3)), np.ones((5, 3)), ("a", "b", "c")))
    assert alike.value == alike.low == 0 and alike.high > 0.3


def test_a_gain_is_paired_by_unit() -> None:
    """Fails if a gain that every question shows is lost in the spread between questions."""
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2, (60, 1, 1)).astype(float)
    before = Units(np.repeat(base, 5, 1) * 0.5, np.ones((60, 1)))
    after = Units(before.right + 0.25, before.of)
    found = gain(before, after)
    assert found.value == pytest.approx(0.25) and found.low > 0
    assert gain(after, before).high < 0
    with pytest.raises(ValueError, match="same questions"):
        gain(before, Units(after.right[1:], after.of[1:]))
