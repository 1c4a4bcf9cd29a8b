r"""Certified bounds of formulas, by interval arithmetic of any precision (mpmath).

Runs in the child process of `symbolic` only: evaluation has no bound on time of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import iv, mp

Tree = list[Any]
PRECISIONS = (64, 256, 1024, 4096)
MAX_BOUND_BITS = 40_000
MAX_POWER = 10**7
MAX_FACTORIAL = 20_000


class Undefined(ArithmeticError):
    """No real value here, or none that could be enclosed at this precision."""


def plain_rational(tree: Tree) -> Fraction | None:
    """The number that a product or quotient of literals is, None for anything else."""
    if tree[0] == "num":
        return Fraction(tree[1])
    if tree[0] in ("*", "/"):
        parts = [plain_rational(part) for part in tree[1:]]
        if any(part is None for part in parts):
            return None
        value = parts[0] or Fraction(0)
        for part in parts[1:]:
            if tree[0] == "/" and not part:
                return None
            value = value * (part or 0) if tree[0] == "*" else value / (part or 1)
        return value
    return None


def _number(value: Fraction) -> Any:
    return iv.mpf(value.numerator) / iv.mpf(value.denominator)


def _monotone(function: Any, x: Any, falling: bool = False) -> Any:
    """An enclosure of a monotone function that mpmath computes to the last place or nearly."""
    if falling:
        return -_monotone(lambda a: -function(a), x)
    with mp.workprec(iv.prec + 30):
        low, high = function(mpmath.mpf(x.a)), function(mpmath.mpf(x.b))
    if isinstance(low, mpmath.mpc) or isinstance(high, mpmath.mpc):
        raise Undefined
    slack = iv.mpf([-1, 1]) * iv.mpf(2) ** (-iv.prec - 4)
    return iv.mpf([low, high]) * (1 + slack) + slack


def _root(x: Any, degree: int) -> Any:
    if x.a == x.b == 0:
        return iv.mpf(0)
    if x.b < 0 and degree % 2:
        return -_root(-x, degree)
    if not x.a > 0:
        raise Undefined
    return iv.sqrt(x) if degree == 2 else iv.exp(iv.log(x) / degree)


def _power(base: Tree, exponent: Tree, at: Mapping[str, Fraction]) -> Any:
    number = plain_rational(exponent)
    if base[0] == "e":
        return iv.exp(enclose(exponent, at))
    x = enclose(base, at)
    if number is not None and number.denominator == 1 and abs(number) <= MAX_POWER:
        if number < 0 and 0 in x:
            raise Undefined
        return x ** int(number) if number >= 0 else 1 / x ** int(-number)
    y = enclose(exponent, at) if number is None else _number(number)
    if y.a == y.b and y.a == int(y.a) and abs(y.a) <= MAX_POWER and x.b < 0:
        return x ** int(y.a)
    if x.a > 0:
        return iv.exp(y * iv.log(x))
    if x.a == x.b == 0 and y.a > 0:
        return iv.mpf(0)
    raise Undefined


def _natural(tree: Tree, at: Mapping[str, Fraction]) -> int:
    value = plain_rational(tree)
    if value is None:
        x = enclose(tree, at)
        nearest = int(mpmath.nint(mpmath.mpf(x.mid)))
        if not (nearest in x and x.delta < 0.5):
            raise Undefined
        value = Fraction(nearest)
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise Undefined
    return int(value)


def _binomial(n: Tree, k: Tree, at: Mapping[str, Fraction]) -> Any:
    lower = _natural(k, at)
    product, top = iv.mpf(1), enclose(n, at)
    for i in range(min(lower, 2000)):
        product = product * (top - i) / (i + 1)
    if lower > 2000:
        raise Undefined
    return product


def _function(name: str, x: Any) -> Any:
    if name in ("sin", "cos", "tan"):
        return getattr(iv, name)(x)
    if name in ("cot", "sec", "csc"):
        below = {"cot": iv.tan, "sec": iv.cos, "csc": iv.sin}[name](x)
        if 0 in below:
            raise Undefined
        return 1 / below
    if name == "ln":
        return _logarithm(x)
    if name in ("arcsin", "arccos"):
        if x.a < -1 or x.b > 1:
            raise Undefined
        return _monotone(mp.asin if name == "arcsin" else mp.acos, x, name == "arccos")
    if name == "arctan":
        return _monotone(mp.atan, x)
    if name in ("sinh", "cosh", "tanh"):
        up, down = iv.exp(x), iv.exp(-x)
        parts = {"sinh": (up - down) / 2, "cosh": (up + down) / 2}
        return parts[name] if name in parts else (up - down) / (up + down)
    raise Undefined


def _logarithm(x: Any) -> Any:
    if not x.a > 0:
        raise Undefined
    return iv.log(x)


def enclose(tree: Tree, at: Mapping[str, Fraction]) -> Any:
    """An interval (mpmath's, at its present precision) that holds the real value of a tree.

    Args:
        at: values of the variables.
    Raises:
        Undefined: there is no real value, or none can be enclosed at this precision.
    """
    kind = tree[0]
    if kind == "num":
        return _number(Fraction(tree[1]))
    if kind == "sym":
        return _number(at[tree[1]])
    if kind in ("pi", "e"):
        return iv.pi + 0 if kind == "pi" else iv.exp(iv.mpf(1))
    if kind in ("+", "*"):
        total = enclose(tree[1], at)
        for part in tree[2:]:
            total = total + enclose(part, at) if kind == "+" else total * enclose(part, at)
        return total
    if kind == "/":
        below = enclose(tree[2], at)
        if 0 in below:
            raise Undefined
        return enclose(tree[1], at) / below
    if kind == "^":
        return _power(tree[1], tree[2], at)
    if kind == "root":
        degree = plain_rational(tree[1])
        if degree is None or degree.denominator != 1 or not 2 <= degree <= 1000:
            raise Undefined
        return _root(enclose(tree[2], at), int(degree))
    if kind == "fun":
        return _function(tree[1], enclose(tree[2], at))
    if kind == "log":
        below = _logarithm(enclose(tree[1], at))
        if 0 in below:
            raise Undefined
        return _logarithm(enclose(tree[2], at)) / below
    if kind == "abs":
        return abs(enclose(tree[1], at))
    if kind == "!":
        return iv.mpf(math.factorial(_natural(tree[1], at)))
    if kind == "binom":
        return _binomial(tree[1], tree[2], at)
    raise Undefined


def _size(tree: Tree, roots: dict[str, int]) -> tuple[float, float] | None:
    """log2 of u and l of the root bound (`zero_bits`); collects the distinct radicals."""
    kind = tree[0]
    if kind == "num":
        value = Fraction(tree[1])
        return (
            float(max(1, abs(value.numerator)).bit_length()),
            float(value.denominator.bit_length() if value.denominator > 1 else 0),
        )
    if kind in ("+", "*", "/"):
        parts = [_size(part, roots) for part in tree[1:]]
        sizes = [part for part in parts if part is not None]
        if len(sizes) != len(parts):
            return None
        upper, lower = sizes[0]
        for u, low in sizes[1:]:
            if kind == "+":
                upper, lower = max(upper + low, lower + u) + 1, lower + low
            elif kind == "*":
                upper, lower = upper + u, lower + low
            else:
                upper, lower = upper + low, lower + u
        return upper, lower
    degree, inner = Fraction(1), None
    if kind == "root":
        degree, inner = plain_rational(tree[1]) or Fraction(0), _size(tree[2], roots)
    elif kind == "^" and (power := plain_rational(tree[2])) is not None:
        base = _size(tree[1], roots)
        if base is not None and abs(power.numerator) <= MAX_BOUND_BITS:
            degree = Fraction(power.denominator)
            inner = (base[0] * abs(power.numerator), base[1] * abs(power.numerator))
            inner = inner if power >= 0 else (inner[1], inner[0])
    if inner is None or degree.denominator != 1 or not 1 <= degree <= 64:
        return None
    if degree == 1:
        return inner
    roots[str(tree)] = k = int(degree)
    upper, lower = inner
    if upper >= lower:
        return (upper + (k - 1) * lower) / k, lower
    return upper, ((k - 1) * upper + lower) / k


def zero_bits(tree: Tree) -> int | None:
    """b such that a number made by + - * / and roots is 0 if it is below 2^-b in size.

    The bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt (2001): |E| >= 1 / (u^(D-1) l)
    unless E = 0, with D the product of the degrees of the distinct radicals. None for other
    numbers, or if b exceeds 40,000.
    """
    roots: dict[str, int] = {}
    size = _size(tree, roots)
    if size is None:
        return None
    bits = (math.prod(roots.values()) - 1) * size[0] + size[1] + 2
    return None if bits > MAX_BOUND_BITS else int(bits) + 1
