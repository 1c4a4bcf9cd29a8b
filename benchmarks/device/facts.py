"""Facts about this machine: `python -m benchmarks.device.facts --device D --json FILE`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import compilations, machine
from benchmarks.runner import first_line
from r1v3 import files
from r1v3.kernels import cuda
from r1v3.kernels.linear.head import adds_in_place


def probes(device: str) -> dict[str, Any]:
    """Answers that decide which way a kernel takes on this machine."""
    found: dict[str, Any] = {"built_with_cuda": cuda.built()}
    if device == "cpu":
        return found
    here = torch.device("cuda", torch.cuda.current_device())
    questions: dict[str, Callable[[], Any]] = {
        "addmm_of_bfloat16_into_float32": lambda: adds_in_place(here, torch.bfloat16),
        "triton_compilations": lambda: compilations.count(device),
    }
    for name, ask in questions.items():
        try:
            found[name] = ask()
        except Exception as error:  # noqa: BLE001 - that it raises is the answer
            found[name] = first_line(error)
    return found


def main() -> None:
    """Write the header, or the probes' answers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.facts", description=__doc__)
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit")
    parser.add_argument("--probes", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --device cpu shows the way without one")
    if options.probes:
        found = probes(options.device)
        files.write_json(options.json, found)
    else:
        found = machine.header(options.device, options.commit)
        files.write_json(options.json, {"header": found})
    print("\n".join(f"{name:<32} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
