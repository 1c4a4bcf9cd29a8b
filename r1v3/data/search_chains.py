"""Cold-start chains that search: try, calculate, compare, and try the next, until something fits.

The teacher reads the scans through real classifiers (`digits.reading_probabilities`) and never
sees a label. Its trials come in the order of its hunches, which err, or in a fixed order, so that
dead ends are real and a chain is as long as its search was. A search that finds nothing looks at
the digits again.
Every calculation in a chain is right; what may be wrong is what was read, and chains whose answer
is wrong, or whose search did not end, are rejected afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from r1v3.data.chains import CAREFUL_STRENGTH, GLANCE_STRENGTH, Chain
from r1v3.data.digits import reading_probabilities
from r1v3.data.search_tasks import Range, all_signs
from r1v3.data.tasks import Problem
from r1v3.rewards.operators import from_left
from r1v3.rewards.rules import answers_match


@dataclass(frozen=True)
class Searcher:
    """Settings of the teacher that searches.

    allowed: the signs and digits of the questions.
    order: of the trials; by `hunch`, or `fixed`: all plus first, the last sign changing fastest.
    noise: standard deviation of a hunch, in units of the value that it is about.
    plain: chance that a further trial goes on without a word that opens it, and that of two hands
        only the first is looked at.
    sharpness: exponent on the probabilities of a first look.
    check: chance to verify what fits by calculating back to the first digit.
    most_trials: a search of more trials is given up.
    """

    allowed: Range = Range()
    order: Literal["hunch", "fixed"] = "hunch"
    noise: float = 4.0
    plain: float = 0.0
    sharpness: float = 2.0
    check: float = 0.2
    most_trials: int = 8


def ways_in_order(
    digits: Sequence[int], target: int, searcher: Searcher, rng: np.random.Generator
) -> list[str]:
    """Every way to fill in signs, in the order in which the teacher tries them."""
    ways = all_signs(digits, searcher.allowed.signs)
    if searcher.order == "fixed":
        return list(ways)
    misses = np.array([abs(value - target) for value in ways.values()], dtype=np.float64)
    felt = misses + rng.normal(0.0, searcher.noise, len(misses))
    return [list(ways)[i] for i in np.argsort(felt)]


def calculation(digits: Sequence[int], signs: str) -> str:
    """A line calculated sign by sign from the left: `3+5=8, 8-1=7`."""
    value, steps = digits[0], []
    for sign, digit in zip(signs, digits[1:], strict=True):
        reached = from_left((value, digit), sign)
        steps.append(f"{value}{sign}{digit}={reached}")
        value = reached
    return ", ".join(steps)


def calculation_back(digits: Sequence[int], signs: str, target: int) -> str:
    """From the target back to the first digit, for + and -: `7+1=8, 8-5=3`."""
    undone = "".join("-" if sign == "+" else "+" for sign in reversed(signs))
    return calculation([target, *reversed(digits[1:])], undone)


def trial(digits: Sequence[int], signs: str, target: int) -> str:
    """Signs, their line calculated, and by how much it misses: `+-: 3+5=8, 8-1=7, 7-7=0 fits.`

    A small model learns to calculate the miss as it learns any other sum; whether two numbers are
    equal it did not learn in some hundred steps.
    """
    verdict = "fits" if from_left(digits, signs) == target else "not"
    return f"{signs}: {calculation((*digits, target), signs + '-')} {verdict}."


def _opening(previous: str, way: str) -> str:
    """The word that opens a further trial: another beginning, or the same with another end."""
    return "Alternatively" if previous[0] != way[0] else "Wait"


def _search(
    digits: Sequence[int], target: int, searcher: Searcher, rng: np.random.Generator
) -> tuple[list[str], str | None]:
    """The sentences of a search, one per trial, and the signs that were found to fit, if any."""
    sentences: list[str] = []
    previous = ""
    for way in ways_in_order(digits, target, searcher, rng):
        spoken = previous and rng.random() >= searcher.plain
        opening = f"{_opening(previous, way)}, " if spoken else ""
        sentences.append(opening + trial(digits, way, target))
        if from_left(digits, way) == target:
            return sentences, way
        previous = way
    return sentences, None


def _read(
    row: Sequence[int], strength: float, sharpness: float, rng: np.random.Generator
) -> tuple[int, ...]:
    """Digits of a row of scans, drawn from a reader's probabilities to the power of `sharpness`."""
    p = reading_probabilities(strength)[list(row)] ** sharpness
    return tuple(int(rng.choice(10, p=q / q.sum())) for q in p)


def search_signs(problem: Problem, searcher: Searcher, rng: np.random.Generator) -> Chain | None:
    """A chain for `operators`, right or wrong; None where the search did not end."""
    row = [scan for scans in problem.rows for scan in scans]
    target = int(problem.target)
    digits = _read(row, CAREFUL_STRENGTH, searcher.sharpness, rng)
    sentences = [f"I see {''.join(map(str, digits))} ({target})."]
    trials, way = _search(digits, target, searcher, rng)
    sentences += trials
    rechecks = len(trials) - 1
    if way is None:
        again = _read(row, CAREFUL_STRENGTH, 1.0, rng)
        if again == digits:
            return None
        digits = again
        trials, way = _search(digits, target, searcher, rng)
        sentences += [f"Hmm, it is {''.join(map(str, digits))} ({target}).", *trials]
        rechecks += len(trials)
    if way is None or rechecks >= searcher.most_trials:
        return None
    if "x" not in way and rng.random() < searcher.check:
        back = calculation_back(digits, way, target)
        sentences.append(f"Hmm, {back}, it fits.")
        rechecks += 1
    return Chain(" ".join(sentences), way, rechecks)


def look_twice(problem: Problem, searcher: Searcher, rng: np.random.Generator) -> Chain:
    """A chain for `two_hands`: one hand, mostly the other, and both weighed where they disagree."""
    first, second = (
        "".join(map(str, _read(row, GLANCE_STRENGTH, searcher.sharpness, rng)))
        for row in problem.rows
    )
    chosen, sentences = first, [f"I see {first}."]
    looks = 1 + (first != second)
    if rng.random() < searcher.plain:
        looks = 0
    elif first == second:
        sentences.append(f"Hmm, the second is {second}, it fits.")
    else:
        p = reading_probabilities(CAREFUL_STRENGTH)
        chosen = ""
        for a, b, one, other in zip(first, second, *problem.rows, strict=True):
            evidence = p[one] * p[other]
            chosen += a if evidence[int(a)] >= evidence[int(b)] else b
        sentences.append(f"Wait, the second is {second}. Hmm, {first} or {second}. It is {chosen}.")
    digits = [int(digit) for digit in chosen]
    sentences.append(f"{calculation(digits, '+' * (len(digits) - 1))}.")
    return Chain(" ".join(sentences), str(sum(digits)), looks)


def sample_search(
    problem: Problem, searcher: Searcher, rng: np.random.Generator, tries: int = 4
) -> tuple[Chain | None, int]:
    """The first of at most `tries` chains that ends in the right answer, and the tries used."""
    think = look_twice if problem.domain == "two_hands" else search_signs
    for attempt in range(1, tries + 1):
        chain = think(problem, searcher, rng)
        if chain is not None and answers_match(chain.answer, problem.answer):
            return chain, attempt
    return None, tries
