"""A function of a stack against the one that stands in its place: values and gradients."""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sources import FOLDER

Function = Callable[..., Sequence[Tensor | None]]


def results(function: Function, *leaves: Tensor) -> list[Tensor]:
    """Results of a function, then each leaf's gradient of their random sum, in float64."""
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = [each for each in function(*copies) if each is not None]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(each.shape, generator=generator) for each in outputs]
    parts = [(o * w).sum() for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    torch.stack(parts).sum().backward()
    gradients = [leaf.grad for leaf in copies]
    return [each.detach().double() for each in (*outputs, *gradients) if each is not None]


def assert_close(
    wanted: Sequence[Tensor], found: Sequence[Tensor], tolerance: float = 1e-5
) -> None:
    """Compare lists of tensors, relative to the largest value of each."""
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all() and b.isfinite().all()
        if a.numel():
            scale = a.abs().max().clamp(min=1e-6)
            assert (a - b).abs().max() / scale < tolerance


def assert_same(stock: Function, ours: Function, *leaves: Tensor, tolerance: float = 1e-5) -> None:
    """Compare two functions of the same leaves."""
    assert_close(results(stock, *leaves), results(ours, *leaves), tolerance)


def function_of(distribution: str, path: str, name: str, **names: Any) -> Any:
    """A function or method of a stack's file that cannot be imported, executed by itself.

    Args:
        path: of the file in the distribution.
        names: what it finds as globals.
    """
    tree = ast.parse((FOLDER / distribution / path).read_text(encoding="utf-8"))
    (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    found.decorator_list = []
    found.returns = None
    for argument in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs):
        argument.annotation = None
    scope = {"torch": torch, "F": torch.nn.functional, **names}
    exec(compile(ast.Module([found], []), path, "exec"), scope)
    return scope[name]


def imported_by(distribution: str, path: str) -> set[str]:
    """Names that a stack's file imports from elsewhere, as its callers look them up."""
    tree = ast.parse((FOLDER / distribution / path).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
