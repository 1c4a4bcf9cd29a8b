"""`python -m benchmarks`: r1v3's kernels against PyTorch and installed rivals."""

import argparse
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from benchmarks import (
    bench_ban_tokens,
    bench_entropy,
    bench_group_advantages,
    bench_grpo_loss,
    bench_linear_cross_entropy,
    bench_linear_grpo_loss,
    bench_linear_logprobs_and_entropy,
    bench_logits_grpo_loss,
    bench_logits_options,
    bench_logprobs_and_entropy,
    bench_sample_tokens,
    bench_selective_log_softmax,
    compilations,
    machine,
    peers,
    report,
    runner,
)
from r1v3 import files

OPS: dict[str, ModuleType | bench_logits_options.Option] = {
    "logprobs_and_entropy": bench_logprobs_and_entropy,
    "entropy": bench_entropy,
    "selective_log_softmax": bench_selective_log_softmax,
    "group_advantages": bench_group_advantages,
    "grpo_loss": bench_grpo_loss,
    "ban_tokens": bench_ban_tokens,
    "sample_tokens": bench_sample_tokens,
    "linear_logprobs_and_entropy": bench_linear_logprobs_and_entropy,
    "linear_cross_entropy": bench_linear_cross_entropy,
    "linear_grpo_loss": bench_linear_grpo_loss,
    "logits_grpo_loss": bench_logits_grpo_loss,
    **bench_logits_options.OPTIONS,
}
SECONDS_PER_TASK = {"small": 0.5, "full": 2.0}
EXAMPLES = """examples:
  python -m benchmarks                                  every op, small shapes, about two minutes
  python -m benchmarks entropy grpo_loss --shapes full
  python -m benchmarks --device cuda --peers trl liger --json results.json --plot figures

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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a PNG per op into DIR")
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
    facts = machine.header(device)
    if device != "cpu":
        facts["triton_compilations"] = compilations.count(device)
    report.print_header(console, facts, machine.warnings(facts))
    start = time.perf_counter()
    reports: list[runner.ProblemReport] = []
    absent: list[dict[str, str]] = []
    for op in dict.fromkeys(options.ops or OPS):
        module = OPS[op]
        for shape in module.shapes(device, shapes):
            for mode in module.MODES:
                with console.status(f"{op} {mode} {shape}"):
                    functions, missing = peers.find(op, mode, device, projects)
                    problem = module.problem(shape, mode, device)
                    done = runner.run(problem, functions, device, SECONDS_PER_TASK[shapes])
                reports.append(done)
                absent.append(missing)
                report.print_problem(console, done, missing)
    console.print(f"\nproblems: {len(reports)}, in {time.perf_counter() - start:.0f} s")
    if options.json is not None:
        files.write_json(options.json, report.document(facts, reports, absent))
        console.print(f"results: {options.json}", markup=False)
    if options.plot is not None:
        for path in report.write_plots(options.plot, reports, facts):
            console.print(f"figure: {path}", markup=False)
    wrong = [done.problem.title for done in reports if not done.sound]
    for title in wrong:
        console.print(f"[red]r1v3 failed the gate:[/red] {title}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
