"""Compiles the emulator together with csrc/cuda, once for each state of their sources."""

import contextlib
import hashlib
import importlib.util
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulator"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra",
         "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]  # fmt: skip


def load(root: Path = ROOT) -> Any:
    """The module `emulated`: the CUDA kernel of the sources below root/csrc, on this processor.

    Raises:
        subprocess.CalledProcessError: the sources do not compile.
    """
    library = _built(root)
    # By another name for other sources: pybind11 gives the same module for the same name.
    name = f"{library.parent.name}.emulated"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built(root: Path) -> Path:
    objects = _objects(root)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = objects / _digest(sorted((root / "csrc/cuda").iterdir())) / f"emulated{suffix}"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            kernel, linked = Path(folder) / "kernel.o", Path(folder) / "emulated.so"
            # The functions that this calls for are in races.cpp: ThreadSanitizer is not linked.
            _compile(root, "-fsanitize=thread", "-c", HERE / "kernel.cpp", "-o", kernel)
            _compile(root, "-shared", "-o", linked, kernel, *objects.glob("*.o"))
            linked.rename(library)  # complete, whoever else builds it
    return library


def _objects(root: Path) -> Path:
    """A folder with the objects of everything but the kernel."""
    headers = [*sorted((root / "csrc").rglob("*.h")), *sorted(HERE.iterdir())]
    folder = CACHE / _digest([path for path in headers if path.is_file()])
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            made = Path(temporary) / "objects"
            made.mkdir()
            for source in sorted(HERE.glob("*.cpp")):
                if source.name != "kernel.cpp":
                    _compile(root, "-c", source, "-o", made / f"{source.stem}.o")
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    return folder


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256(repr((FLAGS, sysconfig.get_config_var("EXT_SUFFIX"))).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(root: Path, *arguments: str | Path) -> None:
    includes = [root, HERE, pybind11.get_include(), sysconfig.get_path("include")]
    command = ["c++", *FLAGS, *(f"-I{folder}" for folder in includes), *map(str, arguments)]
    subprocess.run(command, check=True)
