import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from r1v3.trainer.selection import CheckpointRecord, pearson, select_checkpoint, write_selection


def record(
    step: int, entropy: float | None, accuracy: float | None = None, tokens: int = 50
) -> CheckpointRecord:
    return CheckpointRecord(
        name=f"step-{step:06d}",
        step=step,
        critical_entropy=entropy,
        critical_entropy_after=0.5,
        critical_tokens=tokens,
        validation_accuracy=accuracy,
        validation_low=None if accuracy is None else accuracy - 0.02,
        validation_high=None if accuracy is None else accuracy + 0.02,
    )


def test_the_highest_critical_entropy_wins_and_accuracy_does_not_matter() -> None:
    records = [record(10, 0.4, 0.9), record(30, 0.9, 0.1), record(20, 0.7, 0.95)]
    selection = select_checkpoint(records)
    assert selection.selected is records[1]
    assert [r.step for r in selection.records] == [10, 20, 30]
    assert selection.rule == "highest mean entropy (nats) at critical tokens; ties: later step"
    by_accuracy = select_checkpoint(records, rule="validation_accuracy")
    assert by_accuracy.selected is records[2]
    assert by_accuracy.rule == "highest validation accuracy; ties: later step"


def test_ties_go_to_the_later_step_whatever_the_order_given() -> None:
    records = [record(30, 0.7), record(40, 0.2), record(10, 0.7), record(20, 0.7)]
    for seed in range(5):
        random.Random(seed).shuffle(records)
        assert select_checkpoint(records).selected.step == 30


def test_tolerance_is_measured_from_the_highest_only() -> None:
    """Chaining neighbors (0.9, 0.85, 0.8) would let the choice drift down the list."""
    records = [record(10, 0.9), record(20, 0.85), record(30, 0.8)]
    assert select_checkpoint(records, tolerance=0.06).selected.step == 20
    assert select_checkpoint(records, tolerance=0.06).rule.endswith(
        ", within 0.06; ties: later step"
    )
    assert select_checkpoint(records).selected.step == 10


def test_a_checkpoint_without_critical_tokens_cannot_win_and_the_reason_is_kept() -> None:
    """An entropy of nothing, or NaN, must never compare as the highest."""
    records = [
        record(10, 0.4),
        record(20, None, tokens=0),
        record(30, 99.0, tokens=0),
        record(40, math.nan),
        record(50, None),
    ]
    selection = select_checkpoint(records)
    assert selection.selected.step == 10
    assert selection.excluded == {
        "step-000020": "it emitted no critical tokens",
        "step-000030": "it emitted no critical tokens",
        "step-000040": "its critical_entropy is nan",
        "step-000050": "its critical_entropy was not measured",
    }


def test_a_record_that_does_not_say_how_many_tokens_counts_by_its_entropy() -> None:
    records = [CheckpointRecord("a", 1, 0.5), CheckpointRecord("b", 2, 0.4)]
    assert select_checkpoint(records).selected is records[0]


def test_nothing_to_select_says_why() -> None:
    with pytest.raises(ValueError, match="step-000020: it emitted no critical tokens"):
        select_checkpoint([record(20, None, tokens=0)])
    with pytest.raises(ValueError, match=r"by critical_entropy \(none given\)"):
        select_checkpoint([])
    with pytest.raises(ValueError, match="its validation_accuracy was not measured"):
        select_checkpoint([record(20, 0.5)], rule="validation_accuracy")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="rule must be one of .* got 'entropy'"):
        select_checkpoint([record(1, 0.5)], rule="entropy")  # type: ignore[arg-type]
    for tolerance in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tolerance must be >= 0"):
            select_checkpoint([record(1, 0.5)], tolerance=tolerance)
    with pytest.raises(ValueError, match="step-000001"):
        select_checkpoint([record(1, 0.5), record(1, 0.6)])


@pytest.mark.parametrize("seed", range(6))
def test_correlations_agree_with_scipy_also_with_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    entropy = generator.random(3 + seed * 4).round(seed % 3 + 1)
    accuracy = (entropy * 0.3 + generator.random(len(entropy))).round(2)
    records = [
        record(step, float(a), float(b))
        for step, (a, b) in enumerate(zip(entropy, accuracy, strict=True))
    ]
    # Left out of both: no accuracy, no entropy.
    records += [record(900, 0.9), record(901, None, 0.9), record(902, 0.3, 0.2, tokens=0)]
    selection = select_checkpoint(records)
    assert selection.correlated == len(entropy)
    assert selection.pearson == pytest.approx(stats.pearsonr(entropy, accuracy).statistic)
    assert selection.spearman == pytest.approx(stats.spearmanr(entropy, accuracy).statistic)


def test_an_undefined_correlation_is_none() -> None:
    """Two points always correlate perfectly; a constant correlates with nothing."""
    two = select_checkpoint([record(1, 0.1, 0.5), record(2, 0.2, 0.6)])
    assert (two.pearson, two.spearman, two.correlated) == (None, None, 2)
    constant = select_checkpoint([record(step, 0.1 * step, 0.7) for step in range(1, 5)])
    assert (constant.pearson, constant.spearman, constant.correlated) == (None, None, 4)
    none = select_checkpoint([record(1, 0.1)])
    assert (none.pearson, none.spearman, none.correlated) == (None, None, 0)


def test_correlation_stays_in_range() -> None:
    x = [0.1 * k for k in range(7)]
    assert pearson(x, x) == pytest.approx(1.0) and abs(pearson(x, x) or 2) <= 1
    assert pearson(x, [-a * 3 + 1 for a in x]) == pytest.approx(-1.0)
    assert pearson([a * 1e-200 for a in x], [a * 1e200 for a in x]) == pytest.approx(1.0)
    assert pearson([a * 1e-200 for a in x], [-a * 1e-200 for a in x]) == pytest.approx(-1.0)


def test_selection_json_holds_every_checkpoint_and_marks_the_choice(tmp_path: Path) -> None:
    records = [record(10, 0.4, 0.5), record(20, 0.6), record(30, math.inf, 0.7)]
    path = write_selection(tmp_path / "run", select_checkpoint(records))
    assert path == tmp_path / "run" / "selection.json"

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    document = json.loads(path.read_text(), parse_constant=refuse)
    assert [c["selected"] for c in document["checkpoints"]] == [False, True, False]
    assert document["checkpoints"][0] == {
        "name": "step-000010",
        "step": 10,
        "critical_entropy": 0.4,
        "critical_entropy_after": 0.5,
        "critical_tokens": 50,
        "validation_accuracy": 0.5,
        "validation_low": 0.48,
        "validation_high": 0.52,
        "selected": False,
    }
    assert document["checkpoints"][2]["critical_entropy"] is None
    assert document["excluded"] == {"step-000030": "its critical_entropy is inf"}
    assert document["spearman"] is None and document["pearson"] is None
    assert document["correlated"] == 1 and document["rule"].startswith("highest mean entropy")
