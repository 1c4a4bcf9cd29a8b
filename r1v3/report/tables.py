"""The tables of a run: the same rows for the terminal and for the report."""

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from r1v3.evaluation.statistics import Score
from r1v3.report.run_folder import (
    STAGE_NAMES,
    Record,
    read_gain,
    read_score,
    stage_modes,
    stage_names,
)

ABSENT = "–"
MODE_NAMES = {"slow": "Slow thinking", "nothink": "NoThink", "nowait": "NoWait"}
SUMMARY_COLUMNS = ("Stage", "In-domain, %", "Tokens", "Out-of-domain, %", "Tokens")
MODE_COLUMNS = ("Decoding mode", *SUMMARY_COLUMNS[1:])


@dataclass(frozen=True)
class Row:
    """One row: a name and the two scores, either of which may not have been measured."""

    key: str
    name: str
    in_domain: Score | None
    out_of_domain: Score | None

    def cells(self) -> tuple[str, str, str, str, str]:
        """Text of the five columns."""
        return (
            self.name,
            format_score(self.in_domain),
            ABSENT if self.in_domain is None else f"{self.in_domain.tokens:.1f}",
            format_score(self.out_of_domain),
            ABSENT if self.out_of_domain is None else f"{self.out_of_domain.tokens:.1f}",
        )


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal, without a minus before zero."""
    return f"{round(100 * fraction, 1) + 0.0:.1f}"


def format_score(score: Score | None) -> str:
    """Accuracy in percent and its 95 % interval, as "82.4 [79.1, 85.3]"."""
    if score is None:
        return ABSENT
    return f"{percent(score.accuracy)} [{percent(score.low)}, {percent(score.high)}]"


def mode_name(mode: str) -> str:
    """Name of a decoding mode for a reader: "budget-8" is "Budget 8"."""
    budget = mode_budget(mode)
    return f"Budget {budget}" if budget is not None else MODE_NAMES.get(mode, mode)


def mode_budget(mode: str) -> int | None:
    """Thinking tokens of a "budget-N" mode, None for other modes."""
    prefix, _, tail = mode.partition("-")
    plain = tail.isascii() and tail.isdigit() and len(tail) < 10
    return int(tail) if prefix == "budget" and plain else None


def mode_order(mode: str) -> tuple[int, int, str]:
    """Sort key: slow, nothink, nowait, budgets by size, then others by name."""
    fixed = list(MODE_NAMES)
    budget = mode_budget(mode)
    if budget is not None:
        return (len(fixed), budget, mode)
    return (fixed.index(mode), 0, mode) if mode in fixed else (len(fixed) + 1, 0, mode)


def summary_rows(summary: Record) -> list[Row]:
    """One row per stage, decoded in slow mode."""
    rows = []
    for stage in stage_names(summary):
        slow = stage_modes(summary, stage).get("slow", {})
        scores = read_score(slow.get("in_domain")), read_score(slow.get("out_of_domain"))
        rows.append(Row(stage, STAGE_NAMES.get(stage, stage), *scores))
    return rows


def main_stage(summary: Record) -> str | None:
    """The stage whose decoding modes are shown: the one measured in most, the later of equals."""
    counted = [(len(stage_modes(summary, s)), i, s) for i, s in enumerate(stage_names(summary))]
    counted = [entry for entry in counted if entry[0] > 0]
    return max(counted)[2] if counted else None


def mode_rows(summary: Record, stage: str | None = None) -> list[Row]:
    """One row per decoding mode of `stage` (of `main_stage` when None)."""
    stage = main_stage(summary) if stage is None else stage
    modes = stage_modes(summary, stage) if stage is not None else {}
    return [
        Row(
            mode,
            mode_name(mode),
            read_score(modes[mode].get("in_domain")),
            read_score(modes[mode].get("out_of_domain")),
        )
        for mode in sorted(modes, key=mode_order)
    ]


def domain_rows(summary: Record) -> list[tuple[str, list[str]]]:
    """Per domain, its scores as text in slow mode, one per stage of `stage_names`."""
    stages = stage_names(summary)
    found: dict[str, dict[str, str]] = {}
    for stage in stages:
        domains = stage_modes(summary, stage).get("slow", {}).get("domains")
        for name, value in domains.items() if isinstance(domains, dict) else ():
            found.setdefault(str(name), {})[stage] = format_score(read_score(value))
    return [(name, [cells.get(s, ABSENT) for s in stages]) for name, cells in found.items()]


def gain_lines(summary: Record) -> list[str]:
    """One sentence per paired gain in the summary, saying whether its interval holds zero."""
    gains = summary.get("gain")
    lines = []
    for key, value in gains.items() if isinstance(gains, dict) else ():
        gain = read_gain(value)
        if gain is None:
            continue
        later, _, earlier = str(key).partition("_minus_")
        names = [STAGE_NAMES.get(part, part) for part in (later, earlier) if part]
        verdict = (
            "the interval holds zero: not separated from no change"
            if gain.low <= 0 <= gain.high
            else "the interval excludes zero"
        )
        lines.append(
            f"{' minus '.join(names)}: {100 * gain.mean:+.1f} points"
            f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}], {gain.questions} questions"
            f" x {gain.samples} samples, paired by question; {verdict}."
        )
    return lines


def summary_table(summary: Record) -> Table:
    """The table for the terminal: stages, then decoding modes, the gain as caption.

    Names come from files, so they are put in as plain text and not as rich markup.
    """
    gains = gain_lines(summary)
    table = Table(
        title="Accuracy (Avg@k) with 95 % interval, tokens per response",
        caption=Text("\n".join(gains)) if gains else None,
        caption_justify="left",
        title_justify="left",
    )
    for i, column in enumerate(SUMMARY_COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in summary_rows(summary):
        table.add_row(*map(Text, row.cells()))
    stage = main_stage(summary)
    modes = mode_rows(summary)
    if stage is not None and len(modes) > 1:
        table.add_section()
        table.add_row(Text(f"Modes of {STAGE_NAMES.get(stage, stage)}", style="bold"))
        for row in modes:
            table.add_row(*map(Text, row.cells()))
    return table
