"""Rebinding of another package's names: what is checked, what is put back, what the errors say."""

import sys
import types
from collections.abc import Callable, Iterator

import pytest

from r1v3.integrations import rebinding, versions
from r1v3.integrations.rebinding import Name, parameters_of, rebind


@pytest.fixture(autouse=True)
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A package `stack` with `stack.heads`, of which version 1.0 was tested."""

    class Engine:
        def loss(self, logits, label, *, entropy):  # type: ignore[no-untyped-def]
            return "stock loss"

    def head(hidden, weight, temperature=1.0):  # type: ignore[no-untyped-def]
        return "stock head"

    package, heads = types.ModuleType("stack"), types.ModuleType("stack.heads")
    package.__path__ = []  # type: ignore[attr-defined]
    heads.head, heads.Engine = head, Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stack", package)
    monkeypatch.setitem(sys.modules, "stack.heads", heads)
    monkeypatch.setitem(versions.TESTED, "stack", "1.0")
    yield heads


def ours(*_: object, **__: object) -> str:
    return "ours"


HEAD = Name("stack.heads", "head", "hidden, weight, temperature", ours)
LOSS = Name("stack.heads", "Engine.loss", "self, logits, label, *, entropy", ours)


def test_names_lead_to_the_replacement_until_undone(stack: types.ModuleType) -> None:
    """Fails if a method of a class is not replaced, or not put back, like a function."""
    with rebind("stack", [HEAD, LOSS]) as rebound:
        assert rebound.names == ("stack.heads.head", "stack.heads.Engine.loss")
        assert stack.head(1, 2) == stack.Engine().loss(1, 2, entropy=True) == "ours"
    assert stack.head(1, 2) == "stock head"
    assert stack.Engine().loss(1, 2, entropy=True) == "stock loss"


def test_an_exception_in_the_block_still_puts_everything_back(stack: types.ModuleType) -> None:
    """Fails if a failed step leaves another package changed."""
    with pytest.raises(ZeroDivisionError), rebind("stack", [HEAD]):
        _ = 1 / 0
    assert stack.head(1, 2) == "stock head"


def test_a_second_call_rebinds_nothing(stack: types.ModuleType) -> None:
    """Fails if the second undo puts r1v3 back where the first had restored the stack."""
    first = rebind("stack", [HEAD])
    second = rebind("stack", [HEAD, LOSS])
    assert second.names == ("stack.heads.Engine.loss",)
    first.undo()
    second.undo()
    second.undo()
    assert stack.head(1, 2) == "stock head"
    assert rebind("stack", [HEAD]).names == ("stack.heads.head",)


def test_a_replacement_can_hand_back_what_it_does_not_do(stack: types.ModuleType) -> None:
    """Fails if a wrapped name is lost, or wrapped a second time by a second call."""

    def wrap(stock: Callable[..., str]) -> Callable[..., str]:
        return lambda *arguments: f"ours around {stock(*arguments)}"

    names = [Name("stack.heads", "head", "hidden, weight, temperature", wrap, wraps=True)]
    with rebind("stack", names):
        assert rebind("stack", names).names == ()
        assert stack.head(1, 2) == "ours around stock head"
    assert stack.head(1, 2) == "stock head"


CHANGED: list[tuple[str, Callable[..., None]]] = [
    ("renamed", lambda hidden, w, temperature: None),
    ("another order", lambda weight, hidden, temperature: None),
    ("one less", lambda hidden, weight: None),
    ("one more", lambda hidden, weight, temperature, bias: None),
    ("one more with a default", lambda hidden, weight, temperature, bias=None: None),
    ("keyword-only", lambda hidden, weight, *, temperature: None),
    ("more positions", lambda hidden, weight, temperature, *rest: None),
    ("more keywords", lambda hidden, weight, temperature, **rest: None),
    ("positions alone", lambda *arguments: None),
    ("keywords alone", lambda **arguments: None),
    ("nothing", lambda: None),
]


@pytest.mark.parametrize(("how", "function"), CHANGED, ids=[how for how, _ in CHANGED])
def test_other_parameters_are_refused_and_nothing_is_changed(
    how: str, function: Callable[..., None], stack: types.ModuleType
) -> None:
    """Fails if a version with another signature is patched, or patched halfway."""
    stack.head = function  # type: ignore[attr-defined]
    stock = stack.Engine.loss
    with pytest.raises(RuntimeError) as stop:
        rebind("stack", [LOSS, HEAD])
    said = str(stop.value)
    assert "stack 1.0" in said and "stack.heads.head" in said and "\n" not in said
    assert f"({parameters_of(function)})" in said
    assert stack.Engine.loss is stock


@pytest.mark.parametrize(
    "name",
    [
        Name("stack.heads", "tail", "x", ours),
        Name("stack.heads", "Engine.step", "self", ours),
        Name("stack.heads", "Motor.loss", "self", ours),
        Name("stack.tails", "head", "x", ours),
        Name("stack.heads.deep", "head", "x", ours),
        Name("stack.heads", "head", "x", ours, member="forward"),
        Name("stack.heads", "head", "x", ours, member="__self__.forward"),
    ],
    ids=lambda name: name.dotted,
)
def test_a_missing_name_is_one_sentence(name: Name) -> None:
    """Fails if a version without the name ends in an AttributeError that names no version."""
    with pytest.raises(RuntimeError, match=r"written for stack 1\.0.*has no stack\."):
        rebind("stack", [name])


def test_a_missing_package_says_what_to_install() -> None:
    """Fails if the message for a stack that is not there does not name the tested version."""
    versions.TESTED["no-such-stack"] = "3.2"
    try:
        with pytest.raises(ImportError, match=r"pip install no-such-stack==3\.2"):
            rebind("no-such-stack", [Name("no_such_stack.heads", "head", "x", ours)])
    finally:
        del versions.TESTED["no-such-stack"]


def test_a_broken_stack_is_not_called_another_version(stack: types.ModuleType) -> None:
    """Fails if a dependency that the stack misses is reported as a change of its interface."""

    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'flash'", name="flash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebinding.importlib, "import_module", fail)
        with pytest.raises(ModuleNotFoundError, match="flash"):
            rebind("stack", [HEAD])


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: 0, ""),
        (lambda a: 0, "a"),
        (lambda a, b=1: 0, "a, b"),
        (lambda a, *, b: 0, "a, *, b"),
        (lambda *a: 0, "*a"),
        (lambda **a: 0, "**a"),
        (lambda a, *b, c: 0, "a, *b, c"),
        (lambda a, *b, c, **d: 0, "a, *b, c, **d"),
        (lambda *, a, b: 0, "*, a, b"),
        (lambda a, b, *, c=1, **d: 0, "a, b, *, c, **d"),
    ],
)
def test_parameters_are_written_without_defaults(function: Callable[..., int], text: str) -> None:
    """Fails if two signatures that callers can tell apart are written alike."""
    assert parameters_of(function) == text
