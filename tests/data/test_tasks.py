"""Questions and pictures: the answer follows from the digits, the digits from the right split."""

import io

import numpy as np
import pytest
from PIL import Image

from r1v3.data.builders import question_text
from r1v3.data.compose import CELL, GRID, IMAGE_SIZE, Cell, compose, to_png
from r1v3.data.digits import SPLITS, scans
from r1v3.data.tasks import BUILDERS, EMPTY_CELL, LETTERS, Problem, show_grid
from r1v3.data.tokenizer import train_tokenizer

MANY = 60


def problems(domain: str, split: str = "test", seed: int = 0, count: int = MANY) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [BUILDERS[domain](split, rng) for _ in range(count)]


def drawn_rows(problem: Problem) -> list[str]:
    """The digits as they stand in the picture's cells, from top to bottom, left to right."""
    rows: dict[int, list[tuple[int, str]]] = {}
    for cell in problem.cells:
        if isinstance(cell.content, int):
            digit = str(scans().labels[cell.content])
            rows.setdefault(cell.row, []).append((cell.column, digit))
    return ["".join(d for _, d in sorted(rows[row])) for row in sorted(rows)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", BUILDERS)
def test_a_problem_uses_scans_of_its_split_alone(domain: str, split: str) -> None:
    allowed = set(scans().split[split].tolist())
    for problem in problems(domain, split, count=20):
        used = {s for row in problem.rows for s in row}
        used |= {c.content for c in problem.cells if isinstance(c.content, int)}
        assert used <= allowed


@pytest.mark.parametrize("domain", BUILDERS)
def test_cells_are_inside_the_grid_and_never_on_top_of_each_other(domain: str) -> None:
    for problem in problems(domain):
        places = [(c.row, c.column) for c in problem.cells]
        assert len(set(places)) == len(places)
        assert all(0 <= r < GRID and 0 <= c < GRID for r, c in places)
        # Numbers are told from neighbors by their rows; strewn digits stand on their own.
        assert "".join(drawn_rows(problem)) == "".join(problem.true_rows())
        if domain != "grid":
            assert drawn_rows(problem) == list(problem.true_rows())


def test_arithmetic_answers_are_the_sum_or_difference_of_what_is_drawn() -> None:
    signs = set()
    for problem in problems("arithmetic"):
        top, bottom = (int(row) for row in drawn_rows(problem))
        drawn = [c.content for c in problem.cells if isinstance(c.content, str)]
        assert drawn == [problem.target]
        signs.add(problem.target)
        right = top + bottom if problem.target == "+" else top - bottom
        assert problem.answer == str(right) and right >= 0
        assert problem.options is None
    assert signs == {"+", "-"}


def test_comparison_has_exactly_one_right_option() -> None:
    letters, kinds = set(), set()
    for problem in problems("comparison"):
        values = [int(row) for row in drawn_rows(problem)]
        pick = max if "largest" in problem.question else min
        assert ("largest" in problem.question) != ("smallest" in problem.question)
        right = [
            letter
            for letter, option in zip(LETTERS, problem.options or (), strict=False)
            if values[int(option.removeprefix("row ")) - 1] == pick(values)
        ]
        assert right == [problem.answer]
        assert sorted(problem.options or ()) == ["row 1", "row 2", "row 3"]
        letters.add(problem.answer)
        kinds.add(problem.target)
    assert letters == set("ABC") and kinds == {"largest", "smallest"}


def test_ordering_has_exactly_one_right_option() -> None:
    letters = set()
    for problem in problems("ordering"):
        (row,) = drawn_rows(problem)
        assert len(set(row)) == 3
        rises, falls = list(row) == sorted(row), list(row) == sorted(row, reverse=True)
        trend = "rise" if rises else "fall" if falls else "neither"
        options = problem.options or ()
        assert [LETTERS[i] for i, o in enumerate(options) if o == trend] == [problem.answer]
        assert len(set(options)) == 3
        letters.add(problem.answer)
    assert letters == set("ABC")


def test_counting_counts_the_asked_digit() -> None:
    counts = set()
    for problem in problems("counting"):
        asked = problem.question.split()[6]
        assert problem.answer == str("".join(drawn_rows(problem)).count(asked))
        counts.add(problem.answer)
    assert len(counts) >= 4


def test_reading_answers_with_all_rows() -> None:
    for problem in problems("reading"):
        assert problem.answer.split() == drawn_rows(problem)


@pytest.mark.parametrize("domain", BUILDERS)
def test_the_grid_transcription_shows_every_digit_in_its_place(domain: str) -> None:
    for problem in problems(domain, count=20):
        shown = show_grid(problem)
        assert len(shown) == GRID * GRID
        digits = {
            c.row * GRID + c.column: str(scans().labels[c.content])
            for c in problem.cells
            if isinstance(c.content, int)
        }
        assert {i: mark for i, mark in enumerate(shown) if mark != EMPTY_CELL} == digits


def test_every_cell_of_a_transcription_is_one_token() -> None:
    """Merged cells would stand at no fixed distance from what they show."""
    shown = [show_grid(problem) for problem in problems("reading", count=20)]
    words = train_tokenizer(shown * 4, 300)
    for text in shown:
        assert len(words.encode(text, add_special_tokens=False)) == GRID * GRID


@pytest.mark.parametrize("domain", BUILDERS)
def test_the_same_seed_gives_the_same_problems(domain: str) -> None:
    assert problems(domain, seed=5, count=5) == problems(domain, seed=5, count=5)
    assert problems(domain, seed=5, count=5) != problems(domain, seed=6, count=5)


def test_options_stand_below_the_question_with_their_letters() -> None:
    (problem,) = problems("comparison", count=1)
    lines = question_text(problem).split("\n")
    assert lines[0] == problem.question
    assert lines[1:] == [
        f"{letter}. {option}" for letter, option in zip("ABC", problem.options or (), strict=True)
    ]


def test_ink_is_drawn_in_its_own_cell_and_nowhere_else() -> None:
    rng = np.random.default_rng(0)
    scan = int(scans().ids("train", 8)[0])
    picture = compose([Cell(1, 2, scan), Cell(3, 0, "+")], rng).astype(int)
    assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    cells = picture.reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2)
    contrast = cells.max((2, 3, 4)) - cells[..., 0].min((2, 3))
    background = cells[0, 0, 0, 0]
    for r in range(GRID):
        for c in range(GRID):
            plain = (cells[r, c] == background).all()
            assert plain == ((r, c) not in {(1, 2), (3, 0)})
    assert contrast[1, 2] > 80 and contrast[3, 0] > 80


def test_a_picture_survives_png_and_follows_its_seed() -> None:
    cells = [Cell(0, 0, 5)]
    first, again = (compose(cells, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_png(first)))), first)


def test_a_cell_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cell \(4, 0\) is outside 4 x 4"):
        compose([Cell(4, 0, 0)], np.random.default_rng(0))
