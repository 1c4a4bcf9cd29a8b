"""Names of another package that are made to lead to r1v3, and back."""

import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from r1v3.integrations.versions import TESTED, requirement

# Replacements that are in place, by id: a name that leads to one is not rebound again.
_ours: dict[int, object] = {}


@dataclass(frozen=True)
class Name:
    """A name of another package, with the parameters it must have to be replaced.

    Attributes:
        module: where callers look the name up.
        path: attributes from the module on, such as "Engine.loss".
        parameters: names of its parameters in order, keyword-only ones after "*", as
            `parameters_of` writes them.
        replacement: the object that callers find instead.
        member: attributes from the object on to what `parameters` describes, for one whose own
            signature says nothing: "forward" of an autograd function.
        wraps: `replacement` is called with what was there and returns that object, which can hand
            back what r1v3 does not compute.
    """

    module: str
    path: str
    parameters: str
    replacement: Any
    member: str = ""
    wraps: bool = False

    @property
    def dotted(self) -> str:
        """The full name."""
        return f"{self.module}.{self.path}"


class Rebound:
    """Names that lead to r1v3 until `undo`, or until the end of a `with` block.

    Attributes:
        names: full names of what was rebound by this call, in order.
    """

    def __init__(self, undoing: list[tuple[str, object, str, object]]) -> None:
        self._undoing = undoing
        self.names = tuple(name for name, *_ in undoing)

    def undo(self) -> None:
        """Put back what was there before; a second call does nothing."""
        while self._undoing:
            _, owner, attribute, stock = self._undoing.pop()
            _ours.pop(id(getattr(owner, attribute)), None)
            setattr(owner, attribute, stock)

    def __enter__(self) -> "Rebound":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Rebound({', '.join(self.names)})"


def parameters_of(function: Any) -> str:
    """Return the parameters of a function without defaults and types: "a, b, *, c, **rest"."""
    parts: list[str] = []
    keywords_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            keywords_only = True
            parts.append(f"*{parameter.name}")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords_only:
            keywords_only = True
            parts.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        parts.append(stars + parameter.name)
    return ", ".join(parts)


def rebind(distribution: str, names: list[Name]) -> Rebound:
    """Replace every name, or none where one of them is not what the adapter was written for.

    A name that r1v3 has already replaced is left alone and not listed in the result.

    Args:
        distribution: the package as pip knows it, for the messages.

    Raises:
        ImportError: the package is not installed.
        RuntimeError: a name is missing or has other parameters; names the versions.
    """
    found: list[tuple[Name, Any]] = []
    for name in names:
        owner = _owner(distribution, name)
        if id(getattr(owner, name.path.split(".")[-1])) not in _ours:
            check_parameters(distribution, name)
            found.append((name, owner))
    undoing: list[tuple[str, object, str, object]] = []
    for name, owner in found:
        attribute = name.path.split(".")[-1]
        stock = getattr(owner, attribute)
        undoing.append((name.dotted, owner, attribute, stock))
        setattr(owner, attribute, name.replacement(stock) if name.wraps else name.replacement)
        bound = getattr(owner, attribute)
        _ours[id(bound)] = bound
    return Rebound(undoing)


def check_parameters(distribution: str, name: Name) -> None:
    """Check that a name exists and has the parameters it was replaced for.

    Raises:
        ImportError, RuntimeError: as `rebind`.
    """
    current = getattr(_owner(distribution, name), name.path.split(".")[-1])
    try:
        there = parameters_of(attrgetter(name.member)(current) if name.member else current)
    except AttributeError as error:
        raise RuntimeError(_missing(distribution, name)) from error
    if there != name.parameters:
        raise RuntimeError(
            f"{_written_for(distribution)}, where {name.dotted} takes ({name.parameters}); in "
            f"{_installed(distribution)} it takes ({there})"
        )


def _owner(distribution: str, name: Name) -> Any:
    """The module or class that holds the name."""
    package = name.module.split(".")[0]
    try:
        owner = importlib.import_module(name.module)
        for part in name.path.split(".")[:-1]:
            owner = getattr(owner, part)
        getattr(owner, name.path.split(".")[-1])
    except ModuleNotFoundError as error:
        if error.name == package:
            wanted = requirement(distribution)
            raise ImportError(f"{package} is not installed; pip install {wanted}") from error
        if error.name is None or not error.name.startswith(package + "."):
            raise
        raise RuntimeError(_missing(distribution, name)) from error
    except AttributeError as error:
        raise RuntimeError(_missing(distribution, name)) from error
    return owner


def _missing(distribution: str, name: Name) -> str:
    full = f"{name.dotted}.{name.member}" if name.member else name.dotted
    return f"{_written_for(distribution)}; {_installed(distribution)} has no {full}"


def _written_for(distribution: str) -> str:
    return f"this adapter was written for {distribution} {TESTED[distribution]}"


def _installed(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"the installed {distribution}"
