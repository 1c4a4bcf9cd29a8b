"""Builds r1v3._C in place: `python -m benchmarks.device.build [--arch 90]`.

In a copy without pyproject.toml, which a build does not need and older setuptools refuse.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.device.plan import ROOT


def build(arch: str | None) -> bool:
    """Build with the CUDA kernel for this architecture, or without; whether that went well."""
    environment = {"R1V3_BUILD_CUDA": "0"}
    if arch is not None:
        environment = {"R1V3_BUILD_CUDA": "1", "R1V3_CUDA_ARCHS": arch}
    with tempfile.TemporaryDirectory(prefix="device-build-") as name:
        copy = Path(name)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        (copy / "r1v3").mkdir()
        shutil.copy(ROOT / "setup.py", copy)
        shutil.copy(ROOT / "r1v3/__init__.py", copy / "r1v3")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=copy, env={**os.environ, **environment})
        built = list((copy / "r1v3").glob("_C.*.so"))
        if done.returncode or not built:
            return False
        for library in built:
            # Not over a file that a process may have mapped.
            (ROOT / "r1v3" / library.name).unlink(missing_ok=True)
            shutil.copy(library, ROOT / "r1v3")
    return True


def main() -> int:
    """Build; 1 where the CUDA kernel could not be, and then the rest is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device.build", description=__doc__)
    parser.add_argument("--arch", help="of the CUDA kernel, as nvcc names it; without: none")
    arch = parser.parse_args().arch
    if build(arch):
        return 0
    if arch is not None and build(None):
        print("the CUDA kernel does not build; r1v3._C is built without it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
