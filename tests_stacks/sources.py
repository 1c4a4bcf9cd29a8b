"""Python sources of stacks that cannot be installed on a CPU, from wheels and repositories."""

import importlib.machinery
import sys
import types
from importlib import abc
from pathlib import Path
from typing import Any

import pytest

from r1v3.integrations.versions import COMMITS

FOLDER = Path(__file__).resolve().parent.parent / ".venvs" / "sources"


def put_on_path(distribution: str, *packages: str, within: str = "") -> None:
    """Make modules of a stack importable whose packages cannot be, for what they import in turn.

    Args:
        distribution: a folder of `FOLDER`.
        packages: dotted names that become empty packages with the stack's files below them.
        within: the folder of the distribution that the packages are in.
    """
    root = FOLDER / distribution / within
    if not root.is_dir():
        if distribution in COMMITS:
            url, commit = COMMITS[distribution]
            pytest.skip(f"{url} at {commit[:8]} could not be fetched", allow_module_level=True)
        raise FileNotFoundError(f"{root} is missing; run python -m tests_stacks.environments")
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


class _Anything:
    """Anything that a stack takes from a package that is not installed, and does not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """A decorator returns what it decorates."""
        sole = arguments[0] if len(arguments) == 1 and not options else None
        return sole if callable(sole) else self


class _Absent(types.ModuleType):
    """A package that is not installed."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Finder(abc.MetaPathFinder, abc.Loader):
    """Finds the modules of some packages, all of them empty."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(
        self, name: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def do_without(*packages: str) -> None:
    """Let a stack import packages that are not installed and that the tested parts do not call."""
    sys.meta_path.insert(0, _Finder(packages))


def stand_in(name: str, **names: Any) -> types.ModuleType:
    """Put a module of a stack in the place of one that needs far more than is called of it."""
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    return module
