"""Choice of the chains that are written: some of each question, balanced, and a validation part.

Everything follows from the set of answers, not from the order in which they came.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1v3.config import Choice

EASY, HARD = 0.75, 0.25


@dataclass(frozen=True)
class Candidate:
    """A chain that passed every filter.

    Attributes:
        words: of its thought.
        score: None where there is no scorer.
        pass_rate: of its question.
    """

    row: str
    sample: int
    domain: str
    words: int
    score: float | None
    pass_rate: float


@dataclass
class Chosen:
    """The chains to write, and why others are not.

    Attributes:
        train, validation: in the order of the candidates.
        dropped: reasons by (row, sample).
    """

    train: list[Candidate]
    validation: list[Candidate]
    dropped: dict[tuple[str, int], str]


def difficulty(pass_rate: float) -> str:
    """`easy`, `medium` or `hard` for a question's pass rate."""
    return "easy" if pass_rate >= EASY else "hard" if pass_rate <= HARD else "medium"


def choose(candidates: Sequence[Candidate], config: Choice, seed: int) -> Chosen:
    """Choose among chains, given in file order."""
    dropped: dict[tuple[str, int], str] = {}
    by_row: dict[str, list[Candidate]] = defaultdict(list)
    for one in candidates:
        if config.least_pass_rate <= one.pass_rate <= config.most_pass_rate:
            by_row[one.row].append(one)
        else:
            dropped[one.row, one.sample] = "pass rate"
    kept: list[Candidate] = []
    for group in by_row.values():
        best = sorted(group, key=lambda one: _preference(one, config))
        for one in best[config.per_question :]:
            dropped[one.row, one.sample] = "not selected"
        chosen = {one.sample for one in best[: config.per_question]}
        kept += [one for one in group if one.sample in chosen]
    balanced = balance(kept, config, seed)
    there = {(one.row, one.sample) for one in balanced}
    for one in kept:
        if (one.row, one.sample) not in there:
            dropped[one.row, one.sample] = "balance"
    held_out = _held_out(balanced, config.validation, seed)
    return Chosen(
        [one for one in balanced if one.row not in held_out],
        [one for one in balanced if one.row in held_out],
        dropped,
    )


def _preference(one: Candidate, config: Choice) -> tuple[float, int, int]:
    length = {"first": 0, "shortest": one.words, "longest": -one.words}[config.prefer]
    return (-(one.score or 0.0), length, one.sample)


def balance(candidates: Sequence[Candidate], config: Choice, seed: int) -> list[Candidate]:
    """At most `config.rows` chains, spread over domains and difficulties by their weights."""
    if config.rows is None or len(candidates) <= config.rows:
        return list(candidates)
    cells: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    for one in candidates:
        cells[one.domain, difficulty(one.pass_rate)].append(one)
    weights = {
        (domain, level): config.domains.get(domain, 1.0) * _level_weight(config, level)
        for domain, level in cells
    }
    shares = fill({cell: len(found) for cell, found in cells.items()}, weights, config.rows)
    chosen = {
        (one.row, one.sample)
        for cell, found in cells.items()
        for one in sorted(found, key=lambda one: _draw(seed, one.row, one.sample))[: shares[cell]]
    }
    return [one for one in candidates if (one.row, one.sample) in chosen]


def _level_weight(config: Choice, level: str) -> float:
    return {str(name): weight for name, weight in config.difficulties.items()}.get(level, 1.0)


def fill(
    available: Mapping[tuple[str, str], int], weights: Mapping[tuple[str, str], float], total: int
) -> dict[tuple[str, str], int]:
    """Divide `total` among cells by weight; what a cell does not have goes to the others.

    Returns:
        Whole numbers, at most what is available, whose sum is `total` if cells of a weight above 0
        have so many.
    """
    found = dict.fromkeys(available, 0)
    open_cells = [cell for cell in available if weights[cell] > 0]
    left = float(total)
    while open_cells and left > 0:
        weight = sum(weights[cell] for cell in open_cells)
        full = [c for c in open_cells if available[c] <= left * weights[c] / weight]
        if not full:
            parts = {cell: left * weights[cell] / weight for cell in open_cells}
            found |= {cell: int(part) for cell, part in parts.items()}
            rest = round(left) - sum(int(part) for part in parts.values())
            # The largest remainders get the rest; names decide among equals.
            by_rest = sorted(open_cells, key=lambda cell: (int(parts[cell]) - parts[cell], cell))
            for cell in by_rest[:rest]:
                found[cell] += 1
            break
        for cell in full:
            found[cell] = available[cell]
            left -= available[cell]
        open_cells = [cell for cell in open_cells if cell not in full]
    return found


def _held_out(candidates: Sequence[Candidate], rows: int, seed: int) -> set[str]:
    """Questions for validation: whole ones, at most `rows` rows, and not the half of all."""
    counts = Counter(one.row for one in candidates)
    room = min(rows, len(candidates) // 2)
    found: set[str] = set()
    for row in sorted(counts, key=lambda row: _draw(seed, row, -1)):
        if counts[row] <= room:
            found.add(row)
            room -= counts[row]
    return found


def _draw(seed: int, row: str, sample: int) -> str:
    """A place in a shuffled order that does not change when rows are added."""
    return hashlib.sha256(f"{seed}\0{row}\0{sample}\0choice".encode()).hexdigest()
