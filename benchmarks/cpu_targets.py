"""`python -m benchmarks.cpu_targets`: what the kernels promise on a CPU, each beside its rival.

Every problem is checked and timed as `python -m benchmarks` does it, in turns with its rivals. The
JSON document is that of `benchmarks.session` with one more list:

    "targets": [{"what", "op", "mode", "shape", "measure", "value", "bound", "met"}]
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks import machine, report
from benchmarks.bench_selective_log_softmax import WITH_ENTROPY
from benchmarks.problem import VOCABULARY, Mode
from benchmarks.runner import EAGER, OURS, ProblemReport, Result
from benchmarks.session import SECONDS_PER_TASK, Case, Session
from r1v3 import files
from r1v3.kernels import cpu

Measure = Literal["x eager", "x compile", "x with entropy", "share of eager's memory"]
SMALLEST = 1.0  # a kernel is not behind its rival


@dataclass(frozen=True)
class Target:
    """A bound on one measure of a problem: the most of memory, the least of a ratio of times."""

    what: str
    case: Case
    measure: Measure
    bound: float

    def met_by(self, value: float | None) -> bool:
        """Whether the value is within the bound; one that could not be had is not."""
        if value is None:
            return False
        return value <= self.bound if self.measure.startswith("share") else value >= self.bound


def targets() -> Iterator[Target]:
    """All of them, those of one problem together."""
    for bits in (32, 16):
        for masked, bound in ((0, 1.15), (50, 2.0)):
            head: Case = ("linear_logprobs_and_entropy", *_head({"T": 512}, bits, masked))
            yield Target(f"head, {bits} bits, {masked} % masked", head, "x eager", bound)
        loss: Case = ("linear_grpo_loss", *_head({"B": 4, "T": 128}, bits, 0))
        yield Target(f"loss of a head, {bits} bits", loss, "x eager", 1.15)
        yield Target(f"loss of a head, {bits} bits", loss, "share of eager's memory", 0.1)
    for rows in (8, 64, 256):
        shape = {"T": rows, "V": VOCABULARY, "K": 64}
        yield from _not_behind(f"64 tokens banned in {rows} rows", "ban_tokens", shape)
    for rewards in (32, 1024, 32_768):
        shape = {"N": rewards}
        yield from _not_behind(f"advantages of {rewards} rewards", "group_advantages", shape)
    logits: Case = ("selective_log_softmax", "forward", {"T": 64, "V": VOCABULARY})
    yield Target("log-probabilities without the entropy", logits, "x with entropy", SMALLEST)
    step: Case = ("sample_tokens", "forward", {"T": 64, "V": 151_936, "K": 64})
    yield Target("a decode step", step, "x eager", 10.0)


def _head(tokens: dict[str, int], bits: int, masked: int) -> tuple[Mode, dict[str, int]]:
    """512 tokens and a quarter of Qwen3's vocabulary.

    Where a processor has no instructions for bfloat16, eager PyTorch takes minutes for hidden
    states of 1,024 numbers: they have 64.
    """
    width = 64 if bits == 16 and not cpu.has_bfloat16_dot() else 1024
    shape = {**tokens, "H": width, "V": 151_936 // 4, "bits": bits, "masked": masked}
    return "forward+backward", shape


def _not_behind(what: str, op: str, shape: dict[str, int]) -> Iterator[Target]:
    yield Target(what, (op, "forward", shape), "x eager", SMALLEST)
    yield Target(what, (op, "forward", shape), "x compile", SMALLEST)


def value_of(target: Target, done: ProblemReport) -> float | None:
    """The measure; None where ours or the rival's result is wrong or missing."""
    results = {result.implementation: result for result in done.results}
    ours = results[OURS]
    if target.measure == "x eager":
        return ours.over_eager
    if target.measure == "x compile":
        return ours.over_compile
    if target.measure == "x with entropy":
        return results[WITH_ENTROPY].times_ours
    return _share_of_memory(target.case[2], ours, results[EAGER])


def _share_of_memory(shape: dict[str, int], ours: Result, eager: Result) -> float | None:
    """Of what is alive beside the gradients of a language head."""
    if ours.peak_extra_bytes is None or eager.peak_extra_bytes is None:
        return None
    rows = shape.get("B", 1) * shape["T"]
    gradients = (rows + shape["V"]) * shape["H"] * shape["bits"] // 8
    return (ours.peak_extra_bytes - gradients) / (eager.peak_extra_bytes - gradients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all targets and print a table of verdicts; 1 if one was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_targets",
        description="Measure what the kernels promise on a CPU, and say which target is met.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    facts = machine.header("cpu")
    report.print_header(console, facts, machine.warnings(facts))
    session = Session(facts, [], SECONDS_PER_TASK["small"])
    verdicts: list[dict[str, Any]] = []
    for case, wanted in _by_case(targets()):
        session.compiled = any(target.measure == "x compile" for target in wanted)
        with console.status("{} {} {}".format(*case)):
            done = session.measure(case)
        if done is not None:
            report.print_problem(console, *done)
        verdicts += [verdict(target, done and done[0]) for target in wanted]
        if options.json is not None:
            files.write_json(options.json, {**session.document(), "targets": verdicts})
    console.print(_table(verdicts))
    if options.json is not None:
        console.print(f"results: {options.json}", markup=False)
    return 0 if all(one["met"] for one in verdicts) else 1


def _by_case(wanted: Iterable[Target]) -> Iterator[tuple[Case, list[Target]]]:
    for case, some in groupby(wanted, lambda target: target.case):
        yield case, list(some)


def verdict(target: Target, done: ProblemReport | None) -> dict[str, Any]:
    """The target as the document has it."""
    op, mode, shape = target.case
    value = None if done is None else value_of(target, done)
    return {
        "what": target.what, "op": op, "mode": mode, "shape": shape, "measure": target.measure,
        "value": value, "bound": target.bound, "met": target.met_by(value),
    }  # fmt: skip


def _table(verdicts: list[dict[str, Any]]) -> Table:
    table = Table(title="targets", title_justify="left", title_style="bold")
    for heading in ("target", "measure", "value", "bound", ""):
        table.add_column(heading, justify="right" if heading in ("value", "bound") else "left")
    for one in verdicts:
        value = "-" if one["value"] is None else f"{one['value']:.3g}"
        sign = "<=" if one["measure"].startswith("share") else ">="
        table.add_row(
            one["what"], one["measure"], value, f"{sign} {one['bound']:g}",
            "met" if one["met"] else "[red]missed[/red]",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
