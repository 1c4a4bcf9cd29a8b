"""`python -m benchmarks.training_step`: a whole GRPO step, fused head against materialized logits.

Every variant trains the same random InternVL on the same tokens in a process of its own. Before it
is timed, its loss, its gradient norm of each part and its log-probs must agree with a float32
reference in plain PyTorch. The JSON document, schema version 1:

    {"schema": 1, "benchmark": "training_step", "header": {...}, "workload": {...},
     "model": {...}, "parameters": {part: count}, "tokens_per_step", "flops_per_step",
     "reference": {"loss", "grad_norms"}, "variants": [fields of worker.Row]}
"""

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import machine, report
from benchmarks.training_step.problem import DEFAULTS, REFERENCE, SHAPES, TRL, VARIANTS, Workload
from r1v3 import files

SCHEMA = 1
EXAMPLES = """examples:
  python -m benchmarks.training_step                    a tiny model on the CPU, 2 B on a GPU
  python -m benchmarks.training_step --device cuda --group 16 --json step.json
  python -m benchmarks.training_step --variants hf-fused hf-materialized --response-tokens 64

A variant whose numbers are wrong is not timed, one that does not fit says "out of memory". The
exit status is 1 when a variant is wrong or failed. TRL runs without activation checkpointing, as
the others do; it encodes a prompt once for every response.
"""


def parse(arguments: Sequence[str] | None) -> tuple[Workload, list[str], float, Path | None]:
    """Workload, variants, seconds for a process, JSON file; exits with status 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step",
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=tuple(DEFAULTS), help="default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products")
    add("--model", choices=tuple(SHAPES), help="size of the model")
    add("--prompts", type=int, metavar="N", help="micro-batches, of one prompt each")
    add("--group", type=int, metavar="N", help="responses to a prompt")
    add("--prompt-tokens", type=int, metavar="N", help="image tokens included")
    add("--response-tokens", type=int, metavar="N")
    add("--tiles", type=int, metavar="N", help="pictures in a prompt")
    add("--repeats", type=int, metavar="N", help="timed steps")
    add("--variants", nargs="+", metavar="NAME", default=list(VARIANTS),
        help=f"of {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    add("--timeout", type=float, default=1800.0, metavar="S", help="for one process (%(default)s)")
    add("--json", type=Path, metavar="FILE", 
        help="write the results to FILE after every variant")  # fmt: skip
    options = parser.parse_args(arguments)
    for name in options.variants:
        if name not in VARIANTS:
            near = get_close_matches(name, VARIANTS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(VARIANTS)}"
            parser.error(f"unknown variant {name!r}; {hint}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; use --device cpu")
    if options.json is not None and options.json.is_dir():
        parser.error(f"--json {options.json}: is a directory, not a file")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {field.name: getattr(options, field.name) for field in fields(Workload)}
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        workload = replace(DEFAULTS[device], **changes)
    except ValueError as error:
        parser.error(str(error))
    return workload, list(dict.fromkeys(options.variants)), options.timeout, options.json


def run(folder: Path, variant: str, timeout: float) -> dict[str, Any]:
    """The row that a process of its own wrote, or one that says how it ended.

    Without a result, its output goes to stderr.
    """
    command = [sys.executable, "-m", "benchmarks.training_step.worker", str(folder), variant]
    try:
        done = subprocess.run(
            command, cwd=machine.ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"variant": variant, "status": "failed", "note": f"no result after {timeout:g} s"}
    written = folder / f"{variant}.json"
    if done.returncode == 0 and written.is_file():
        found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
        return found
    if done.returncode == -signal.SIGKILL:
        note = "killed, as the system does to a process that takes too much memory"
        return {"variant": variant, "status": "out of memory", "note": note}
    sys.stderr.write(done.stdout + done.stderr)
    lines = done.stderr.strip().splitlines()
    note = lines[-1] if lines else f"exit status {done.returncode}"
    return {"variant": variant, "status": "failed", "note": note}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the variants one after the other; 1 if one was wrong or failed."""
    workload, variants, timeout, target = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    with tempfile.TemporaryDirectory(prefix="training-step-") as name:
        folder = Path(name)
        workload.write(folder)
        with console.status("model, tokens and reference"):
            reference = run(folder, REFERENCE, timeout)
        if "header" not in reference:
            console.print(f"no reference: {reference['note']}", style="red", markup=False)
            return 1
        _print_start(console, workload, reference)
        rows = []
        for variant in variants:
            with console.status(variant):
                if variant == TRL and importlib.util.find_spec("trl") is None:
                    row = {"variant": TRL, "status": "absent", "note": "trl is not installed"}
                else:
                    row = run(folder, variant, timeout)
            rows.append(row)
            if target is not None:
                files.write_json(target, document(workload, reference, rows))
    _print_rows(console, rows, reference)
    if target is not None:
        console.print(f"results: {target}", markup=False)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def document(
    workload: Workload, reference: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON document."""
    facts = ("header", "parameters", "tokens_per_step", "flops_per_step")
    return {
        "schema": SCHEMA,
        "benchmark": "training_step",
        **{name: reference[name] for name in facts},
        "workload": asdict(workload),
        "model": asdict(workload.shape),
        "reference": {name: reference[name] for name in ("loss", "grad_norms")},
        "variants": rows,
    }


def _print_start(console: Console, workload: Workload, reference: dict[str, Any]) -> None:
    report.print_header(console, reference["header"], machine.warnings(reference["header"]))
    vision, text = workload.shape.vision, workload.shape.text
    console.print(
        f"\nInternVL of {sum(reference['parameters'].values()):,} parameters: vision "
        f"{vision['num_hidden_layers']} x {vision['hidden_size']}, language "
        f"{text['num_hidden_layers']} x {text['hidden_size']}, {text['num_attention_heads']} heads "
        f"on {text['num_key_value_heads']}, V = {workload.shape.vocab_size:,}\n"
        f"a step: {workload.prompts} micro-batches of 1 prompt ({workload.prompt_tokens} tokens, "
        f"{workload.tiles} pictures) with {workload.group} responses of {workload.response_tokens} "
        f"tokens, {workload.dtype} over float32 weights\n",
        highlight=False,
        markup=False,
    )


def _print_rows(console: Console, rows: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    table = Table()
    table.add_column("variant", no_wrap=True)
    headings = (
        "step", "p20 - p80", "tokens/s", "TFLOP/s", "MFU", "peak memory",
        "loss", "|g| vision", "|g| connector", "|g| llm", "max error",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_row("float32 reference", *["-"] * 6, *_numbers(reference), "-")
    for row in rows:
        if row["status"] in ("timed", "wrong"):
            worst = f"{max(row['errors'].values()):.1e}"
            table.add_row(row["variant"], *_speed(row), *_numbers(row), worst)
        else:
            table.add_row(row["variant"], row["status"], *["-"] * 10)
    console.print(table)
    for row in rows:
        if row.get("note"):
            console.print(f"  {row['variant']} {row['status']}: {escape(row['note'])}")


def _speed(row: dict[str, Any]) -> list[str]:
    timing = row["timing"]
    if timing is None:
        return [row["status"], *["-"] * 5]
    low, high = report.duration(timing["p20"]), report.duration(timing["p80"])
    return [
        report.duration(timing["median"]),
        f"{low} - {high}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tflops']:.3g}",
        "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        files.human_bytes(row["peak_memory_bytes"]),
    ]


def _numbers(row: dict[str, Any]) -> list[str]:
    return [f"{row['loss']:.6f}", *(f"{norm:.6f}" for norm in row["grad_norms"].values())]


if __name__ == "__main__":
    sys.exit(main())
