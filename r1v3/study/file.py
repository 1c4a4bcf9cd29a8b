"""Reading the file of a study."""

from pathlib import Path
from typing import Any

from r1v3.config import ConfigError, Study
from r1v3.config.loading import checked, read_tree


def read_study(path: Path, *, quick: bool) -> Study:
    """Read a study.

    `extends: FILE` names a file beside it, whose keys it adds to; so do the keys under `quick`, in
    both, where the quick form is asked for. Mappings are merged key by key, anything else replaces.

    Raises:
        ConfigError: as `r1v3.config.load`.
    """
    tree = read_tree(path)
    layers = [tree]
    while (base := layers[0].pop("extends", None)) is not None:
        if not isinstance(base, str) or len(layers) > 8:
            raise ConfigError(f"{path}: `extends` must name a file beside it, got {base!r}")
        layers.insert(0, read_tree(path.parent / base))
    hurried = [layer.pop("quick", None) or {} for layer in layers]
    for layer in hurried:
        if not isinstance(layer, dict):
            raise ConfigError(f"{path}: `quick` must hold a mapping of keys")
    merged: dict[str, Any] = {}
    for layer in [*layers, *(hurried if quick else [])]:
        merged = _merged(merged, layer)
    return checked(Study, merged, str(path))


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys()}
    return {**below, **above, **both}
