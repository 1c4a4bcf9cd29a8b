"""The report of a run: one HTML file that needs nothing else, not the network and not a script."""

import base64
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from r1v3.files import write_bytes
from r1v3.report import figures, tables
from r1v3.report.findings import (
    evaluation_size,
    findings,
    headline,
    model_scale,
    parameters_text,
    stage_sentences,
    summing_up,
)
from r1v3.report.run_folder import STAGE_NAMES, RunFolder, number, read_run, stage_names
from r1v3.report.transcripts import SHADES, show_cases

FIGURES = (
    (
        figures.reward_figure,
        "reward and accuracy over GRPO steps",
        "Look at the diamonds, where there are any: validation questions are never trained on."
        " Points are single steps.",
    ),
    (
        figures.selection_figure,
        "critical-token entropy and validation accuracy of the checkpoints",
        "Look at the sign of ρ and at n: with few checkpoints only a perfect order means much. The"
        " star is the checkpoint that the rule chose.",
    ),
    (
        figures.histogram_figure,
        "entropy of generated tokens at several steps",
        "Look at the right tail: it holds the tokens where the model still has a choice.",
    ),
    (
        figures.modes_figure,
        "accuracy against tokens per response for each decoding mode",
        "Up is better, left is cheaper. Numbers beside squares are thinking budgets in tokens.",
    ),
    (
        figures.budget_figure,
        "accuracy against the thinking budget",
        "Look at the budget from which the curve meets the dotted line of unlimited thinking.",
    ),
    (
        figures.loss_figure,
        "losses of the two supervised stages",
        "Look at the distance between training and validation: a growing one is overfitting.",
    ),
    (
        figures.gradient_figure,
        "gradient norm of each part over GRPO steps",
        "Look for spikes: in the report they precede a collapse.",
    ),
    (
        figures.length_figure,
        "response length over GRPO steps",
        "Look at whether length grows without more responses being cut off.",
    ),
)


@dataclass(frozen=True)
class Picture:
    """A figure ready to embed."""

    source: str
    description: str
    caption: str


def write_figures(run: RunFolder, out: Path) -> tuple[list[Picture], list[str]]:
    """Draw the figures as PNG under `out`; return those drawn, and a line about each other one."""
    drawn, absent = [], []
    for draw, description, caption in FIGURES:
        file = draw(run, out)
        if file is None:
            absent.append(f"figure: {description} (no data)")
            continue
        encoded = base64.b64encode(file.read_bytes()).decode()
        drawn.append(Picture(f"data:image/png;base64,{encoded}", description, caption))
    return drawn, absent


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report.html and the figures under `run_dir`/figures; return the report.

    An unfinished run gives a report of what is there and a list of what is not. All text from the
    run is escaped. Raises ValueError when `run_dir` is not a folder.
    """
    run = read_run(run_dir)
    pictures, absent = write_figures(run, run.path / "figures")
    target = run.path / "report.html"
    page = render_page(run, pictures, absent)
    # A response may hold half of a surrogate pair, which UTF-8 cannot carry.
    write_bytes(target, page.encode("utf-8", errors="replace"))
    return target


def render_page(run: RunFolder, pictures: list[Picture], absent: list[str]) -> str:
    """The HTML of the report with these figures; `absent` names those that could not be drawn."""
    return page_template("report.html.j2").render(_content(run, pictures, absent))


@cache
def page_template(name: str, folder: Path = Path(__file__).parent) -> Template:
    """Return the template `name` of a folder, which may include `page.css.j2` of this one."""
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    return environment.get_template(name)


def _unbroken(text: str) -> str:
    """Keep percent signs and units of seconds on the line of their number."""
    return re.sub(r"(?<=\d) (?=%|s\b)", "\N{NO-BREAK SPACE}", text)


def _content(run: RunFolder, pictures: list[Picture], absent: list[str]) -> dict[str, Any]:
    summary = run.summary
    compared = findings(run)
    cases, darkest = show_cases(run)
    stage = tables.main_stage(summary)
    modes = tables.mode_rows(summary)
    domains = tables.domain_rows(summary)
    return {
        "headline": headline(run),
        "scale": model_scale(summary),
        "facts": _facts(run),
        "stages": stage_sentences(run),
        "rule": str(run.selection.get("rule") or ""),
        "columns": tables.SUMMARY_COLUMNS,
        "rows": [row.cells() for row in tables.summary_rows(summary)],
        "mode_columns": tables.MODE_COLUMNS,
        "mode_rows": [row.cells() for row in modes] if len(modes) > 1 else [],
        "mode_stage": STAGE_NAMES.get(stage, stage) if stage is not None else "",
        "domain_columns": [STAGE_NAMES.get(s, s) for s in stage_names(summary)],
        "domain_rows": domains,
        "gains": tables.gain_lines(summary),
        "size": evaluation_size(summary),
        "pictures": pictures,
        "findings": compared,
        "summing_up": summing_up(compared),
        "cases": cases,
        "darkest": darkest,
        "shades": SHADES,
        "seconds": _seconds(run),
        "machine": _machine(run),
        "config": run.config,
        "missing": run.missing + absent,
    }


def _facts(run: RunFolder) -> list[str]:
    """Facts to read before the first table: when, how long, where, how large."""
    machine = run.environment
    total = sum(value for _, value in _seconds(run))
    vocabulary = number(run.summary.get("vocabulary"))
    facts = [
        f"Started {machine['started']}" if machine.get("started") else "",
        f"{total / 60:.1f} minutes in all" if total else "",
        f"{machine['cpu']}, {machine.get('cores', '?')} cores" if machine.get("cpu") else "",
        parameters_text(run.summary),
        f"vocabulary {vocabulary:,.0f}" if vocabulary is not None else "",
        f"seed {run.summary['seed']}" if run.summary.get("seed") is not None else "",
        f"commit {machine['commit']}" if machine.get("commit") else "",
    ]
    return [fact for fact in facts if fact]


def _seconds(run: RunFolder) -> list[tuple[str, float]]:
    seconds = run.summary.get("seconds")
    pairs = seconds.items() if isinstance(seconds, dict) else ()
    known = [(STAGE_NAMES.get(str(k), str(k)), number(v)) for k, v in pairs]
    return [(name, value) for name, value in known if value is not None]


def _machine(run: RunFolder) -> list[tuple[str, str]]:
    units = {"memory_gib": "memory (GiB)"}
    return [(units.get(k, str(k)), str(v)) for k, v in run.environment.items() if v is not None]
