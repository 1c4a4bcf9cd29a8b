r"""Signs filled in between digits: `+- (3+5-1=7)`, a puzzle with its solution as ground truth.

A calculation goes from left to right, without precedence: 1+2x3 is 9. An answer is right by its
value, not by its text: the signs alone (`+-`, `+, -`) or the whole line (`3+5-1`, `3+5-1=7`, with
`\times`, `*` or `×` for x), which must then have the puzzle's digits in the puzzle's order.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SIGNS = "+-x"
_PUZZLE = re.compile(r"([-+x]{1,12}) \((\d(?:[-+x]\d){1,12})=(-?\d{1,14})\)")
_LINE = re.compile(r"(\d(?:[-+x]\d){1,12})(?:=(-?\d{1,14}))?")
_SPELLINGS = (
    ("\\times", "x"),
    ("\\cdot", "x"),
    ("*", "x"),
    ("×", "x"),
    ("X", "x"),
    ("\u2212", "-"),
    ("\u2013", "-"),
)


def from_left(digits: Sequence[int], signs: str) -> int:
    """Calculate from left to right, without precedence.

    Args:
        digits: n integers.
        signs: n - 1 of "+", "-" and "x".

    Raises:
        ValueError: there are not as many signs, or one is none of these.
    """
    value = digits[0]
    for sign, digit in zip(signs, digits[1:], strict=True):
        if sign not in SIGNS:
            raise ValueError(f"sign {sign!r} is not one of {', '.join(SIGNS)}")
        value = value + digit if sign == "+" else value - digit if sign == "-" else value * digit
    return value


def write_line(digits: Sequence[int], signs: str) -> str:
    """Digits with the signs between them: `3+5-1`."""
    return str(digits[0]) + "".join(f"{s}{d}" for s, d in zip(signs, digits[1:], strict=True))


@dataclass(frozen=True)
class Puzzle:
    """Digits between which signs are to be filled in, and the value that they are to have."""

    digits: tuple[int, ...]
    target: int

    def solved_by(self, answer: str) -> bool:
        """Return whether an answer, in any of the forms of this module, has the target's value."""
        for spelling, plain in _SPELLINGS:
            answer = answer.replace(spelling, plain)
        text = re.sub(r"[\s$]", "", answer).rstrip(".。")
        line = _LINE.fullmatch(text)
        if line is None:
            signs = re.sub("[,，、;]", "", text)
        else:
            signs = line[1][1::2]
            given = tuple(map(int, line[1][::2]))
            if given != self.digits or int(line[2] or self.target) != self.target:
                return False
        if len(signs) != len(self.digits) - 1 or not set(signs) <= set(SIGNS):
            return False
        return from_left(self.digits, signs) == self.target


def read_puzzle(ground_truth: str) -> Puzzle | None:
    """Return the puzzle that a ground truth such as `+- (3+5-1=7)` states, or None if none is."""
    found = _PUZZLE.fullmatch(ground_truth.strip())
    if found is None:
        return None
    signs, line, target = found.groups()
    puzzle = Puzzle(tuple(map(int, line[::2])), int(target))
    return puzzle if signs == line[1::2] and puzzle.solved_by(signs) else None


def state_puzzle(digits: Sequence[int], signs: str) -> str:
    """Write the ground truth that `read_puzzle` reads, of a puzzle that these signs solve."""
    return f"{signs} ({write_line(digits, signs)}={from_left(digits, signs)})"
