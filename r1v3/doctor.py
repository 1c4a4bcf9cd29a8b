"""Checks of this installation, for `r1v3 doctor`."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from r1v3.shipped_files import own_file

PINNED = ("torch", "transformers", "numpy", "pydantic", "sympy", "scikit-learn")
OPTIONAL = {
    "triton": "the kernels on GPUs; comes with torch's builds for CUDA",
    "megatron-core": "training at scale",
    "transformer-engine": "faster layers in megatron-core",
    "flash-attn": "faster attention on GPUs",
    "apex": "fused optimizers in megatron-core; built from its source, never from a registry",
    "vllm": "rollouts at scale",
    "verl": "the verl adapter",
    "trl": "the TRL adapter",
    "nvidia-ml-py": "GPU power, clocks and errors in the metrics",
    "wandb": "logging to Weights & Biases",
}
LEAST_FREE_GIB = 2.0
CONSTRAINTS = own_file("constraints.txt")


@dataclass(frozen=True)
class Check:
    """One line of the report: `note` works but is worth knowing, `problem` must be repaired."""

    name: str
    status: Literal["ok", "note", "problem"]
    finding: str


def report(folder: Path | None = None, constraints: Path = CONSTRAINTS) -> list[Check]:
    """Check this Python, its packages, the device, and the disk of `folder` (default: here)."""
    pins = read_pins(constraints)
    return [
        _python(),
        *(_package(name, pins) for name in PINNED),
        _device(),
        _extension(),
        *(_optional(name, purpose) for name, purpose in OPTIONAL.items()),
        _disk(folder if folder is not None else Path.cwd()),
    ]


def healthy(checks: list[Check]) -> bool:
    """Whether nothing must be repaired."""
    return all(check.status != "problem" for check in checks)


def print_report(checks: list[Check], file: TextIO | None = None) -> None:
    """Print one aligned line per check and a last line that sums them up."""
    out = sys.stdout if file is None else file
    width = max(len(check.name) for check in checks)
    for check in checks:
        label = "" if check.status == "ok" else f"[{check.status}] "
        print(f"{check.name:<{width}}  {label}{check.finding}", file=out)
    problems = sum(check.status == "problem" for check in checks)
    print(f"\n{problems} problem{'s' * (problems != 1)} found", file=out)


def read_pins(constraints: Path) -> dict[str, str]:
    """Versions by normalized package name; empty where the file is not installed."""
    if not constraints.exists():
        return {}
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {_normalized(name): version.strip() for name, version in pairs}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _python() -> Check:
    machine = f"{platform.system()} {platform.machine()}"
    return Check("python", "ok", f"{platform.python_version()} on {machine}")


def _package(name: str, pins: dict[str, str]) -> Check:
    tested = pins.get(_normalized(name))
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        wanted = f"{name}=={tested}" if tested else name
        return Check(name, "problem", f"not installed; pip install {wanted}")
    if tested is None:
        return Check(name, "ok", version)
    if version.split("+")[0] != tested:
        return Check(name, "note", f"{version}; r1v3 was tested with {tested}")
    return Check(name, "ok", f"{version}, as tested")


def _device() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("device", "problem", f"torch cannot be imported: {error}")
    if not torch.cuda.is_available():
        cores = os.cpu_count() or 1
        threads = torch.get_num_threads()
        return Check("device", "ok", f"CPU, {cores} cores, torch uses {threads} threads; no CUDA")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    first = f"{devices[0].name}, {devices[0].total_memory / 2**30:.0f} GiB"
    return Check("device", "ok", f"{len(devices)} x {first}, CUDA {torch.version.cuda}")


def _extension() -> Check:
    name = "compiled kernels"
    try:
        extension = importlib.import_module("r1v3._C")
    except ImportError as error:
        advice = "the reference runs: same results, slower. To build them: pip install -e ."
        return Check(name, "note", f"{error}; {advice}")
    cuda = "with" if extension.built_with_cuda else "without"
    return Check(name, "ok", f"{extension.cpu_capability()}, {cuda} CUDA C++")


def _optional(name: str, purpose: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
    if importlib.util.find_spec(name.replace("-", "_")) is not None:
        return Check(name, "ok", "present, version unknown")
    return Check(name, "ok", f"not installed (optional: {purpose})")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / 2**30
    status: Literal["ok", "problem"] = "ok" if free >= LEAST_FREE_GIB else "problem"
    advice = "" if status == "ok" else f"; the demo and its checkpoints need {LEAST_FREE_GIB} GiB"
    return Check("disk", status, f"{free:.1f} GiB free in {folder}{advice}")
