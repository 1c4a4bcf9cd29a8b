"""Python sources of stacks that cannot be installed on a CPU, from their published wheels."""

import importlib.machinery
import sys
import types
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".venvs" / "sources"


def put_on_path(distribution: str, *packages: str) -> None:
    """Make modules of a stack importable whose packages cannot be, for what they import in turn.

    Args:
        distribution: a folder of `FOLDER`.
        packages: dotted names that become empty packages with the stack's files below them.
    """
    root = FOLDER / distribution
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is missing; run python -m tests_stacks.environments")
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
