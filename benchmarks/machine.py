"""The header of every result: on what, with what and from which commit it was measured."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def header(device: str, commit: str | None = None) -> dict[str, Any]:
    """Facts that a time means nothing without; "unknown" where one cannot be found.

    Args:
        commit: of a copy without its repository, as `git describe --always --dirty --abbrev=40`
            prints it; None to ask git.
    """
    commit, dirty = _commit() if commit is None else _described(commit)
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": _cpu_kernels(),
        "device": device,
    }
    if device != "cpu":
        facts.update(_gpu())
    return facts


def process_bytes(name: str) -> int | None:
    """Return a size of this process in bytes, such as VmRSS; None where no /proc tells it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def warnings(facts: dict[str, Any]) -> list[str]:
    """Remarks that a reader of the times should know."""
    found = []
    if facts["dirty"]:
        found.append("the working tree has uncommitted changes: nobody can repeat this exactly")
    if facts["commit"] == "unknown":
        found.append("no commit is known")
    if facts["load_average"] is not None and facts["load_average"] > 0.5 * facts["cores"]:
        found.append(
            f"other programs keep the machine busy (load average {facts['load_average']} "
            f"on {facts['cores']} cores): times are longer and noisier than they should be"
        )
    if facts["cpu_kernels"] == "not built" and facts["device"] == "cpu":
        found.append("the compiled kernels are not built: r1v3 runs its slow reference")
    return found


def _commit() -> tuple[str, bool]:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "unknown", True
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _described(commit: str) -> tuple[str, bool]:
    """The commit of `git describe --dirty`, and whether it says that there are changes."""
    return commit.removesuffix("-dirty"), commit.endswith("-dirty")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _cpu_kernels() -> str:
    try:
        return str(import_module("r1v3._C").cpu_capability())
    except ImportError:
        return "not built"


def _driver() -> str:
    """NVIDIA's driver as the kernel names it, or why it is not known."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError as error:
        return f"unknown ({error.strerror})"
    return text.splitlines()[0].strip()


def _gpu() -> dict[str, Any]:
    """Name, size, versions of CUDA and the driver, and clocks where nvidia-ml-py is installed."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts: dict[str, Any] = {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        facts["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        facts["gpu_clock_mhz"] = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        facts["memory_clock_mhz"] = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)
    except Exception as error:  # noqa: BLE001 - without clocks the times still stand
        facts["gpu_clock_mhz"] = f"unknown ({type(error).__name__})"
    return facts
