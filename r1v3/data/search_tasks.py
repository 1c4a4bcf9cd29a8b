"""Questions about handwritten digits that are answered by search, or by looking twice.

In domain: `operators` (fill in the signs between the digits of a row so that they give a printed
number) and `two_hands` (one number in two hands; either may be hard to read). Out of domain:
`column` (as operators, the digits one below the other) and `factors` (which two digits have a
printed product or sum). Every question has one solution, found by trying all; its difficulty is
`normal` or `hard` by the number of digits, which is what trials grow with.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

import numpy as np

from r1v3.data.compose import GRID
from r1v3.data.tasks import Problem, Sheet
from r1v3.rewards.operators import from_left, state_puzzle

SEARCH_IN_DOMAIN = ("operators", "two_hands")
SEARCH_OUT_OF_DOMAIN = ("column", "factors")
DIFFICULTIES = ("normal", "hard")
# One digit: a large number would say by itself that all signs are plus.
SEARCH_TARGETS = range(0, 10)
_DIGITS = {"normal": 3, "hard": 4}


def all_signs(digits: Sequence[int], signs: str) -> dict[str, int]:
    """Every way to fill in signs between digits, and the value from left to right of each."""
    ways = ("".join(way) for way in product(signs, repeat=len(digits) - 1))
    return {way: from_left(digits, way) for way in ways}


def solutions(digits: Sequence[int], signs: str, target: int) -> list[str]:
    """The ways to fill in signs that give `target`."""
    return [way for way, value in all_signs(digits, signs).items() if value == target]


def expected_trials(digits: Sequence[int], signs: str, target: int, noise: float | None) -> float:
    """Trials that a search takes on average, which tries ways in the order of its hunches.

    Without `noise` there are no hunches, and ways are tried in the order of `all_signs`.

    A hunch about a way is the distance of its value to the target plus a normal error of
    deviation `noise` (see `search_chains`); so a way that misses by d comes before the right one
    with probability Phi(-d / (noise sqrt 2)).
    """
    values = list(all_signs(digits, signs).values())
    if noise is None:
        return 1.0 + values.index(target)
    misses = [abs(value - target) for value in values]
    before = (math.erfc(miss / (2 * noise)) / 2 for miss in misses if miss)
    return 1 + sum(before)


@dataclass(frozen=True)
class Range:
    """Parts of questions about signs: the signs, of "+-x", and the largest digit."""

    signs: str = "+-"
    largest: int = 9

    def digits(self, count: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Digits from 1 up: a zero would often leave two ways to reach the same value."""
        return tuple(int(d) for d in rng.integers(1, self.largest + 1, count))


def _puzzle(
    allowed: Range, difficulty: str, rng: np.random.Generator
) -> tuple[tuple[int, ...], str]:
    """Digits and the one way to fill in signs that gives its value, which is in SEARCH_TARGETS."""
    while True:
        digits = allowed.digits(_DIGITS[difficulty], rng)
        ways = all_signs(digits, allowed.signs)
        way = str(rng.choice(list(ways)))
        values = list(ways.values())
        if ways[way] in SEARCH_TARGETS and values.count(ways[way]) == 1:
            return digits, way


def _listed(signs: str) -> str:
    return " or ".join([", ".join(signs[:-1]), signs[-1]]) if len(signs) > 1 else signs


def operators(
    split: str, rng: np.random.Generator, difficulty: str, allowed: Range, *, column: bool = False
) -> Problem:
    """Which signs between the digits of a row, or of a column, give the printed number."""
    digits, way = _puzzle(allowed, difficulty, rng)
    target = from_left(digits, way)
    sheet = Sheet(split, rng)
    if column:
        top = int(rng.integers(0, GRID - len(digits) + 1))
        for row, digit in enumerate(digits):
            sheet.write(str(digit), top + row, GRID - 1)
    else:
        sheet.write("".join(map(str, digits)), int(rng.integers(0, GRID)), GRID - 1)
    question = f"Fill in {_listed(allowed.signs)} from left to right to get ({target})."
    if column:
        question = question.replace("from left to right", "from top to bottom")
    return sheet.problem(
        "column" if column else "operators",
        question,
        state_puzzle(digits, way),
        target=str(target),
        difficulty=difficulty,
    )


def two_hands(split: str, rng: np.random.Generator, difficulty: str, allowed: Range) -> Problem:
    """The sum of the digits of a number that both rows show, each in its own hand.

    No scan comes twice. (The number itself is read as well without a thought: it was measured.)
    """
    length = _DIGITS[difficulty] - 1
    digits = allowed.digits(length, rng)
    number = "".join(map(str, digits))
    while True:
        sheet = Sheet(split, rng)
        top = int(rng.integers(0, GRID - 1))
        sheet.write(number, top, GRID - 1)
        sheet.write(number, top + 1, GRID - 1)
        if len({scan for row in sheet.rows for scan in row}) == 2 * length:
            break
    question = "Both rows show one number. Compute the sum of its digits."
    return sheet.problem("two_hands", question, str(sum(digits)), difficulty=difficulty)


def factors(split: str, rng: np.random.Generator, difficulty: str, allowed: Range) -> Problem:
    """Out of domain: which two digits of a row have the printed product or sum."""
    kind = str(rng.choice(["product", "sum"]))
    while True:
        digits = allowed.digits(_DIGITS[difficulty], rng)
        pairs = list(combinations(digits, 2))
        values = [a * b if kind == "product" else a + b for a, b in pairs]
        chosen = int(rng.integers(0, len(pairs)))
        if values.count(values[chosen]) == 1:
            break
    sheet = Sheet(split, rng)
    sheet.write("".join(map(str, digits)), int(rng.integers(0, GRID)), GRID - 1)
    question = f"Which two digits have the {kind} {values[chosen]}?"
    answer = "{}, {}".format(*pairs[chosen])
    return sheet.problem(
        "factors", question, answer, target=f"{kind} {values[chosen]}", difficulty=difficulty
    )


SEARCH_BUILDERS: dict[str, Callable[[str, np.random.Generator, str, Range], Problem]] = {
    "operators": operators,
    "two_hands": two_hands,
    "column": partial(operators, column=True),
    "factors": factors,
}
