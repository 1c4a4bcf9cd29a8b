"""YAML files, `key=value` overrides and messages that say what is wrong."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from r1v3.config.base import ConfigError, Section
from r1v3.shipped_files import shipped

ConfigT = TypeVar("ConfigT", bound=Section)


def load(kind: type[ConfigT], path: Path | str | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply `a.b=value` overrides, and validate.

    Args:
        kind: the stage's class.
        path: the file, or None for overrides alone. `{run}` in a value stands for `run`. It and
            `model` may name what came with r1v3, see `shipped`.
        overrides: `key=value` strings; values are parsed as YAML.

    Raises:
        ConfigError: names the file, the key, what was given and what would be right.
    """
    name = str(path) if path is not None else "the command line"
    tree = read_tree(path) if path is not None else {}
    for override in overrides:
        _override(tree, override)
    if isinstance(tree.get("run"), str):
        tree = _substitute(tree, tree["run"])
    if isinstance(tree.get("model"), str):
        tree["model"] = str(shipped(tree["model"]))
    return checked(kind, tree, name)


def read_tree(path: Path | str) -> dict[str, Any]:
    """Read the mapping that a YAML file holds; `path` may name what came with r1v3.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        tree = yaml.safe_load(shipped(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not {type(tree).__name__}")
    return tree


def checked(kind: type[ConfigT], tree: dict[str, Any], name: str) -> ConfigT:
    """Validate the mapping that `name` held.

    Raises:
        ConfigError: names `name`, the key, what was given and what would be right.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(kind, name, error)) from error


def _substitute(value: Any, run: str) -> Any:
    """`{run}` in any string below stands for the run folder."""
    if isinstance(value, str):
        return value.replace("{run}", run)
    if isinstance(value, dict):
        return {key: _substitute(item, run) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, run) for item in value]
    return value


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like key=value or section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is not a section")
        node = child
    # YAML 1.1 reads 1e-5 as text; where a number is wanted, validation makes it one.
    node[last] = value


def _explain(kind: type[Section], name: str, error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key `{location}`{_nearest(kind, problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"missing key `{location}`")
        elif location:
            lines.append(f"`{location}` = {problem['input']!r}: {problem['msg']}")
        else:
            lines.append(problem["msg"].removeprefix("Value error, "))
    return f"{name}: " + "; ".join(lines)


def _nearest(kind: type[Section], location: tuple[int | str, ...]) -> str:
    """` (did you mean ...?)` for an unknown key, from the fields of the section it stands in."""
    section: Any = kind
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        if field is None:
            return ""
        candidates = [field.annotation, *get_args(field.annotation)]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return ""
        section = models[0]
    keys = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
    if close:
        return f" (did you mean `{close[0]}`?)"
    return f" (known keys: {', '.join(keys)})"


def to_yaml(config: Section) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
