"""Reading the file of a study."""

from pathlib import Path
from typing import Any

from r1v3.config import ConfigError, Study
from r1v3.config.loading import checked, read_tree


def read_study(path: Path, *, quick: bool) -> Study:
    """Read a study.

    `extends` names a file, or several, whose keys this one adds to, later ones to earlier ones.
    Where the quick form is asked for, so do the keys under `quick` in all of them. Mappings are
    merged key by key, anything else replaces.

    Raises:
        ConfigError: as `r1v3.config.load`.
    """
    layers = _layers(path, ())
    hurried = [layer.pop("quick", None) or {} for layer in layers]
    merged: dict[str, Any] = {}
    for layer in [*layers, *(hurried if quick else [])]:
        if not isinstance(layer, dict):
            raise ConfigError(f"{path}: `quick` must hold a mapping of keys")
        merged = _merged(merged, layer)
    return checked(Study, merged, str(path))


def _layers(path: Path, above: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The mappings of a file and of those that it extends, the lowest first."""
    if path in above:
        raise ConfigError(f"{path} extends itself")
    tree = read_tree(path)
    below = tree.pop("extends", None) or []
    names = [below] if isinstance(below, str) else below
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: `extends` must name files, got {below!r}")
    found = []
    for name in names:
        found += _layers((path.parent / name).resolve(), (*above, path))
    return [*found, tree]


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys()}
    return {**below, **above, **both}
