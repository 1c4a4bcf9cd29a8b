r"""Arithmetic on trees: the rational number that a formula is, the matrix that it is."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import reduce

from r1v3.rewards.formula import Tree, Unreadable, number
from r1v3.rewards.symbolic import Undecided

MAX_BITS = 1 << 16
MAX_FACTORIAL = 4000
MAX_CELL = 400


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 2 * MAX_BITS:
        raise Undecided("a number of too many digits")
    return value


def _integer_root(value: int, degree: int) -> int | None:
    """The exact root of a natural number, or None if it has none."""
    if value < 2:
        return value
    low, high = 1, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < value:
            low = middle + 1
        else:
            high = middle
    return low if low**degree == value else None


def _root(value: Fraction, degree: int) -> Fraction | None:
    if not 2 <= degree <= 64 or (value < 0 and degree % 2 == 0):
        return None
    top, bottom = (_integer_root(n, degree) for n in (abs(value.numerator), value.denominator))
    if top is None or bottom is None:
        return None
    return Fraction(top if value >= 0 else -top, bottom)


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        if base < 0 or exponent.denominator > 64:
            return None
        root = _root(base, exponent.denominator)
        return None if root is None else _power(root, Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        raise Unreadable("a power of zero that is not defined")
    if base in (0, 1):
        return base
    if base == -1:
        return Fraction(1 if exponent.numerator % 2 == 0 else -1)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > MAX_BITS:
        raise Undecided("a power of too many digits")
    return base ** int(exponent)


def _combinations(n: Fraction, k: Fraction) -> Fraction:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= n or not 0 <= k:
        raise Undecided("a binomial of no natural numbers")
    if min(k, abs(n - k)) * n.numerator.bit_length() > MAX_BITS:
        raise Undecided("a binomial of too many digits")
    return Fraction(math.comb(int(n), int(k)))


def rational(tree: Tree) -> Fraction | None:
    """The rational number that a tree is, or None if it is none or not by arithmetic alone.

    Raises:
        Undecided: the number has too many digits (about 40,000).
        Unreadable: it is not defined, as 1/0.
    """
    kind = tree[0]
    if kind == "num":
        return Fraction(tree[1])
    if kind in ("sym", "pi", "e", "i", "inf", "fun", "abs", "matrix", "log"):
        inner = rational(tree[1]) if kind == "abs" else None
        return None if inner is None else abs(inner)
    parts = [rational(part) for part in tree[1:]]
    values = [part for part in parts if part is not None]
    if len(values) != len(parts):
        return None
    if kind == "+":
        return _bounded(sum(values, Fraction(0)))
    if kind == "*":
        product = Fraction(1)
        for value in values:
            product = _bounded(product * value)
        return product
    first, *rest = values
    if kind == "!":
        if first.denominator != 1 or first < 0 or first > MAX_FACTORIAL:
            raise Undecided("a factorial of too many digits")
        return Fraction(math.factorial(int(first)))
    second = rest[0]
    if kind == "/":
        if second == 0:
            raise Unreadable("a division by zero")
        return _bounded(first / second)
    if kind == "^":
        return _power(first, second)
    if kind == "root":
        return _root(second, int(first)) if first.denominator == 1 else None
    return _combinations(first, second)


def positive(tree: Tree) -> bool:
    """Whether a number is above zero by its form: no difference, no letter, no zero in it."""
    value = rational(tree)
    if value is not None:
        return value > 0
    if tree[0] in ("+", "*", "/", "root"):
        return all(positive(part) for part in tree[1:])
    return tree[0] == "^" and positive(tree[1]) or tree[0] in ("pi", "e")


def _size(tree: Tree) -> int:
    return 1 + sum(_size(part) for part in tree[1:] if isinstance(part, tuple))


def _cell(tree: Tree) -> Tree:
    value = rational(tree)
    if value is None and _size(tree) > MAX_CELL:
        raise Undecided("a matrix of large formulas")
    return tree if value is None else number(value)


def _scaled_matrix(matrix: Tree, scale: Tree, sign: str) -> Tree:
    cells = [(sign, *((cell, scale) if sign == "/" else (scale, cell))) for cell in matrix[2:]]
    return ("matrix", matrix[1], *(_cell(cell) for cell in cells))


def _matrix_sum(first: Tree, second: Tree) -> Tree:
    if first[1] != second[1] or len(first) != len(second):
        raise Unreadable("a sum of matrices of two shapes")
    cells = [("+", a, b) for a, b in zip(first[2:], second[2:], strict=True)]
    return ("matrix", first[1], *(_cell(cell) for cell in cells))


def _matrix_product(first: Tree, second: Tree) -> Tree:
    """The product of two factors in this order, each a matrix or a number."""
    if first[0] != "matrix":
        return _scaled_matrix(second, first, "*") if second[0] == "matrix" else ("*", first, second)
    if second[0] != "matrix":
        return _scaled_matrix(first, second, "*")
    inner, width = first[1], second[1]
    if len(second) - 2 != inner * width:
        raise Unreadable("a product of matrices that do not fit")
    rows = [first[i : i + inner] for i in range(2, len(first), inner)]
    columns = [second[2 + j :: width] for j in range(width)]
    cells = [
        ("+", *(("*", a, b) for a, b in zip(row, column, strict=True)))
        for row in rows
        for column in columns
    ]
    return ("matrix", width, *(_cell(cell) for cell in cells))


def matrix(tree: Tree) -> Tree | None:
    """The matrix that sums, products and multiples of written-out matrices are, else None.

    Raises:
        Unreadable: the shapes do not fit, or a function of a matrix.
        Undecided: its cells grow too large.
    """
    if tree[0] == "matrix":
        return tree
    subtrees = [part for part in tree[1:] if isinstance(part, tuple)]
    parts = [matrix(part) for part in subtrees]
    if all(part is None for part in parts):
        return None
    operands = [sub if part is None else part for sub, part in zip(subtrees, parts, strict=True)]
    if tree[0] == "+" and None not in parts:
        return reduce(_matrix_sum, operands)
    if tree[0] == "*":
        return reduce(_matrix_product, operands)
    if tree[0] == "/" and parts[1] is None:
        return _scaled_matrix(operands[0], operands[1], "/")
    if tree[0] == "^" and parts[1] is None and operands[1] in (("num", "2"), ("num", "3")):
        return reduce(_matrix_product, [operands[0]] * int(operands[1][1]))
    raise Unreadable("a function of a matrix")
