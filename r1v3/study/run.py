"""`r1v3 study`: runs what studies need, judges their findings, draws and writes them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from r1v3.files import write_json
from r1v3.progress import say
from r1v3.shipped_files import shipped
from r1v3.study.estimate import cores_of
from r1v3.study.figures import write_figures
from r1v3.study.file import read_study
from r1v3.study.finished import finished
from r1v3.study.page import measured, verdict_counts, write_findings, write_page
from r1v3.study.plan import Plan, Run, make_plan
from r1v3.study.record import make_record
from r1v3.study.runner import Runner, arguments, write_config

_WIDTH = 140  # of tables that go to a file
_UNSENT = ("data", "select")


def run_studies(
    files: Sequence[Path], out: Path, *, quick: bool, jobs: int | None, printing: bool
) -> bool:
    """Run studies whose runs are shared; write `out`/<name>/ for each, and `out`/findings.md.

    Args:
        out: also where all runs lie.
        jobs: most runs at a time; by default as many as the cores can hold.
        printing: print the commands of the runs that are not finished, and run nothing.

    Returns:
        Whether every run is finished.

    Raises:
        ValueError: a file is wrong, or two of one name are given.
    """
    plans = [make_plan(file.stem, read_study(shipped(file), quick=quick), out) for file in files]
    names = [plan.name for plan in plans]
    if twice := {name for name in names if names.count(name) > 1}:
        told = f"two studies have the name {sorted(twice)[0]}"
        raise ValueError(f"{told}; run them apart, or rename a file")
    runs, labels = _joined(plans)
    if printing:
        print_commands(plans, runs)
        return True
    runner = Runner(runs, labels, out, jobs or _fitting_jobs(runs.values()), say)
    failed = runner.run()
    for key, reason in failed.items():
        say(f"not run: {key} ({labels[key][0]}): {reason}")
    # It asks torch for its version, and the rest of a study needs no torch.
    from r1v3.environment import environment

    machine = environment()
    records = [_write(plan, out, quick, machine) for plan in plans]
    write_findings(records, out / "findings.md")
    _show(records)
    say(f"pages: {', '.join(str(out / name / 'report.html') for name in names)}")
    return not failed


def _joined(plans: Sequence[Plan]) -> tuple[dict[str, Run], dict[str, list[str]]]:
    """All runs, each once, and what to call them."""
    runs: dict[str, Run] = {}
    labels: dict[str, list[str]] = {}
    for plan in plans:
        runs |= plan.runs
        for key, names in plan.labels().items():
            labels.setdefault(key, []).extend(f"{plan.name}: {name}" for name in names)
    return runs, labels


def _fitting_jobs(runs: Iterable[Run]) -> int:
    """As many runs as the cores can hold, by the largest of them."""
    return max(1, (os.cpu_count() or 1) // max(map(cores_of, runs), default=1))


def print_commands(plans: Sequence[Plan], runs: dict[str, Run]) -> None:
    """Print a command for every run that is not finished, in an order in which they can run.

    The configurations that the commands name are written.
    """
    launchers = {key: plan.study.launcher for plan in plans for key in plan.runs}
    depth: dict[str, int] = {}
    for key, run in runs.items():
        if not finished(run):
            depth[key] = 1 + max((depth.get(need, 0) for need in run.needs), default=0)
    for level in sorted(set(depth.values())):
        print(f"# {'first' if level == 1 else 'when those before have ended'}, in any order:")
        for key in (key for key, at in depth.items() if at == level):
            write_config(runs[key])
            verb = runs[key].verb
            launcher = launchers[key] if verb not in _UNSENT else None
            print(" ".join([launcher or "r1v3", *arguments(runs[key])]))
    if depth:
        print("# then the same r1v3 study without --print, which runs nothing that is finished")


def _write(plan: Plan, out: Path, quick: bool, machine: dict[str, Any]) -> dict[str, Any]:
    folder = out / plan.name
    record = make_record(plan, out, quick=quick, environment=machine)
    write_json(folder / "study.json", record)
    write_page(record, write_figures(plan, folder), folder / "report.html")
    return record


def _show(records: Sequence[dict[str, Any]]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for record in records:
        table = Table(
            title=Text(f"{record['name']}: {record['title']}"),
            title_justify="left",
            caption=Text(verdict_counts(record["findings"])),
            caption_justify="left",
        )
        for column in ("The report says", "Its numbers", "Here", "Verdict"):
            table.add_column(column)
        for one in record["findings"]:
            cells = (one["claim"], one["report"], measured(one), one["verdict"])
            table.add_row(*map(Text, cells))
        console.print(table)
