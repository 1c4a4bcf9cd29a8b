"""`python -m benchmarks`: r1v3's kernels against PyTorch and installed rivals."""

import argparse
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks import compilations, machine, peers, report
from benchmarks.ops import OPS
from benchmarks.session import SECONDS_PER_TASK, Session, cases

EXAMPLES = """examples:
  python -m benchmarks                                  every op, small shapes, about two minutes
  python -m benchmarks entropy grpo_loss --shapes full
  python -m benchmarks --device cuda --peers trl liger --json results.json --plot figures
  python -m benchmarks entropy --seconds 60 --json results.json

An implementation whose results are wrong gets no time. The exit status is 1 when one of r1v3's
kernels is wrong.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 and a message on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--peers", nargs="*", metavar="NAME",
        help=f"rivals, of {', '.join(peers.project_names())}; without a name none "
        "(default: those that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", choices=("small", "full"), help="default: full on CUDA, small on the CPU"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="leave out the problems that would end later"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results to FILE after every problem"
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a PNG per op into DIR")
    parser.add_argument(
        "--commit",
        metavar="NAME",
        help="where there is no git: what `git describe --always --dirty --abbrev=40` prints",
    )
    options = parser.parse_args(arguments)
    for what, given, known in (
        ("op", options.ops, list(OPS)),
        ("peer", options.peers or (), peers.project_names()),
    ):
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
                parser.error(f"unknown {what} {name!r}{hint}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be > 0, got {options.seconds:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; use --device cpu")
    if options.plot is not None and options.plot.exists() and not options.plot.is_dir():
        parser.error(f"--plot {options.plot}: is a file, not a directory")
    if options.json is not None and options.json.is_dir():
        parser.error(f"--json {options.json}: is a directory, not a file")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 1 if one of r1v3's kernels failed the gate."""
    options = parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = options.shapes or ("small" if device == "cpu" else "full")
    projects = peers.project_names() if options.peers is None else options.peers
    console = Console(width=None if sys.stdout.isatty() else 140)
    facts = machine.header(device, options.commit)
    if device != "cpu":
        facts["triton_compilations"] = compilations.count(device)
    report.print_header(console, facts, machine.warnings(facts))
    start = time.perf_counter()
    session = Session(
        facts, projects, SECONDS_PER_TASK[shapes], compiled=not options.no_compile,
        target=options.json,
    )  # fmt: skip
    for case in cases(list(dict.fromkeys(options.ops or OPS)), device, shapes):
        if not session.has_time(options.seconds):
            session.skip(case)
            continue
        with console.status("{} {} {}".format(*case)):
            done = session.measure(case)
        if done is not None:
            report.print_problem(console, *done)
    console.print(f"\nproblems: {len(session.reports)}, in {time.perf_counter() - start:.0f} s")
    if session.skipped:
        console.print(f"no time for {len(session.skipped)} more; --seconds sets how much there is")
    if options.json is not None:
        console.print(f"results: {options.json}", markup=False)
    if options.plot is not None:
        for path in report.write_plots(options.plot, [done for done, _ in session.reports], facts):
            console.print(f"figure: {path}", markup=False)
    for title in session.wrong:
        console.print(f"[red]r1v3 failed the gate:[/red] {escape(title)}")
    return 1 if session.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
