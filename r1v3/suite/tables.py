"""The tables of a suite: table 1 beside the report's numbers, the modes, and paired gains."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from r1v3.suite.benchmarks import BENCHMARKS
from r1v3.suite.metrics import Measured
from r1v3.suite.phrases import REPORT_SCORES
from r1v3.suite.score import Scored

_KINDS = {"said": "say so", "others": "the others"}
_TABLE_1 = (
    "Benchmark", "Report", "Ours", "95 %", "Open right", "Questions", "Tokens",
    "Unfinished", "Judged", "No verdict", "Differs",
)  # fmt: skip


@dataclass
class Record:
    """The scores of a checkpoint, as they are printed and written.

    Attributes:
        checkpoint, protocol, judge: how they came about.
        scores: by benchmark, then by mode.
        gains: of this checkpoint over `compared`, in the same order.
        mode_gains: of the other modes over mode slow, in the same order.
        differences: from the report's settings, by benchmark.
        incomplete: why a benchmark has no score, by benchmark and mode.
    """

    checkpoint: str
    protocol: str
    judge: str | None
    compared: str | None = None
    scores: dict[str, dict[str, Scored]] = field(default_factory=dict)
    gains: dict[str, dict[str, Measured]] = field(default_factory=dict)
    mode_gains: dict[str, dict[str, Measured]] = field(default_factory=dict)
    differences: dict[str, list[str]] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The record as plain values, with the report's numbers beside."""
        plain = asdict(self)
        found = {key: BENCHMARKS[key].report for key in self.scores}
        plain["report"] = {key: value / 100 for key, value in found.items() if value is not None}
        return plain


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * fraction + 0.0:.1f}"


def _interval(measured: Measured) -> str:
    return f"[{percent(measured.low)}, {percent(measured.high)}]"


@dataclass(frozen=True)
class Sheet:
    """A table of text, for Markdown and, if `printed`, for the terminal."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]
    printed: bool = True

    def show(self, console: Console) -> None:
        """Print the table."""
        table = RichTable(title=self.title, title_justify="left", box=SIMPLE, padding=(0, 0))
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i in (0, 3))
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"## {self.title}", "", _line(self.columns)]
        lines.append(_line(["---", *["---:"] * (len(self.columns) - 1)]))
        lines += [_line(row) for row in self.rows]
        if self.notes:
            lines += ["", *[f"- {note}" for note in self.notes]]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def sheets(record: Record) -> list[Sheet]:
    """All tables that the record has rows for."""
    found = [_table_1(record)]
    if any(len(modes) > 1 for modes in record.scores.values()):
        found.append(_modes(record))
    found.append(_phrases(record))
    if record.gains:
        found.append(_gains(record))
    found += _details(record)
    return [sheet for sheet in found if sheet.rows]


def _table_1(record: Record) -> Sheet:
    marks = _marks(record.differences)
    rows = []
    for key, modes in record.scores.items():
        mode, one = next(iter(modes.items()))
        name = BENCHMARKS[key].title + ("" if mode == "slow" else f" ({mode})")
        found = "".join(marks[text] for text in record.differences.get(key, ()))
        report = BENCHMARKS[key].report
        rows.append(_score_cells(name, "" if report is None else f"{report:.1f}", one, found))
        for view, measured in one.views.items():
            cells = (f"  {view}", "", percent(measured.value), _interval(measured))
            rows.append(cells + ("",) * (len(_TABLE_1) - len(cells)))
    notes = [f"{mark}: {text}" for text, mark in marks.items()]
    notes += [f"{where}: {why}" for where, why in record.incomplete.items()]
    judge = record.judge or "none"
    title = f"Table 1: {record.checkpoint} (protocol {record.protocol}, judge: {judge})"
    return Sheet(title, _TABLE_1, rows, notes)


def _score_cells(name: str, report: str, one: Scored, marks: str) -> tuple[str, ...]:
    return (
        name,
        report,
        percent(one.score.value),
        _interval(one.score),
        percent(one.upper),
        f"{one.questions} x {one.score.samples}",
        f"{one.tokens:.0f}",
        f"{percent(one.unfinished)} %",
        f"{percent(one.judged)} %",
        f"{percent(one.no_verdict)} %",
        marks,
    )


def _marks(differences: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A letter for every difference, in order of appearance."""
    texts = dict.fromkeys(text for found in differences.values() for text in found)
    return {text: chr(ord("a") + i) if i < 26 else f"({i})" for i, text in enumerate(texts)}


