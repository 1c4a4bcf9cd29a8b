"""Tables for a terminal and one figure per op."""

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.runner import OURS, ProblemReport, Result
from r1v3 import files

COLORS = {True: "#c44e52", False: "#8c9bb0"}


def print_header(console: Console, header: dict[str, Any], warnings: list[str]) -> None:
    """One line per fact, then the warnings."""
    width = max(map(len, header))
    for name, value in header.items():
        console.print(f"{name:<{width}}  {value}", highlight=False, markup=False)
    for warning in warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def print_problem(console: Console, report: ProblemReport, absent: dict[str, str]) -> None:
    """The table of one problem and what could not be timed."""
    rate = "GFLOP/s" if report.problem.flops else "GB/s"
    table = Table(title=escape(report.problem.title), title_justify="left", title_style="bold")
    table.add_column("implementation")
    headings = (
        "median", "p20 - p80", rate, f"% of {report.yardstick}", "peak memory", "max error",
        "x eager", "x compile", "time / r1v3",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in report.results:
        if result.timing is not None:
            table.add_row(*_cells(result), style="bold" if result.implementation == OURS else "")
    console.print()
    console.print(table)
    for result in report.results:
        if result.status != "timed":
            console.print(
                f"  [red]{escape(result.implementation)} {result.status}:[/red] "
                f"{escape(result.note)}"
            )
        elif result.note:
            console.print(f"  {escape(result.implementation)}: {escape(result.note)}")
    by_reason: dict[str, list[str]] = {}
    for label, reason in absent.items():
        by_reason.setdefault(reason, []).append(label)
    for reason, labels in by_reason.items():
        console.print(f"  absent: {escape(', '.join(labels))} ({escape(reason)})")


def _cells(result: Result) -> list[str]:
    timing = result.timing
    assert timing is not None
    rate = result.gigaflops_per_second or result.gigabytes_per_second
    return [
        escape(result.implementation),
        duration(timing.median),
        f"{duration(timing.p20)} - {duration(timing.p80)}",
        _number(rate),
        _number(result.percent_of_yardstick),
        files.human_bytes(result.peak_extra_bytes or 0),
        f"{result.error:.1e}",
        _number(result.over_eager),
        _number(result.over_compile),
        _number(result.times_ours),
    ]


def duration(seconds: float) -> str:
    """Three significant digits in a readable unit: 0.00123 gives "1.23 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds:.0f} s"
    raise AssertionError("unreachable")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write_plots(folder: Path, reports: list[ProblemReport], header: dict[str, Any]) -> list[Path]:
    """One PNG per op: the median of every implementation with its p20 - p80, shorter is faster."""
    written = []
    for op in dict.fromkeys(report.problem.op for report in reports):
        timed = [r for r in reports if r.problem.op == op and any(x.timing for x in r.results)]
        if timed:
            path = folder / f"{re.sub(r'[^a-z0-9_]', '_', op)}.png"
            files.write_bytes(path, _figure(op, timed, header))
            written.append(path)
    return written


def _figure(op: str, reports: list[ProblemReport], header: dict[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [sum(result.timing is not None for result in report.results) for report in reports]
    figure = Figure(figsize=(8, 1.2 + sum(0.6 + 0.34 * n for n in counts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(reports), 1, squeeze=False, height_ratios=[n + 1 for n in counts])
    for axis, report in zip(axes[:, 0], reports, strict=True):
        _bars(axis, report)
    machine = header.get("gpu") or f"{header['cpu']}, torch threads: {header['torch_threads']}"
    figure.suptitle(f"{op}  -  {machine}, torch {header['torch']}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _bars(axis: Any, report: ProblemReport) -> None:
    rows = [(r.implementation, r.timing) for r in report.results if r.timing is not None]
    names = [name for name, _ in rows]
    medians = [1e3 * t.median for _, t in rows]
    low = [1e3 * (t.median - t.p20) for _, t in rows]
    high = [1e3 * (t.p80 - t.median) for _, t in rows]
    colors = [COLORS[name == OURS] for name in names]
    axis.barh(names, medians, xerr=[low, high], color=colors, ecolor="#444444", capsize=2)
    for i, (_, t) in enumerate(rows):
        axis.annotate(f" {duration(t.median)}", (1e3 * t.p80, i), va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(report.problem.title, fontsize=9, loc="left")
    axis.set_xlabel("milliseconds, median with p20 - p80 (shorter is faster)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
