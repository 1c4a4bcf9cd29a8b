"""Questions that are answered by search: one solution each, graded, of one split's scans."""

import re
from itertools import combinations, product

import numpy as np
import pytest

from r1v3.data.compose import GRID
from r1v3.data.digits import SPLITS, scans
from r1v3.data.search_chains import Searcher, ways_in_order
from r1v3.data.search_tasks import (
    DIFFICULTIES,
    SEARCH_BUILDERS,
    SEARCH_IN_DOMAIN,
    SEARCH_OUT_OF_DOMAIN,
    Range,
    all_signs,
    expected_trials,
)
from r1v3.data.tasks import Problem
from r1v3.rewards import accuracy_reward
from r1v3.rewards.operators import read_puzzle

KINDS = list(product(SEARCH_BUILDERS, DIFFICULTIES))
COUNT = {"normal": 3, "hard": 4}
ALL = Range()


def problems(
    domain: str,
    difficulty: str = "normal",
    *,
    split: str = "test",
    seed: int = 0,
    count: int = 40,
    allowed: Range = ALL,
) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [SEARCH_BUILDERS[domain](split, rng, difficulty, allowed) for _ in range(count)]


def drawn(problem: Problem) -> list[int]:
    """The digits in the picture's cells, from top to bottom and left to right."""
    cells = sorted(problem.cells, key=lambda cell: (cell.row, cell.column))
    return [int(scans().labels[cell.content]) for cell in cells]  # type: ignore[index]


def value(digits: list[int], signs: tuple[str, ...]) -> int:
    total = digits[0]
    for sign, digit in zip(signs, digits[1:], strict=True):
        total = {"+": total + digit, "-": total - digit, "x": total * digit}[sign]
    return total


def test_the_domains_are_those_that_have_a_builder() -> None:
    """Fails if a domain is both trained and held out, or cannot be asked."""
    assert {*SEARCH_IN_DOMAIN, *SEARCH_OUT_OF_DOMAIN} == set(SEARCH_BUILDERS)
    assert not set(SEARCH_IN_DOMAIN) & set(SEARCH_OUT_OF_DOMAIN)


@pytest.mark.parametrize("signs", ["+-", "+-x"])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("domain", ["operators", "column"])
def test_signs_have_exactly_one_solution(domain: str, difficulty: str, signs: str) -> None:
    """Fails if a right answer would be judged wrong because there is another, or there is none."""
    for problem in problems(domain, difficulty, allowed=Range(signs)):
        digits, asked = drawn(problem), int(re.findall(r"to get \((\d+)\)", problem.question)[0])
        assert len(digits) == COUNT[difficulty] and str(asked) == problem.target
        right = [
            "".join(way)
            for way in product(signs, repeat=len(digits) - 1)
            if value(digits, way) == asked
        ]
        assert len(right) == 1
        puzzle = read_puzzle(problem.answer)
        assert puzzle is not None and (list(puzzle.digits), puzzle.target) == (digits, asked)
        assert accuracy_reward(f"\\boxed{{{right[0]}}}", problem.answer) == 1.0
        assert all(f"{sign}" in problem.question for sign in signs)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_two_hands_write_one_number_with_different_scans(difficulty: str) -> None:
    """Fails if the second look shows the very picture of the first, so that it tells nothing."""
    for problem in problems("two_hands", difficulty):
        first, second = problem.rows
        assert len(set(first + second)) == 2 * len(first) == 2 * (COUNT[difficulty] - 1)
        first_number, second_number = problem.true_rows()
        assert first_number == second_number
        assert problem.answer == str(sum(map(int, first_number)))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_factors_have_exactly_one_pair(difficulty: str) -> None:
    """Fails if two pairs of digits answer a question, in either order of naming them."""
    kinds = set()
    for problem in problems("factors", difficulty):
        kind, wanted = re.findall(r"the (product|sum) (\d+)", problem.question)[0]
        digits = drawn(problem)
        pairs = [
            (a, b)
            for a, b in combinations(digits, 2)
            if (a * b if kind == "product" else a + b) == int(wanted)
        ]
        assert len(digits) == COUNT[difficulty] and len(pairs) == 1
        for a, b in (pairs[0], pairs[0][::-1]):
            assert accuracy_reward(f"\\boxed{{{a}, {b}}}", problem.answer) == 1.0
        assert accuracy_reward(f"\\boxed{{{wanted}}}", problem.answer) == 0.0
        kinds.add(kind)
    assert kinds == {"product", "sum"}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("domain", "difficulty"), KINDS)
def test_a_problem_uses_scans_of_its_split_alone(domain: str, difficulty: str, split: str) -> None:
    """Fails if handwriting that was trained on turns up in a test."""
    allowed = set(scans().split[split].tolist())
    for problem in problems(domain, difficulty, split=split, count=8):
        assert {cell.content for cell in problem.cells} <= allowed


@pytest.mark.parametrize(("domain", "difficulty"), KINDS)
def test_cells_are_inside_the_grid_and_hold_the_rows(domain: str, difficulty: str) -> None:
    """Fails if digits are drawn on each other, outside the picture, or in another order."""
    for problem in problems(domain, difficulty):
        places = [(cell.row, cell.column) for cell in problem.cells]
        assert len(set(places)) == len(places)
        assert all(0 <= row < GRID and 0 <= column < GRID for row, column in places)
        assert "".join(map(str, drawn(problem))) == "".join(problem.true_rows())
        assert len({column for _, column in places}) == 1 or domain != "column"
        assert problem.difficulty == difficulty and problem.domain == domain


@pytest.mark.parametrize(("domain", "difficulty"), KINDS)
def test_the_same_seed_gives_the_same_problems(domain: str, difficulty: str) -> None:
    """Fails if two runs of one seed ask different questions, or two seeds the same ones."""
    assert problems(domain, difficulty, count=5) == problems(domain, difficulty, count=5)
    assert problems(domain, difficulty, count=5) != problems(domain, difficulty, seed=1, count=5)


@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_hard_questions_take_more_trials(noise: float) -> None:
    """Fails if difficulty says nothing about how long a search is."""
    means = []
    for difficulty in DIFFICULTIES:
        puzzles = [read_puzzle(p.answer) for p in problems("operators", difficulty, count=150)]
        trials = [expected_trials(p.digits, "+-", p.target, noise) for p in puzzles if p]
        means.append(np.mean(trials))
    assert means[1] > means[0] + 0.1 > 1.1


def test_expected_trials_are_those_that_a_search_takes() -> None:
    """Fails if the grading of a question is about another search than the teacher's."""
    digits, target, searcher = (7, 3, 4, 5), 5, Searcher(noise=5.0)
    (way,) = [way for way, value in all_signs(digits, "+-").items() if value == target]
    rng = np.random.default_rng(0)
    taken = [1 + ways_in_order(digits, target, searcher, rng).index(way) for _ in range(3000)]
    error = 4 * np.std(taken) / len(taken) ** 0.5
    assert abs(np.mean(taken) - expected_trials(digits, "+-", target, 5.0)) < error
    searcher = Searcher(order="fixed")
    in_turn = 1 + ways_in_order(digits, target, searcher, rng).index(way)
    assert expected_trials(digits, "+-", target, None) == in_turn > 1


@pytest.mark.parametrize("domain", SEARCH_BUILDERS)
def test_digits_stay_in_their_range(domain: str) -> None:
    """Fails if a setting that keeps the arithmetic small does not."""
    seen = {d for p in problems(domain, "hard", allowed=Range("+-", 5)) for d in drawn(p)}
    assert seen == {1, 2, 3, 4, 5}
