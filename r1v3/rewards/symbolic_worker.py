"""Child process of `symbolic`: decides questions about formulas. Run as a module, not imported.

Reads one JSON line `[question, tree, tree]` and writes one line: "1" yes, "0" no, "?" not shown.
"No" is always certified: two enclosures that do not meet. "Yes" is proved by a root bound (numbers
made by arithmetic and roots) or by sympy's simplification. The kernel ends the process when one
question has used its CPU seconds, even inside a big-integer power, where no Python exception could
be raised.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

CPU_SECONDS = 2.0
MEMORY_BYTES = 4 << 30
POINTS = 12
MAX_EXPONENT = 10_000

Tree = list[Any]


def _symbols(tree: Tree) -> set[str]:
    if tree[0] == "sym":
        return {tree[1]}
    return set().union(*(_symbols(part) for part in tree[1:] if isinstance(part, list)))


def _counted(tree: Tree) -> set[str]:
    """Variables that stand in factorials, binomials: they are natural numbers."""
    if tree[0] in ("!", "binom"):
        return _symbols(tree)
    return set().union(*(_counted(part) for part in tree[1:] if isinstance(part, list)))


def _points(*trees: Tree) -> Iterator[dict[str, Fraction]]:
    """Fixed points at which formulas are compared, positive and negative."""
    names = sorted(set().union(*(_symbols(tree) for tree in trees)))
    natural = set().union(*(_counted(tree) for tree in trees))
    rng = random.Random(20250708)
    for point in range(POINTS if names else 1):
        at = {}
        for name in names:
            if name in natural:
                at[name] = Fraction(rng.randrange(3, 40))
                continue
            scale = (1, 1, 10)[point % 3]
            at[name] = Fraction(rng.randrange(10**6, 10**7), rng.randrange(10**6, 10**7)) * scale
            if point % 2 and rng.random() < 0.7:
                at[name] = -at[name]
        yield at


def _shown_different(first: Tree, second: Tree) -> bool:
    """True if the two are certainly not equal somewhere."""
    from mpmath import iv

    from r1v3.rewards.enclosure import PRECISIONS, Undefined, enclose

    constant = not (_symbols(first) | _symbols(second))
    for at in _points(first, second):
        for precision in PRECISIONS if constant else PRECISIONS[:2]:
            iv.prec = precision
            try:
                difference = enclose(first, at) - enclose(second, at)
            except (Undefined, ZeroDivisionError):
                continue
            if 0 not in difference:
                return True
    return False


def _bound_shows_zero(difference: Tree) -> bool | None:
    """Whether an algebraic number is zero, by its root bound; None if it has none."""
    from mpmath import iv

    from r1v3.rewards.enclosure import Undefined, enclose, zero_bits

    bits = zero_bits(difference)
    if bits is None:
        return None
    iv.prec = bits + 128
    try:
        value = enclose(difference, {})
    except (Undefined, ZeroDivisionError):
        return None
    if 0 not in value:
        return False
    return True if abs(value).b < iv.mpf(2) ** -bits else None


def _expression(tree: Tree) -> Any:
    """The sympy expression of a tree, with positive variables."""
    import sympy

    kind = tree[0]
    if kind == "num":
        return sympy.Rational(tree[1])
    if kind == "sym":
        return sympy.Symbol(tree[1], positive=True)
    if kind in ("pi", "e", "i"):
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[kind]
    if kind == "fun":
        names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log"}
        return getattr(sympy, names.get(tree[1], str(tree[1])))(_expression(tree[2]))
    parts = [_expression(part) for part in tree[1:]]
    if kind in ("+", "*"):
        return sympy.Add(*parts) if kind == "+" else sympy.Mul(*parts)
    if kind == "/":
        return parts[0] / parts[1]
    if kind == "^":
        if parts[1].is_number and abs(parts[1]) > MAX_EXPONENT:
            raise OverflowError
        return parts[0] ** parts[1]
    if kind == "root":
        return (
            sympy.real_root(parts[1], parts[0]) if parts[1].is_real else parts[1] ** (1 / parts[0])
        )
    if kind == "log":
        return sympy.log(parts[1]) / sympy.log(parts[0])
    if kind == "abs":
        return sympy.Abs(parts[0])
    if kind in ("!", "binom"):
        return sympy.factorial(parts[0]) if kind == "!" else sympy.binomial(*parts)
    raise ValueError(kind)


def _simplifications() -> list[Callable[[Any], Any]]:
    import sympy

    return [
        lambda e: e,
        sympy.expand,
        lambda e: sympy.expand(sympy.expand_log(sympy.expand_trig(e))),
        sympy.simplify,
        lambda e: sympy.combsimp(sympy.expand_func(e)),
        lambda e: sympy.simplify(e.rewrite(sympy.exp)),
        lambda e: sympy.simplify(sympy.powsimp(sympy.expand_log(e))),
        lambda e: sympy.Integer(0) if _minimal_polynomial_is_x(e) else e,
    ]


def _minimal_polynomial_is_x(expression: Any) -> bool:
    import sympy

    if expression.free_symbols:
        return False
    x = sympy.Symbol("x")
    return bool(sympy.minimal_polynomial(expression, x) == x)


def _sympy_shows_zero(difference: Tree) -> bool:
    expression = _expression(difference)
    for simplify in _simplifications():
        try:
            if simplify(expression) == 0:
                return True
        except Exception:  # one way that fails says nothing about the next
            continue
    return False


def equal(first: Tree, second: Tree) -> bool | None:
    """Whether two formulas are equal; None if neither could be shown."""
    if _shown_different(first, second):
        return False
    difference = ["+", first, ["*", ["num", "-1"], second]]
    if not _symbols(difference):
        decided = _bound_shows_zero(difference)
        if decided is not None:
            return decided
    if _sympy_shows_zero(difference):
        return True
    return False if _sympy_shows_nonzero(difference) else None


def _sympy_shows_nonzero(difference: Tree) -> bool:
    """True for a complex number of exact parts that is not zero."""
    import sympy

    if _symbols(difference):
        return False
    expression = sympy.expand(_expression(difference), complex=True)
    return bool(expression.is_zero is False)


def within(tree: Tree, center: Fraction, distance: Fraction) -> bool | None:
    """Whether a real number lies within a distance of another; None if it could not be shown."""
    from mpmath import iv

    from r1v3.rewards.enclosure import PRECISIONS, Undefined, enclose

    for precision in PRECISIONS:
        iv.prec = precision
        try:
            gap = abs(enclose(tree, {}) - iv.mpf(center.numerator) / center.denominator)
        except (Undefined, ZeroDivisionError):
            continue
        limit = iv.mpf(distance.numerator) / distance.denominator
        if gap.b <= limit.a:
            return True
        if gap.a > limit.b:
            return False
    return None


def proportional(first: Tree, second: Tree) -> bool | None:
    """Whether two formulas differ by a constant factor other than 0; None if not shown."""
    import sympy
    from mpmath import iv

    from r1v3.rewards.enclosure import Undefined, enclose

    if _symbols(first) != _symbols(second):
        return False
    iv.prec = 128
    known = None
    for at in _points(first, second):
        try:
            ratio = enclose(first, at) / enclose(second, at)
        except (Undefined, ZeroDivisionError):
            continue
        known = ratio if known is None else known
        if ratio.b < known.a or ratio.a > known.b:
            return False
    quotient = sympy.simplify(_expression(first) / _expression(second))
    return True if quotient.is_number and quotient.is_zero is False else None


def decide(question: str, first: Tree, second: Tree) -> bool | None:
    """The answer to one request (module docstring)."""
    if question == "equal":
        return equal(first, second)
    if question == "proportional":
        return proportional(first, second)
    if question == "within":
        return within(first, Fraction(second[1]), Fraction(second[2]))
    raise ValueError(f"question {question!r} is not known")


def main() -> None:
    """Serve questions until standard input closes."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not write into the protocol
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.setrecursionlimit(10_000)
    try:
        equal(["root", ["num", "2"], ["sym", "x"]], ["*", ["num", "2"], ["sym", "x"]])
        _sympy_shows_zero(["num", "1"])
    except ImportError as error:
        replies.write(f"error {error}\n")
        return
    replies.write("ready\n")
    names: Mapping[bool | None, str] = {True: "1", False: "0", None: "?"}
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            answer = decide(*json.loads(line))
        except Exception:  # sympy raises nearly anything on odd input; nothing is then shown
            answer = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(names[answer] + "\n")


if __name__ == "__main__":
    main()