def _modes(record: Record) -> Sheet:
    rows = [
        (
            BENCHMARKS[key].title,
            mode,
            percent(one.score.value),
            _interval(one.score),
            _points(record.mode_gains.get(key, {}).get(mode)),
            f"{one.tokens:.0f}",
            f"{percent(one.unfinished)} %",
            "" if one.entropy is None else f"{one.entropy:.3f}",
        )
        for key, modes in record.scores.items()
        for mode, one in modes.items()
    ]
    columns = (
        *("Benchmark", "Mode", "Score", "95 %", "Over slow, points"),
        *("Tokens", "Unfinished", "Entropy, nats"),
    )
    notes = []
    if any(mode.startswith("cut-") for modes in record.scores.values() for mode in modes):
        notes.append("cut-N: the answers of mode slow, cut after N tokens")
    if any(record.mode_gains.values()):
        notes.append("over slow: paired by question")
    return Sheet("Table 4: decoding modes", columns, rows, notes)


def _points(gain: Measured | None) -> str:
    return "" if gain is None else f"{100 * gain.value + 0.0:+.1f} {_interval(gain)}"


def _phrases(record: Record) -> Sheet:
    rows, notes = [], []
    for key, modes in record.scores.items():
        found = modes["slow"].phrases if "slow" in modes else None
        if found is None:
            continue
        for kind, (count, measured) in (("said", found.said), ("others", found.others)):
            report, of = REPORT_SCORES[kind]
            rows.append(
                (
                    f"{BENCHMARKS[key].title}: {_KINDS[kind]}",
                    f"{percent(report)} of {of}",
                    "" if measured is None else percent(measured.value),
                    "" if measured is None else _interval(measured),
                    str(count),
                )
            )
        if found.difference is not None:
            both = found.difference
            notes.append(
                f"on the {both.units} questions with answers of both kinds: {_points(both)} points"
            )
        notes.append(f"{found.in_answers} answers say so behind the thought")
    columns = ("Thoughts", "Report", "Ours", "95 %", "Answers")
    return Sheet("Table 5: thoughts that say the picture cannot be seen", columns, rows, notes)


def _gains(record: Record) -> Sheet:
    rows = []
    for key, modes in record.gains.items():
        for mode, one in modes.items():
            decided = "yes" if one.low > 0 or one.high < 0 else "no"
            mean = f"{100 * one.value + 0.0:+.1f}"
            title = BENCHMARKS[key].title
            rows.append((title, mode, mean, _interval(one), str(one.units), decided))
    title = f"Gain of {record.checkpoint} over {record.compared}, paired by question"
    columns = ("Benchmark", "Mode", "Points", "95 %", "Units", "Other than chance")
    return Sheet(title, columns, rows, [])


def _details(record: Record) -> list[Sheet]:
    """Components and categories of each benchmark; PhyX by domain is figure 3."""
    found = []
    for key, modes in record.scores.items():
        mode, one = next(iter(modes.items()))
        rows = []
        if len(one.score.parts) > 1:
            rows += [(name, "", percent(value), "") for name, value in one.score.parts.items()]
        for kind, names in one.labels.items():
            if len(names) <= 40:
                rows += [
                    (kind, name, percent(part.accuracy), str(part.questions))
                    for name, part in names.items()
                ]
        title = f"{BENCHMARKS[key].title} ({mode}) by category"
        found.append(Sheet(title, ("Kind", "Category", "Score", "Questions"), rows, [], False))
    return found
