"""Figures 3, 5 and 9, and table 5, against numbers that were worked out by hand."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from r1v3.suite import figures
from r1v3.suite.answers import Answer
from r1v3.suite.benchmarks import BENCHMARKS
from r1v3.suite.figures import Checkpoint, write_figures
from r1v3.suite.phrases import compare
from r1v3.suite.score import scored, verdicts
from r1v3.suite.tables import Record, sheets
from tests.suite.test_metrics import questions

BLIND = "I cannot see the image.\n</think>\n\n"
SEEING = "Let me look.\n</think>\n\n"


def record(name: str, right: dict[str, str], *, entropy: float | None = 0.5) -> Record:
    """The scores if, by mode, the PhyX questions of these numbers are answered right."""
    asked, made = questions("phyx"), Record(name, "report", None)
    for mode, places in right.items():
        answers = [
            Answer(
                one.id, 0, 0, f"\\boxed{{{one.gold if one.id in places.split() else 'Z'}}}",
                8, "stop", entropy, 2, entropy,
            )
            for one in asked
        ]  # fmt: skip
        found = verdicts(
            BENCHMARKS["phyx"], asked, answers, samples=1, thinking=False, protocol="report"
        )
        made.scores.setdefault("phyx", {})[mode] = scored(BENCHMARKS["phyx"], mode, found)
    return made


def checkpoint(made: Record) -> Checkpoint:
    return Checkpoint(made.checkpoint, json.loads(json.dumps(made.as_json()))["scores"])


def points(figure: Figure) -> list[tuple[float, float]]:
    """Where the points with an interval stand."""
    return [
        (round(float(bar.lines[0].get_xdata()[0]), 3), round(float(bar.lines[0].get_ydata()[0]), 2))
        for bar in figure.axes[0].containers
    ]


def test_domains_stand_beside_each_other_for_every_checkpoint() -> None:
    """Fails if a domain of figure 3 has another's score, or a checkpoint another's color."""
    # Mechanics, Optics and Electromagnetism take turns.
    shown = [record("a", {"slow": "0 3 6 9 1"}), record("b", {"slow": "2"})]
    figure = Figure()
    assert figures._draw_domains([checkpoint(one) for one in shown], figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "Electromagnetism", "Mechanics", "Optics",
    ]  # fmt: skip
    assert points(figure) == [
        (-0.2, 0), (0.8, 100), (1.8, 25), (0.2, 25), (1.2, 0), (2.2, 0),
    ]  # fmt: skip


def test_entropy_stands_against_score() -> None:
    """Fails if figure 5 pairs the entropy of one checkpoint with the score of another, or counts
    one whose entropies are not known."""
    shown = [
        record("a", {"slow": "0 1 2"}, entropy=0.2),
        record("b", {"slow": "0 1 2 3 4 5"}, entropy=0.7),
        record("unknown", {"slow": "0"}, entropy=None),
    ]
    figure = Figure()
    assert figures._draw_entropy([checkpoint(one) for one in shown], figure)
    assert points(figure) == [(0.2, 25), (0.7, 50)]
    assert {text.get_text() for text in figure.axes[0].texts} == {"a", "b"}
    assert not figures._draw_entropy([checkpoint(shown[0])], Figure())


def test_budgets_are_drawn_by_cutting_and_by_closing() -> None:
    """Fails if figure 9 mixes up answers that were cut and thoughts that were closed."""
    right = {"slow": "0 1 2 3 4 5 6 7 8", "cut-4": "0", "cut-16": "0 1 2"}
    one = checkpoint(record("a", {**right, "budget-4": "0 1 2 3 4 5", "budget-16": "0 1 2 3 4 5"}))
    figure = Figure()
    assert figures._draw_budgets((one, "phyx"), figure)
    assert points(figure) == [(4, 50), (16, 50)]
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn["response cut off"] == pytest.approx([100 / 12, 25])
    assert drawn["slow thinking (8 tokens)"] == [75, 75]
    assert not figures._draw_budgets((checkpoint(record("a", {"cut-4": "0"})), "phyx"), Figure())


def test_figures_are_of_one_protocol_and_none_is_left_over(tmp_path: Path) -> None:
    """Fails if scores by VLMEvalKit's rules stand beside others, or an old figure stays."""
    for name, protocol in (("a", "report"), ("b", "kit")):
        made = record(name, {"slow": "0 1"})
        made.protocol = protocol
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps(made.as_json()))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "scores.json").write_text("{")
    old = tmp_path / "a" / "figures" / "entropy.png"
    old.parent.mkdir()
    old.write_bytes(b"")
    assert write_figures(tmp_path / "a") == [tmp_path / "a" / "figures" / "domains.png"]
    assert not old.exists()


def test_table_5_gives_the_reports_numbers() -> None:
    """Fails if 47 of 900 answers, 24 of them right, are not 51.1 % beside 77.3 %."""
    said, right = np.zeros((900, 1), dtype=bool), np.zeros((900, 1), dtype=bool)
    said[:47], right[:24], right[47 : 47 + 659] = True, True, True
    found = compare(right, said, 0)
    assert found.said[0] == 47 and found.others[0] == 853 and found.difference is None
    assert found.said[1] is not None and found.others[1] is not None
    assert round(100 * found.said[1].value, 1) == 51.1
    assert round(100 * found.others[1].value, 1) == 77.3
    assert found.said[1].low < 0.4 and 0.62 < found.said[1].high < 0.7


def test_thoughts_that_say_so_are_compared_on_the_same_questions() -> None:
    """Fails if the phrase is sought behind the thought, or hard questions pass for blind ones."""
    asked = questions("mmmu")[:3]
    texts = [
        (SEEING, True), (BLIND, False),  # of one question
        (SEEING, True), (BLIND, True),
        (SEEING, False), (SEEING + "I cannot see the image. ", True),
    ]  # fmt: skip
    answers = [
        Answer(asked[i // 2].id, i % 2, 0,
               f"{text}\\boxed{{{asked[i // 2].gold if right else 'Z'}}}", 1, "stop")
        for i, (text, right) in enumerate(texts)
    ]  # fmt: skip
    benchmark = BENCHMARKS["mmmu"]
    outcomes = verdicts(
        benchmark, asked, answers, samples=2, thinking=True, protocol="report", phrases=True
    )
    found = outcomes.phrases
    assert found is not None and found.difference is not None and found.in_answers == 1
    assert (found.said[0], found.others[0], found.difference.units) == (2, 4, 2)
    assert found.difference.value == pytest.approx(-0.5)
    made = Record(
        "x", "report", None, scores={"mmmu": {"slow": scored(benchmark, "slow", outcomes)}}
    )
    table = next(sheet for sheet in sheets(made) if sheet.title.startswith("Table 5"))
    assert [row[2] for row in table.rows] == ["50.0", "75.0"]
    assert "2 questions" in table.notes[0] and asdict(made)["scores"]
