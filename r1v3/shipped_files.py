"""Files that come with r1v3: the configs, the demo's base model, the tested versions."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# In a wheel they lie in the package; a checkout has them at its root.
_FOLDERS = (_PACKAGE / "shipped", _PACKAGE.parent)


def shipped(path: str | Path) -> Path:
    """Return a path such as configs/demo, or where it came with r1v3 if it is not in this folder.

    What is neither here nor shipped is returned as it is, and so is every other path.
    """
    path = Path(path)
    if path.exists() or path.parts[:1] not in (("assets",), ("configs",)):
        return path
    own = own_file(path)
    return own if own.exists() else path


def own_file(path: str | Path) -> Path:
    """Return where a file that comes with r1v3 lies, by its path from the repository's root."""
    return next((root / path for root in _FOLDERS if (root / path).exists()), _FOLDERS[0] / path)
