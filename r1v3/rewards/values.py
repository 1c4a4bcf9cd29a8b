r"""Single values: a formula, the digits it shows if it is a decimal, and its unit.

Two exact values agree only if they are equal. A lone decimal is an approximation, and agrees with
what rounds to it: 3.1416 with `\pi`, 0.333 with 1/3. To stand for something else than its own value
it must show at least three digits, two of them significant (0.33 for 1/3, not 0.3), and it never
stands for another integer (not 1.02e3 for 1024). Decimals inside a larger formula are exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from r1v3.rewards.arithmetic import matrix, rational
from r1v3.rewards.formula import (
    FUNCTIONS,
    Token,
    Tree,
    Unreadable,
    free_symbols,
    number,
    parse_formula,
)
from r1v3.rewards.symbolic import proved_equal, proved_within
from r1v3.rewards.units import DEGREE, ONE, PERCENT, Unit, multiplier, parse_unit

MIN_SHOWN, MIN_SIGNIFICANT = 3, 2

_RADIAN = ("/", ("pi",), ("num", "180"))
_CURRENCY = {"dollar": "\\dollar", "euro": "\\euro", "pound": "\\pound", "yuan": "\\yuan"}
_SPEEDS = ("m / s", "m / s ^ 2", "m / s ^ { 2 }")
_HUNDREDTH = Fraction(1, 100)
_INFINITE = ("inf",)
_MINUS_INFINITE = ("*", ("num", "-1"), ("inf",))


@dataclass(frozen=True)
class Digits:
    """The precision of a decimal: a unit in its last place, and the number of its digits."""

    step: Fraction
    shown: int
    significant: int

    def stand_for_others(self) -> bool:
        """Whether there are enough of them to stand for a value that is not the decimal itself."""
        return self.shown >= MIN_SHOWN and self.significant >= MIN_SIGNIFICANT


@dataclass(frozen=True)
class Value:
    """A formula; `digits` if it is a lone decimal; `unit` if it has one that tells anything.

    `measured` is the other reading of a product that could be a number with a unit, as `20N`.
    """

    tree: Tree
    digits: Digits | None = None
    unit: Unit | None = None
    measured: Value | None = None

    def scaled(self, factor: Fraction, by: Tree | None = None) -> Value:
        """The value times a number, without its unit; its digits scale along."""
        if by is not None:
            return Value(("*", self.tree, by), None)
        if factor == 1 or self.tree in (_INFINITE, _MINUS_INFINITE):
            return Value(self.tree, self.digits)
        exact = rational(self.tree)
        tree = ("*", number(factor), self.tree) if exact is None else number(exact * factor)
        digits = self.digits and Digits(
            self.digits.step * factor, self.digits.shown, self.digits.significant
        )
        return Value(tree, digits)


def _digits(tokens: Sequence[Token]) -> Digits | None:
    r"""The digits of a lone decimal: `-0.50`, `1.2e-3`, `1.20\times 10^{-3}`."""
    rest = list(tokens)
    if rest and rest[0][:2] in (("op", "-"), ("op", "+")):
        rest = rest[1:]
    if not rest or rest[0].kind != "num":
        return None
    mantissa, _, exponent = rest[0].value.lower().partition("e")
    whole, point, decimals = mantissa.partition(".")
    if not point:
        return None
    power = int(exponent or "0")
    if len(rest) > 1:
        form = "".join(token.value for token in rest[1:])
        match = re.fullmatch(r"(?:cdot|times|\*)10(?:\^|\*\*)(?:\{([+-]?\d{1,3})\}|(-?\d))", form)
        if match is None:
            return None
        power += int(match[1] or match[2])
    significant = len((whole + decimals).lstrip("0"))
    step = Fraction(10) ** (power - len(decimals))
    return Digits(step, max(1, len(whole)) + len(decimals), significant)


def _spell(tokens: Sequence[Token]) -> str:
    """Tokens as the text of a unit."""
    names = {"cdot": "*", "times": "*", "circ": "\\circ"}
    return " ".join(
        names.get(t.value, "\\" + t.value) if t.kind == "cmd" else t.value for t in tokens
    )


def _unit_behind(tokens: Sequence[Token], start: int) -> Unit | None:
    """The unit that the tokens from `start` on are, if they can be nothing else."""
    suffix = tokens[start:]
    first = suffix[0]
    spelled = re.sub(r"\^ (?:\\circ|\{ \\circ \})", "degree", _spell(suffix))
    if spelled == "degree":
        names = [t.value for t in tokens[:start]]
        plain = not any(name in FUNCTIONS or name == "circ" for name in names)
        return DEGREE if plain else None
    if first[:2] == ("op", "%"):
        return PERCENT if len(suffix) == 1 else None
    if first.kind not in ("word", "cmd"):
        return None
    unit = parse_unit(spelled)
    if unit is None or first.text or not first.value.isascii():
        return unit
    if first.kind == "cmd":
        return unit if first.value not in ("pi", "Omega", "mu") or first.spaced else None
    # "2m" is a product; "2 m" is two metres, unless letters stand for numbers in front of it.
    if len(first.value) == 1 and not first.spaced:
        return unit if spelled in _SPEEDS and _lone_number(tokens[:start]) else None
    letters = any(t.kind == "word" and not t.text for t in tokens[:start])
    return None if letters and len(first.value) < 3 else unit


def _lone_number(tokens: Sequence[Token]) -> bool:
    return tokens[-1].kind == "num" and [t.value for t in tokens[:-1]] in ([], ["-"])


def _measured(tokens: Sequence[Token]) -> Value | None:
    """`20N` and `3m^2` as a number with a unit, where a letter without space may be a variable."""
    for start in (1, 2):
        if len(tokens) > start and tokens[start].kind == "word" and _lone_number(tokens[:start]):
            unit = parse_unit(_spell(tokens[start:]))
            if unit is not None:
                return Value(parse_formula(tokens[:start]), _digits(tokens[:start]), unit)
    return None


def parse_value(tokens: Sequence[Token], sign: int = 1) -> Value:
    r"""The value that tokens are: a formula, then perhaps a multiple ("million"), then a unit.

    Args:
        sign: see `parse_formula`.
    Raises:
        Unreadable: they are something else; nothing is ever left out.
    """
    unit: Unit | None = None
    tokens = list(tokens)
    if tokens and tokens[0].kind == "cmd" and tokens[0].value in _CURRENCY:
        unit, tokens = parse_unit(_CURRENCY[tokens[0].value]), tokens[1:]
    elif len(tokens) > 1 and tokens[0][:2] == ("op", "-") and tokens[1].value in _CURRENCY:
        unit, tokens = parse_unit(_CURRENCY[tokens[1].value]), [tokens[0], *tokens[2:]]
    for start in range(1, len(tokens)):
        found = _unit_behind(tokens, start)
        if found is not None:
            if unit is not None:
                raise Unreadable("two units")
            unit, tokens = found, tokens[:start]
            break
    factor = 1
    if len(tokens) > 1 and tokens[-1].kind == "word":
        if (multiple := multiplier(tokens[-1].value)) is not None:
            factor, tokens = multiple, tokens[:-1]
    tree = parse_formula(tokens, sign)
    if tree not in (_INFINITE, _MINUS_INFINITE) and _has_infinity(tree):
        raise Unreadable("arithmetic with infinity")
    value = Value(tree, _digits(tokens)).scaled(Fraction(factor))
    if unit is None and factor == 1:
        return replace(value, measured=_measured(tokens))
    return Value(value.tree, value.digits, None if unit == ONE else unit)


def _has_infinity(tree: Tree) -> bool:
    return tree[0] == "inf" or any(_has_infinity(p) for p in tree[1:] if isinstance(p, tuple))


def values_agree(gold: Value, answer: Value) -> bool:
    """Whether two values agree, units included (module docstring).

    A unit that only one of them has is taken as understood. A percentage is a hundredth part: for a
    gold 50%, the answers 50 (the sign left out) and 0.5 are right; for a gold 50, the answer 50% is
    another value. Ground truths leave degree signs out, and no angle in radians is a whole number
    but by accident: 30 and 30 degrees agree both ways, and an angle in degrees agrees with the same
    angle in radians if that is written without a unit. `20N` is a product, unless the other has a
    unit: then it is 20 newtons; `3m/s` is always a speed.

    Raises:
        Undecided: neither equality nor inequality could be shown.
    """
    if gold.unit is None and answer.unit is not None:
        if not answer.unit.noun and rational(answer.tree) != 1:
            return False
        gold = gold.measured or gold
    elif answer.unit is None and gold.unit is not None:
        answer = answer.measured or answer
    if gold.unit is not None and answer.unit is not None:
        if gold.unit.dimension != answer.unit.dimension:
            return False
        if gold.unit == answer.unit:
            return _agree(Value(gold.tree, gold.digits), Value(answer.tree, answer.digits))
        return _agree(gold.scaled(gold.unit.factor), answer.scaled(answer.unit.factor))
    plain = (Value(gold.tree, gold.digits), Value(answer.tree, answer.digits))
    if answer.unit is not None and answer.unit.dimension == PERCENT.dimension:
        return _agree(plain[0], plain[1].scaled(_HUNDREDTH))
    if _agree(*plain):
        return True
    unit = gold.unit or answer.unit
    if unit is not None and unit.dimension == PERCENT.dimension:
        return _agree(plain[0].scaled(_HUNDREDTH), plain[1])
    if unit == DEGREE:
        degrees, other = plain if gold.unit is not None else (plain[1], plain[0])
        if rational(degrees.tree) is None or (
            rational(other.tree) is not None and not other.digits
        ):
            return False
        return _agree(degrees.scaled(Fraction(1), _RADIAN), other)
    return False


def _agree(gold: Value, answer: Value) -> bool:
    infinite = (_INFINITE, _MINUS_INFINITE)
    if gold.tree in infinite or answer.tree in infinite:
        return gold.tree == answer.tree
    first, second = matrix(gold.tree), matrix(answer.tree)
    if first is not None and second is not None:
        return _matrices_agree(first, second)
    if gold.tree == answer.tree:
        rational(gold.tree)  # what is not defined equals nothing
        return True
    expected, given = rational(gold.tree), rational(answer.tree)
    if expected is not None and expected == given:
        return True
    decimals = [v for v in (gold, answer) if v.digits is not None]
    if not decimals:
        if expected is not None and given is not None:
            return False
        return proved_equal(gold.tree, answer.tree)
    coarse = max(decimals, key=lambda v: v.digits.step if v.digits else 0)
    other = answer if coarse is gold else gold
    assert coarse.digits is not None
    if free_symbols(other.tree):
        return False
    center, exact = rational(coarse.tree), rational(other.tree)
    assert center is not None
    if not coarse.digits.stand_for_others():
        return exact is None and proved_equal(other.tree, coarse.tree)
    if exact is None:
        return proved_within(other.tree, center, coarse.digits.step / 2)
    if exact.denominator == 1 and other.digits is None:
        return False
    return abs(exact - center) <= coarse.digits.step / 2


def _matrices_agree(gold: Tree, answer: Tree) -> bool:
    if gold[1] != answer[1] or len(gold) != len(answer):
        return False
    pairs = zip(gold[2:], answer[2:], strict=True)
    return all(_agree(Value(a), Value(b)) for a, b in pairs)
