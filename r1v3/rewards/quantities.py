"""Plain numbers with an optional unit, compared exactly.

Everything is rational arithmetic on short literals, so no text can make it slow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1v3.rewards.choices import plain_text

RELATIVE_TOLERANCE = 1e-3
MAX_CHARS = 80

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:"
    rf"\\[dt]?frac\s*\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{_DECIMAL})\s*\}}"
    rf"|\\[dt]?frac\s*(?P<digit_top>\d)\s*(?P<digit_bottom>\d)"
    rf"|(?P<decimal>{_DECIMAL})(?:\s*/\s*(?P<over>{_DECIMAL})"
    rf"|[eE](?P<e>[+-]?\d{{1,3}})(?![\d.])"
    rf"|\s*(?:\\times|\\cdot|×|\*)\s*10\s*(?:\^|\*\*)\s*(?P<ten>\{{\s*[+-]?\d{{1,3}}\s*\}}|\d))?"
    rf")"
)
_SYMBOL_UNIT = re.compile(r"\\?%|°\s*[CF]?|\^\s*\{?\s*\\circ\s*\}?\s*[CF]?|\\degree")
_WORD_UNIT = re.compile(r"[A-Za-zµμΩ]+(?:\s*\^\s*\{?-?\d\}?|[²³])?")
_UNIT_SEPARATOR = re.compile(r"[ /·*]+")
# Shorter words than four letters could be variables ("2xy", "2pi"); these are read as units.
_SHORT_UNITS = frozenset(
    "nm µm μm mm cm dm m km in ft yd mi mg g kg t ms s min h hr Hz N kN J kJ W kW V mV A mA K C F "
    "L l mL ml Pa kPa Ω mol rad deg per sq day".split()
)
_TEXT_WRAPPER = re.compile(r"(?=\\(?:text|mathrm|mbox|rm)\s{0,4}\{)")
_DEGREES = frozenset(["°", "degrees", "degree", "\\degree", "\\circ"])


@dataclass(frozen=True)
class Number:
    """A number as written; `integer` means that it has no point, fraction or exponent."""

    value: Fraction
    unit: str
    integer: bool


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip("."))


def _unit_key(unit: str) -> str:
    key = unit.strip().strip(".").replace(" ", "").replace("^", "")
    key = key.replace("{", "").replace("}", "").replace("²", "2").replace("³", "3")
    if key in _DEGREES:
        return "degree"
    return "%" if key == "\\%" else key


def _is_unit(text: str, *, spaced: bool) -> bool:
    """True for `cm`, `km/h`, `m^2`, `%`, `apples`; a lone letter only if a space is before it."""
    if _SYMBOL_UNIT.fullmatch(text):
        return True
    parts = _UNIT_SEPARATOR.split(text.rstrip("."))
    if len(parts) > 5 or (len(parts[0]) == 1 and not spaced):
        return False
    for part in parts:
        if not _WORD_UNIT.fullmatch(part):
            return False
        word = re.split(r"[\s^²³]", part)[0]
        if len(word) < 4 and word not in _SHORT_UNITS:
            return False
    return True


def parse_number(text: str) -> Number | None:
    r"""The number that `text` is, or None if it is anything else or longer than 80 characters.

    Read: `12`, `-0.5`, `1,000`, `1{,}000`, `3/4`, `\frac{3}{4}`, `1.5e-3`, `1.5\times10^{-3}`, each
    with an optional unit (`%`, degrees, words). One minus sign may be U+2212.
    """
    if len(text) > MAX_CHARS:
        return None
    spaced_text = _TEXT_WRAPPER.sub(" ", text.replace("{,}", ",").replace("−", "-"))
    cleaned = plain_text(spaced_text).rstrip("。")
    match = _NUMBER.match(cleaned)
    if match is None:
        return None
    rest = cleaned[match.end() :]
    unit = rest.strip()
    if unit not in ("", ".") and not _is_unit(unit, spaced=rest != unit):
        return None
    part = match.groupdict()
    top = part["top"] or part["digit_top"] or part["decimal"]
    bottom = part["bottom"] or part["digit_bottom"] or part["over"]
    value = _decimal(top)
    if bottom:
        if _decimal(bottom) == 0:
            return None
        value /= _decimal(bottom)
    exponent = part["e"] or (part["ten"] or "").strip("{} ")
    if exponent:
        value *= Fraction(10) ** int(exponent)
    if part["sign"] == "-":
        value = -value
    integer = not (bottom or exponent or "." in top.rstrip("."))
    return Number(value, _unit_key(unit), integer)


def numbers_equal(gold: Number, answer: Number) -> bool:
    """Equal units (if both have one) and equal values.

    An integer gold must be met exactly; any other within a relative 1e-3 of gold, so that 0.333
    is accepted for 1/3 and 3.14 for 3.1416. Where only one of the two is a percentage, its value
    may be meant either way: 50% agrees with 50 and with 0.5.
    """
    expected, given = gold.value, answer.value
    candidates = [given]
    if "%" in (gold.unit, answer.unit) and gold.unit != answer.unit:
        if gold.unit and answer.unit:
            return False
        candidates.append(given / 100 if answer.unit == "%" else given * 100)
    elif gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.integer:
        return expected in candidates
    allowed = Fraction(str(RELATIVE_TOLERANCE)) * abs(expected)
    return any(abs(value - expected) <= allowed for value in candidates)
