"""Questions about handwritten digits, in domains, with verifiable answers.

A `Problem` knows what stands in the picture (rows of scan ids), how it is asked, and how its answer
follows from any reading of the digits; the chains of thought are built on that in `chains`.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from r1v3.data.compose import GRID, Cell
from r1v3.data.digits import scans

IN_DOMAIN = ("arithmetic", "comparison", "ordering")
OUT_OF_DOMAIN = ("counting",)
LETTERS = "ABCD"
TRENDS = ("rise", "fall", "neither")
# A numeral, as digits are: the tokenizer keeps it apart from its neighbors, so that every cell of
# a transcribed grid is one token and stands at a fixed distance from its visual token.
EMPTY_CELL = "\u24ea"


@dataclass(frozen=True)
class Problem:
    """One question.

    `rows` are the scan ids of each number in the picture from top to bottom, `cells` where they
    stand, `target` what the question is about besides the picture (the sign, the digit to count),
    `difficulty` normal or hard where the domain is graded.
    """

    domain: str
    question: str
    answer: str
    rows: tuple[tuple[int, ...], ...]
    cells: tuple[Cell, ...]
    target: str = ""
    options: tuple[str, ...] | None = None
    difficulty: str | None = None

    def true_rows(self) -> tuple[str, ...]:
        """The digits of every row, correctly read."""
        return tuple("".join(str(scans().labels[s]) for s in row) for row in self.rows)


def show_grid(problem: Problem) -> str:
    """The cells of the picture in reading order, one token each: a digit, or EMPTY_CELL."""
    marks = {
        (cell.row, cell.column): str(scans().labels[cell.content])
        for cell in problem.cells
        if not isinstance(cell.content, str)
    }
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    return "".join(marks.get(place, EMPTY_CELL) for place in places)


@dataclass
class Sheet:
    """Places numbers of one split on the grid."""

    split: str
    rng: np.random.Generator
    rows: list[tuple[int, ...]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def write(self, number: str, row: int, right: int) -> None:
        """Write a number so that its last digit stands in column `right`."""
        ids = tuple(int(self.rng.choice(scans().ids(self.split, int(d)))) for d in number)
        self.rows.append(ids)
        for offset, scan in enumerate(ids):
            self.cells.append(Cell(row, right - len(number) + 1 + offset, scan))

    def sign(self, sign: str, row: int, column: int) -> None:
        self.cells.append(Cell(row, column, sign))

    def problem(self, domain: str, question: str, answer: str, **kwargs: object) -> Problem:
        return Problem(
            domain,
            question,
            answer,
            tuple(self.rows),
            tuple(self.cells),
            **kwargs,  # type: ignore[arg-type]
        )


def _number(rng: np.random.Generator, two_digits: float = 0.7) -> int:
    return int(rng.integers(10, 100)) if rng.random() < two_digits else int(rng.integers(0, 10))


def arithmetic(split: str, rng: np.random.Generator) -> Problem:
    """Fill-in-the-blank: the sum or difference of two handwritten numbers, never negative."""
    sign = str(rng.choice(["+", "-"]))
    a, b = _number(rng), _number(rng)
    if sign == "-" and a < b:
        a, b = b, a
    sheet = Sheet(split, rng)
    top, right = int(rng.integers(0, GRID - 1)), GRID - 1
    sheet.write(str(a), top, right)
    sheet.write(str(b), top + 1, right)
    sheet.sign(sign, top + 1, right - 2)
    answer = str(a + b if sign == "+" else a - b)
    return sheet.problem("arithmetic", "Compute the result.", answer, target=sign)


def comparison(split: str, rng: np.random.Generator) -> Problem:
    """Multiple choice: which row of three shows the largest or the smallest number."""
    kind = str(rng.choice(["largest", "smallest"]))
    values: list[int] = []
    while len(values) < 3:
        value = int(rng.integers(10, 100))
        if value not in values:
            values.append(value)
    sheet = Sheet(split, rng)
    top, right = int(rng.integers(0, GRID - 2)), GRID - 1
    for row, value in enumerate(values):
        sheet.write(str(value), top + row, right)
    best = max(values) if kind == "largest" else min(values)
    names = [f"row {i + 1}" for i in range(3)]
    answer = LETTERS[values.index(best)]
    question = f"Which row shows the {kind} number?"
    return sheet.problem("comparison", question, answer, target=kind, options=tuple(names))


def ordering(split: str, rng: np.random.Generator) -> Problem:
    """Multiple choice: whether three digits rise, fall, or do neither."""
    digits = sorted(int(d) for d in rng.choice(10, 3, replace=False))
    kind = int(rng.integers(0, 3))
    neither = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1))
    order = ((0, 1, 2), (2, 1, 0), neither[int(rng.integers(0, 4))])[kind]
    sheet = Sheet(split, rng)
    row = int(rng.integers(0, GRID))
    sheet.write("".join(str(digits[i]) for i in order), row, GRID - 1)
    question = "Do the digits rise, fall or neither?"
    return sheet.problem("ordering", question, LETTERS[kind], options=TRENDS)


def counting(split: str, rng: np.random.Generator) -> Problem:
    """Out of domain: how often a digit stands in rows of digits."""
    target = int(rng.integers(0, 10))
    sheet = Sheet(split, rng)
    n_rows = int(rng.integers(2, 4))
    top = int(rng.integers(0, GRID - n_rows + 1))
    total = 0
    for row in range(n_rows):
        length = int(rng.integers(2, 4))
        number = "".join(
            str(target) if rng.random() < 0.4 else str(rng.integers(0, 10)) for _ in range(length)
        )
        total += number.count(str(target))
        sheet.write(number, top + row, GRID - 1)
    question = f"How many times does the digit {target} appear?"
    return sheet.problem("counting", question, str(total), target=str(target))


def reading(split: str, rng: np.random.Generator) -> Problem:
    """Transcription of the picture: alignment data for pre-training and connector tuning."""
    sheet = Sheet(split, rng)
    n_rows = int(rng.integers(1, GRID + 1))
    top = int(rng.integers(0, GRID - n_rows + 1))
    for row in range(n_rows):
        length = int(rng.integers(1, GRID + 1))
        number = "".join(str(d) for d in rng.integers(0, 10, length))
        sheet.write(number, top + row, GRID - 1)
    problem = sheet.problem("reading", "Read the digits row by row.", "")
    return replace(problem, answer=" ".join(problem.true_rows()))


def grid(split: str, rng: np.random.Generator) -> Problem:
    """Digits strewn over the grid, every cell on its own: alignment data."""
    sheet = Sheet(split, rng)
    for row in range(GRID):
        for column in range(GRID):
            if rng.random() < 0.7:
                sheet.write(str(rng.integers(0, 10)), row, column)
    problem = sheet.problem("grid", "Transcribe the grid cell by cell.", "")
    return replace(problem, answer=show_grid(problem))


BUILDERS = {
    "arithmetic": arithmetic,
    "comparison": comparison,
    "ordering": ordering,
    "counting": counting,
    "reading": reading,
    "grid": grid,
}
