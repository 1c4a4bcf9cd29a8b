"""Verdicts from intervals, of answers that were written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from r1v3.evaluation.statistics import paired_gain
from r1v3.study import figures as study_figures
from r1v3.study.collapse import collapse_step
from r1v3.study.figures import write_figures
from r1v3.study.page import findings_table, write_page
from r1v3.study.record import make_record
from r1v3.study.verdicts import find_all, verdict
from tests.study.written import TREE, finding, planned, write_answers, write_metrics

DOMAINS = ["sums"] * 20 + ["counting"] * 10
MACHINE = {"cpu": "a <b>cpu</b>", "cores": 2, "commit": None}


@pytest.mark.parametrize(
    ("expect", "low", "high", "wanted"),
    [
        ("higher", 0.01, 0.2, "seen"),
        ("higher", -0.01, 0.2, "not seen"),
        ("higher", 0.0, 0.2, "not seen"),
        ("higher", -0.2, -0.01, "opposite"),
        ("lower", -0.2, -0.01, "seen"),
        ("lower", -0.2, 0.0, "not seen"),
        ("lower", 0.01, 0.2, "opposite"),
        ("equal", -0.02, 0.03, "seen"),
        ("equal", -0.02, 0.04, "not seen"),
        ("equal", 0.01, 0.02, "seen"),
        ("equal", 0.04, 0.05, "opposite"),
        ("equal", -0.05, -0.04, "opposite"),
        ("higher", None, None, "not seen"),
        ("equal", None, None, "not seen"),
    ],
)
def test_a_verdict_follows_from_the_interval(
    expect: str, low: float | None, high: float | None, wanted: str
) -> None:
    """Fails if an interval that holds zero, or has no end, counts as an effect, or one that
    excludes zero on the other side as none."""
    assert verdict(expect, low, high, 0.03) == wanted


def answers(rng: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    correct = (rng.random((30, 2)) < share).astype(int)
    return {"correct": correct, "tokens": rng.integers(5, 40, (30, 2))}


def test_answers_are_paired_by_question_over_all_seeds() -> None:
    """Fails if questions of one side are compared with others of the other side, out-of-domain ones
    are counted as in domain, or a seed is left out."""
    plan = planned(
        findings=[
            finding(),
            finding(where="out_of_domain"),
            finding(where="counting", expect="lower"),
            finding(of="tokens", expect="lower", this={"stage": "score", "mode": "nothink"}),
            finding(than={"stage": "score", "mode": "cut-20"}),
            finding(this={"stage": "score", "mode": "nowait"}),
        ]
    )
    rng, written = np.random.default_rng(0), {}
    for seed in (0, 1):
        for arm, share in (("default", 0.3), ("hot", 0.9)):
            run = plan.run(arm, seed, "score")
            slow, short = answers(rng, share), answers(rng, share)
            short["tokens"] = slow["tokens"] - rng.integers(2, 5, (30, 2))
            written[arm, seed] = slow
            write_answers(run, {"slow": slow, "nothink": short}, DOMAINS)
    found = find_all(plan)
    stacked = {
        arm: np.concatenate([written[arm, seed]["correct"][:20] for seed in (0, 1)])
        for arm in ("default", "hot")
    }
    expected = paired_gain(stacked["default"], stacked["hot"])
    assert (found[0].mean, found[0].low, found[0].high) == (
        expected.mean, expected.low, expected.high,
    )  # fmt: skip
    assert found[0].count == 40 and found[0].verdict == "seen" and set(found[0].seeds) == {0, 1}
    assert found[0].values == (stacked["default"].mean(), stacked["hot"].mean())
    assert (found[1].count, found[1].mean) == (20, found[2].mean)
    assert found[1].verdict == "seen" and found[2].verdict == "opposite"
    assert found[3].verdict == "seen" and not found[3].percent
    # What was longer than the cut is not right.
    cut = written["default", 0]["correct"] * (written["default", 0]["tokens"] <= 20)
    other = written["default", 1]["correct"] * (written["default", 1]["tokens"] <= 20)
    assert found[4].values is not None
    assert found[4].values[0] == np.concatenate([cut[:20], other[:20]]).mean()
    assert found[5].verdict == "not measured"  # no answers in that mode


def test_metrics_of_training_are_paired_by_blocks_of_steps() -> None:
    """Fails if the two parts of a run, or two runs, are not compared block by block, or a step
    without a value counts as zero."""
    plan = planned(
        findings=[
            finding(of="reward", this={"stage": "grpo", "arm": "hot"}, than={"stage": "grpo"}),
            finding(
                of="entropy",
                expect="lower",
                this={"stage": "grpo", "part": [0.5, 1.0]},
                than={"stage": "grpo", "part": [0.0, 0.5]},
            ),
            finding(of="nothing", this={"stage": "grpo", "arm": "hot"}, than={"stage": "grpo"}),
        ]
    )
    rng = np.random.default_rng(1)
    for seed in (0, 1):
        for arm, rise in (("default", 0.0), ("hot", 0.2)):
            lines = [
                {"reward": 0.5 + rise + rng.normal(0, 0.02), "entropy": 2 - 0.05 * n}
                for n in range(20)
            ]
            lines[3]["reward"] = None
            write_metrics(plan.run(arm, seed, "grpo"), lines)
    reward, entropy, nothing = find_all(plan)
    assert reward.verdict == "seen" and reward.count == 16 and not reward.percent
    assert reward.mean == pytest.approx(0.2, abs=0.03)
    assert entropy.verdict == "seen" and entropy.mean == pytest.approx(-0.5)
    assert nothing.verdict == "not measured"


def test_a_collapse_is_found_where_the_reward_falls_and_stays() -> None:
    """Fails if a single bad step counts as a collapse, or a real one is not found."""
    steady = [0.5] * 20
    assert collapse_step(steady) is None
    assert collapse_step([*steady[:10], 0.0, *steady[:9]]) is None
    fallen = collapse_step([*steady, *([0.1] * 10)])
    assert fallen is not None and 20 <= fallen <= 23
    assert collapse_step([]) is None and collapse_step([0.0] * 30) is None


def test_an_unfinished_study_still_has_its_record_page_and_figures() -> None:
    """Fails if one missing run takes away what the others found, or text of a file becomes markup
    of the page or of the table."""
    figures = [
        {"draw": "steps", "title": "Over steps", "stage": "grpo", "of": ["reward", "entropy"]},
        {"draw": "scores", "title": "Scores", "stage": "score"},
        {"draw": "budgets", "title": "Budgets", "stage": "score"},
        {"draw": "entropies", "title": "Entropies", "stage": "grpo"},
    ]
    plan = planned(title="<i>sly</i>", findings=[finding()], figures=figures)
    write_answers(
        plan.run("default", 0, "score"), {"slow": answers(np.random.default_rng(2), 0.5)}, DOMAINS
    )
    write_metrics(plan.run("default", 0, "grpo"), [{"reward": 0.1 * n} for n in range(6)])
    out = plan.run("default", 0, "score").folder.parents[1]
    record = make_record(plan, out, quick=True, environment=MACHINE)
    json.dumps(record, allow_nan=False)
    assert [one["verdict"] for one in record["findings"]] == ["not measured"]
    assert len(record["scores"]) == 2 and len(record["training"]) == 1
    drawn = write_figures(plan, out / "mine")
    assert [path is not None for _, path in drawn] == [True, True, False, False]
    write_page(record, drawn, out / "report.html")
    page = (out / "report.html").read_text()
    assert "&lt;i&gt;sly" in page and "<i>sly" not in page and "<b>cpu" not in page
    assert "https://" not in page.replace("https://arxiv.org", "") and "<script" not in page
    assert page.count('<img src="data:image/png') == 2 and "not complete" in page
    assert "hot is \\| better" in findings_table([record])


@pytest.mark.parametrize("arms", [["default"], ["default", "hot"]])
def test_budgets_are_drawn_at_their_accuracies(
    arms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a curve is left out, stands at other accuracies, or is not named for its arm."""
    canvases = []

    def draw(painter: Any, paint: Callable[[Any, Figure], bool], file: Path) -> Path:
        canvases.append(Figure())
        assert paint(painter, canvases[-1])
        return file

    monkeypatch.setattr(study_figures, "draw_png", draw)
    stages = {
        **TREE["stages"],
        "score": {
            **TREE["stages"]["score"],
            "settings": {**TREE["stages"]["score"]["settings"], "budgets": [4, 8]},
        },
    }
    figure = {"draw": "budgets", "title": "Budgets", "stage": "score", "arms": arms}
    plan = planned(stages=stages, figures=[figure])
    shares = {"slow": 0.5, "nothink": 0.1, "budget-4": 0.2, "budget-8": 0.4}
    for arm in arms:
        written = {
            mode: {"correct": np.tile(np.arange(10) < 10 * share, 2).astype(int)[:20, None],
                   "tokens": np.full((20, 1), 7)}
            for mode, share in shares.items()
        }  # fmt: skip
        write_answers(plan.run(arm, 0, "score"), written, ["sums"] * 20)
    write_figures(plan, Path("mine"))
    (axes,) = canvases[0].axes
    curves = {
        str(line.get_label()): (np.ravel(line.get_xdata()).tolist(), np.ravel(line.get_ydata()))
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
    for arm in arms:
        name = f"{arm}, " if len(arms) > 1 else ""
        at, values = curves.pop(f"{name}thought closed by force")
        assert at == [4, 8] and values == pytest.approx([20, 40])
        at, values = curves.pop(f"{name}response cut off")
        assert at == [4, 8] and values == pytest.approx([0, 50])
        assert curves.pop(f"{name}slow thinking (7 tokens)")[1] == pytest.approx([50, 50])
        assert curves.pop(f"{name}NoThink (7 tokens)")[1] == pytest.approx([10, 10])
    assert not curves
