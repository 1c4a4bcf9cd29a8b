import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from r1v3.report.tables import (
    ABSENT,
    domain_rows,
    gain_lines,
    main_stage,
    mode_budget,
    mode_order,
    mode_rows,
    percent,
    summary_rows,
    summary_table,
)


def measured(accuracy: float, tokens: float = 40.0) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "low": accuracy - 0.05,
        "high": accuracy + 0.05,
        "questions": 100,
        "samples": 4,
        "tokens": tokens,
    }


def stage(**modes: float) -> dict[str, Any]:
    return {
        "modes": {
            name.replace("_", "-"): {"in_domain": measured(value), "out_of_domain": measured(0.3)}
            for name, value in modes.items()
        }
    }


def rendered(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    console.print(summary_table(summary))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_follow_the_recipe_and_not_the_file() -> None:
    summary = {
        "stages": {"later": stage(slow=0.1), "grpo": stage(slow=0.8), "sft": stage(slow=0.7)}
    }
    assert [row.key for row in summary_rows(summary)] == ["sft", "grpo", "later"]


def test_base_may_stand_beside_the_stages() -> None:
    """The model before training would be left out of the table."""
    summary = {"base": stage(slow=0.02), "stages": {"sft": stage(slow=0.7)}}
    assert [row.key for row in summary_rows(summary)] == ["base", "sft"]


def test_cells_name_accuracy_interval_and_tokens() -> None:
    row = summary_rows({"stages": {"grpo": stage(slow=0.8)}})[0]
    assert row.cells() == ("GRPO", "80.0 [75.0, 85.0]", "40.0", "30.0 [25.0, 35.0]", "40.0")


def test_what_was_not_measured_is_a_dash() -> None:
    """A missing, null or non-finite score would crash the table or look like 0 %."""
    broken = measured(0.5) | {"high": float("nan")}
    summary = {
        "stages": {
            "sft": None,
            "grpo": {"modes": {"slow": {"in_domain": None, "out_of_domain": broken}}},
        }
    }
    assert [row.cells()[1:] for row in summary_rows(summary)] == [(ABSENT,) * 4] * 2


def test_modes_are_those_of_the_stage_measured_in_most() -> None:
    summary = {
        "stages": {
            "sft": stage(slow=0.7, nothink=0.1),
            "grpo": stage(budget_16=0.2, budget_8=0.1, slow=0.8, nowait=0.7),
            "connector": stage(slow=0.9),
        }
    }
    assert main_stage(summary) == "grpo"
    assert [row.key for row in mode_rows(summary)] == ["slow", "nowait", "budget-8", "budget-16"]


def test_budgets_are_ordered_by_size() -> None:
    """Text order puts 16 before 8 and draws the budget curve backwards."""
    modes = ["budget-16", "other", "budget-8", "nowait", "budget-128", "slow", "nothink"]
    ordered = ["slow", "nothink", "nowait", "budget-8", "budget-16", "budget-128", "other"]
    assert sorted(modes, key=mode_order) == ordered


@pytest.mark.parametrize(
    "mode", ["budget", "budget-", "budget-x", "budget-²", "budget-" + "9" * 5000]
)
def test_only_a_number_is_a_budget(mode: str) -> None:
    assert mode_budget(mode) is None


def test_percent_has_no_negative_zero() -> None:
    assert [percent(v) for v in (-1e-9, 0.0, 0.12345, 1.0)] == ["0.0", "0.0", "12.3", "100.0"]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.02, 0.10, "excludes zero"), (-0.02, 0.10, "not separated"), (-0.1, -0.02, "excludes zero")],
)
def test_gain_line_says_what_its_interval_allows(low: float, high: float, verdict: str) -> None:
    """A gain whose interval holds zero would be sold as a gain."""
    mean = (low + high) / 2
    gain = {"mean": mean, "low": low, "high": high, "questions": 50, "samples": 4}
    (line,) = gain_lines({"gain": {"grpo_minus_sft": gain}})
    assert line.startswith(f"GRPO minus Cold-start SFT: {100 * mean:+.1f} points")
    assert verdict in line and "50 questions x 4 samples" in line


def test_terminal_table_shows_stages_modes_and_gain(example_run: Path) -> None:
    text = rendered(json.loads((example_run / "summary.json").read_text()))
    for expected in ("Cold-start SFT", "NoThink", "Budget 64", "GRPO minus Cold-start SFT"):
        assert expected in text


def test_names_are_not_read_as_markup() -> None:
    """A stage called "[red]" would vanish from the terminal, "[/x]" would raise."""
    assert "[/x][red]" in rendered({"stages": {"[/x][red]": stage(slow=0.5)}})


def test_domains_line_up_with_stages() -> None:
    summary = {"stages": {"sft": stage(slow=0.7), "grpo": stage(slow=0.8)}}
    summary["stages"]["grpo"]["modes"]["slow"]["domains"] = {"sum": measured(0.9)}
    assert domain_rows(summary) == [("sum", [ABSENT, "90.0 [85.0, 95.0]"])]


@pytest.mark.parametrize("summary", [{}, {"stages": None}, {"stages": [1], "gain": 3}])
def test_empty_summary_gives_empty_tables(summary: dict[str, Any]) -> None:
    assert summary_rows(summary) == [] and mode_rows(summary) == [] and gain_lines(summary) == []
    assert "Stage" in rendered(summary)
