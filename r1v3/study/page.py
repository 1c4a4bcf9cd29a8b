"""The page of a study, and the table of findings of several."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from r1v3.config import StudyFigure
from r1v3.files import json_text, write_bytes, write_text
from r1v3.progress import clock
from r1v3.report.page import Picture, page_template
from r1v3.report.tables import mode_name
from r1v3.study.measures import BLOCKS
from r1v3.study.verdicts import NOT_SEEN, OPPOSITE, SEEN

_STYLES = {SEEN: "seen", OPPOSITE: "opposite"}
_SCORE_COLUMNS = ("Stage", "Arm", "Seed", "Mode", "Questions", "Accuracy, %", "Tokens")
_TRAINING_COLUMNS = ("Stage", "Arm", "Seed", "Reward, first", "last", "Tokens, first", "last",
                     "Entropy, first", "last", "Gradient, last", "Repetition, last",
                     "Collapsed")  # fmt: skip
ABSENT = "–"


def write_page(
    record: dict[str, Any], figures: Sequence[tuple[StudyFigure, Path | None]], file: Path
) -> None:
    """Write the page of a study, which needs no other file."""
    pictures, missing = [], []
    for figure, path in figures:
        if path is None:
            missing.append(f"figure: {figure.title} (no data)")
            continue
        encoded = base64.b64encode(path.read_bytes()).decode()
        caption = _caption(figure, record)
        pictures.append(Picture(f"data:image/png;base64,{encoded}", figure.title, caption))
    missing += [f"run: {run['key']}" for run in record["runs"] if not run["finished"]]
    template = page_template("study.html.j2", Path(__file__).parent)
    page = template.render(_content(record) | {"pictures": pictures, "missing": missing})
    write_bytes(file, page.encode("utf-8", errors="replace"))


def _content(record: dict[str, Any]) -> dict[str, Any]:
    seconds = record["seconds"]
    spent = sum(value for value in seconds.values() if value is not None)
    seeds, machine = record["seeds"], record["environment"]
    return {
        "name": record["name"],
        "title": record["title"],
        "report": record["report"],
        "quick": record["quick"],
        "facts": [
            f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}",
            f"{machine['cpu']}, {machine['cores']} cores",
            f"commit {machine['commit']}" if machine.get("commit") else "",
            verdict_counts(record["findings"]),
        ],
        "findings": [_finding_cells(one) for one in record["findings"]],
        "blocks": BLOCKS,
        "score_columns": _SCORE_COLUMNS,
        "scores": [_score_cells(row) for row in record["scores"]],
        "training_columns": _TRAINING_COLUMNS,
        "training": [_training_cells(row) for row in record["training"]],
        "runs": [
            (run["key"], "; ".join(run["places"]), _seconds(seconds[run["key"]]))
            for run in record["runs"]
        ],
        "hours": f"{clock(spent)} in all" if spent else "not run by a study",
        "config": yaml.safe_dump(record["study"], sort_keys=False, allow_unicode=True),
        "machine": json_text(machine, indent=2),
    }


def measured(one: dict[str, Any]) -> str:
    """A finding's difference with its interval, as text."""
    if one["mean"] is None:
        return ABSENT
    mean, low, high = (_signed(one[key], one["percent"]) for key in ("mean", "low", "high"))
    if one["values"] is None:
        return f"ρ = {mean} [{low}, {high}], {one['count']} checkpoints"
    than, this = one["values"]
    if one["percent"]:
        return f"{100 * this:.1f} against {100 * than:.1f} %: {mean} points [{low}, {high}]"
    return f"{this:.4g} against {than:.4g}: {mean} [{low}, {high}]"


def _signed(value: float | None, percent: bool) -> str:
    """A difference with its sign: in points with one decimal, or with three digits."""
    if value is None:
        return ABSENT
    if percent:
        return f"{round(100 * value, 1) + 0.0:+.1f}"
    return f"{value:+.1f}" if abs(value) >= 10 else f"{round(value, 9) + 0.0:+.3g}"


def verdict_counts(findings: Sequence[dict[str, Any]]) -> str:
    """The number of findings with each verdict, in words."""
    counts = {
        name: sum(one["verdict"] == name for one in findings) for name in (SEEN, NOT_SEEN, OPPOSITE)
    }
    other = len(findings) - sum(counts.values())
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    return ", ".join(parts + ([f"{other} not measured"] if other else []))


def findings_table(records: Sequence[dict[str, Any]]) -> str:
    """The findings of studies as a Markdown table."""
    lines = ["| Study | The report says | Its numbers | Here | Verdict |", "|---|---|---|---|---|"]
    for record in records:
        for one in record["findings"]:
            cells = [record["name"], one["claim"], one["report"], measured(one), one["verdict"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write_findings(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Write `findings_table` to a file."""
    write_text(file, findings_table(records))


def _finding_cells(one: dict[str, Any]) -> dict[str, str]:
    means = [each["mean"] for each in one["seeds"].values()]
    told = ", ".join(_signed(mean, one["percent"]) for mean in means)
    return {
        "claim": one["claim"],
        "report": one["report"],
        "measured": measured(one),
        "compared": f"{one['compared']}; {one['count']} pairs",
        "seeds": f"by seed: {told}" if len(means) > 1 else "",
        "verdict": one["verdict"],
        "style": _STYLES.get(one["verdict"], "other"),
    }


def _score_cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = 100 * row["low"], 100 * row["high"]
    return (
        row["stage"],
        row["arm"],
        str(row["seed"]),
        mode_name(row["mode"]),
        row["where"].replace("_", "-"),
        f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
        f"{row['tokens']:.1f}",
    )


def _training_cells(row: dict[str, Any]) -> tuple[str, ...]:
    def shown(key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if row.get(key) is not None else ABSENT

    return (
        row["stage"],
        row["arm"],
        str(row["seed"]),
        shown("reward_first", 3),
        shown("reward_last", 3),
        shown("response_length_first", 1),
        shown("response_length_last", 1),
        shown("entropy_first", 3),
        shown("entropy_last", 3),
        shown("grad_norm_last", 3),
        shown("repetition_last", 3),
        ABSENT if row["collapse_step"] is None else f"step {row['collapse_step']}",
    )


def _seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.0f}"


def _caption(figure: StudyFigure, record: dict[str, Any]) -> str:
    text = {
        "steps": "Thin lines are single seeds, thick ones their mean, smoothed where there are"
        " 20 points or more.",
        "scores": "Up is better, left is cheaper. Every seed has its own points.",
        "budgets": "A budget closes the thought by force and asks for the answer; a cut response"
        " counts only if it was finished by then.",
        "checkpoints": "Look at the order along both axes: the report sees them rise together.",
        "entropies": "Look at the right tail: it holds the tokens where the model still has a"
        " choice.",
    }[figure.draw]
    where = figure.where.replace("_", " ")
    return f"{figure.title}. {text}" + (f" Questions: {where}." if "budget" in figure.draw else "")
