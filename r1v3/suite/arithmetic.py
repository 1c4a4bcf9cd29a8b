"""Values of formulas of the four operations that a model wrote, without running them."""

import ast
import re
from fractions import Fraction

_MOST = 200
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_COMMANDS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""))
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def left_side(text: str) -> ast.expr | None:
    """The formula in front of the first equals sign as a tree, or None if it is none.

    Only whole numbers, + - * / and parentheses make a formula.
    """
    plain = _FRACTION.sub(r"((\1)/(\2))", text)
    for command, sign in _COMMANDS:
        plain = plain.replace(command, sign)
    plain = plain.translate(_SIGNS).strip().strip("$").partition("=")[0].strip()
    if not plain or len(plain) > _MOST or not re.fullmatch(r"[\d\s+\-*/()]+", plain):
        return None
    if "**" in plain or "//" in plain:
        return None
    try:
        return ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def value(tree: ast.expr) -> Fraction | None:
    """The value of a formula, None where it divides by zero."""
    match tree:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=inner):
            inside = value(inner)
            if inside is None:
                return None
            return -inside if isinstance(tree.op, ast.USub) else inside
        case ast.BinOp():
            a, b = value(tree.left), value(tree.right)
            if a is None or b is None:
                return None
            match tree.op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.Div():
                    return None if b == 0 else a / b
    return None


def numbers(tree: ast.expr) -> list[int]:
    """The numbers of a formula, sorted."""
    return sorted(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, int)
    )


def same_formula(first: ast.expr, second: ast.expr) -> bool:
    """Whether two formulas are the same but for the order of the terms of sums and products."""
    return _form(first) == _form(second)


def _form(tree: ast.expr) -> str:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add | ast.Mult):
        return f"{type(tree.op).__name__}({', '.join(sorted(_terms(tree, type(tree.op))))})"
    if isinstance(tree, ast.BinOp):
        return f"{type(tree.op).__name__}[{_form(tree.left)}, {_form(tree.right)}]"
    return ast.unparse(tree)


def _terms(tree: ast.expr, kind: type[ast.operator]) -> list[str]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, kind):
        return _terms(tree.left, kind) + _terms(tree.right, kind)
    return [_form(tree)]
