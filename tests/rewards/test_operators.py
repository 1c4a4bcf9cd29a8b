r"""Signs filled in between digits are judged by value and by digits, never by how they look."""

import operator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1v3.rewards import accuracy_reward, score
from r1v3.rewards.operators import Puzzle, from_left, read_puzzle, state_puzzle, write_line

MEANING = {"+": operator.add, "-": operator.sub, "x": operator.mul}


@st.composite
def puzzles(draw: st.DrawFn) -> tuple[list[int], str]:
    digits = draw(st.lists(st.integers(0, 9), min_size=2, max_size=6))
    signs = draw(st.text("+-x", min_size=len(digits) - 1, max_size=len(digits) - 1))
    return digits, signs


def worked(digits: list[int], signs: str) -> int:
    """The value by another way than the code's: the last sign first."""
    if not signs:
        return digits[0]
    return int(MEANING[signs[-1]](worked(digits[:-1], signs[:-1]), digits[-1]))


@given(puzzles())
def test_a_line_is_calculated_from_left_to_right(puzzle: tuple[list[int], str]) -> None:
    """Fails if multiplication binds more strongly, so that questions would have other answers."""
    assert from_left(*puzzle) == worked(*puzzle)


@given(puzzles(), st.data())
def test_exactly_the_ways_that_reach_the_target_are_right(
    puzzle: tuple[list[int], str], data: st.DataObject
) -> None:
    """Fails if a wrong way is paid, or a right one is not because it is not the recorded one."""
    digits, signs = puzzle
    read = read_puzzle(state_puzzle(digits, signs))
    assert read == Puzzle(tuple(digits), worked(digits, signs))
    other = data.draw(st.text("+-x", min_size=len(signs), max_size=len(signs)))
    reaches = worked(digits, other) == read.target
    line = write_line(digits, other)
    assert read.solved_by(other) == read.solved_by(line) == reaches
    assert read.solved_by(f"{line}={read.target}") == reaches
    assert not read.solved_by(f"{line}={read.target + 1}")


@given(puzzles(), st.integers(0, 5), st.integers(1, 9))
def test_a_line_of_other_digits_is_wrong_whatever_its_value(
    puzzle: tuple[list[int], str], place: int, step: int
) -> None:
    """Fails if a misread picture is paid because the line happens to reach the target."""
    digits, signs = puzzle
    read = read_puzzle(state_puzzle(digits, signs))
    changed = list(digits)
    changed[place % len(digits)] = (changed[place % len(digits)] + step) % 10
    assert read is not None and not read.solved_by(write_line(changed, signs))
    assert not read.solved_by(write_line(digits + [0], signs + "+"))


@given(puzzles(), st.text("+-x*0123456789=,.() \\times{}abc\u2212\u00d7", max_size=20))
def test_no_text_raises_and_what_is_right_has_the_digits_or_none(
    puzzle: tuple[list[int], str], text: str
) -> None:
    """Fails if a completion can stop a training run, or the bare target earns the reward."""
    read = read_puzzle(state_puzzle(*puzzle))
    assert read is not None
    if read.solved_by(text):
        found = [int(c) for c in text.partition("=")[0] if c.isdigit()]
        assert found in ([], puzzle[0])
    assert not read.solved_by(str(read.target))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("+-", True), ("+,-", True), ("+, -", True), ("+ -", True), ("$+-$", True),
        ("3+5-1", True), ("3 + 5 - 1 = 7", True), ("3+5\u22121", True), ("+\u2212", True),
        ("+\u2013", True), ("+-.", True),
        ("3+5-1=7.", True), ("$+$, $-$", True), ("+；-", False), ("+、-", True), ("+；", False),
        ("7", False), ("-+", False), ("++", False), ("+", False), ("+-+", False), ("", False),
        ("3+5-1=8", False), ("5+3-1", False), ("9-1-1", False), ("3+5-1 or 3-5+1", False),
        ("8-1", False), ("=7", False), ("3+5-01", False),
    ],
)  # fmt: skip
def test_forms_of_an_answer(answer: str, right: bool) -> None:
    """Fails if a form that says the signs is refused, or one that does not is paid."""
    completion = f"I see 351.</think>\n\n\\boxed{{{answer}}}"
    assert accuracy_reward(completion, "+- (3+5-1=7)") == float(right)
    (reward,) = score([completion], ["+- (3+5-1=7)"])
    assert reward.rule == float(right) and not reward.refused


@pytest.mark.parametrize("spelling", ["x", "X", "*", "\u00d7", "\\times", "\\cdot", " \\times "])
def test_spellings_of_times(spelling: str) -> None:
    """Fails if a model is paid for one spelling of a sign alone."""
    assert accuracy_reward(f"\\boxed{{2{spelling}3+1}}", "x+ (2x3+1=7)") == 1.0
    assert accuracy_reward(f"\\boxed{{1+2{spelling}3}}", "+x (1+2x3=9)") == 1.0
    assert accuracy_reward(f"\\boxed{{{spelling}+}}", "x+ (2x3+1=7)") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "+-", "3+5-1=7", "7", "++ (3+5-1=7)", "+- (3+5-1=8)", "+x (1+2x3=7)", "+- (3+5-1)",
        "(3+5-1=7)", "+- 3+5-1=7", "x (x)", "", "B", "\\frac12",
    ],
)  # fmt: skip
def test_other_ground_truths_are_no_puzzles(text: str) -> None:
    """Fails if an ordinary ground truth, or one that contradicts itself, is judged as a puzzle."""
    assert read_puzzle(text) is None


def test_equations_are_judged_as_they_were() -> None:
    """Fails if the rule for puzzles takes over ground truths of ordinary data."""
    assert accuracy_reward("\\boxed{7}", "3+5-1=7") == 1.0
    assert accuracy_reward("\\boxed{+-}", "+-") == 1.0


@pytest.mark.parametrize("signs", ["+", "+-+", "+*"])
def test_signs_that_do_not_fit_are_an_error(signs: str) -> None:
    """Fails if a generator with a wrong count of signs makes a wrong question silently."""
    with pytest.raises(ValueError, match=r"sign|shorter|longer"):
        from_left((3, 5, 1), signs)


def test_every_way_of_three_digits_by_brute_force() -> None:
    """Fails if some answer to a whole small puzzle is judged otherwise than by its value."""
    puzzle = Puzzle((2, 3, 4), 10)
    right = {"".join(w) for w in product("+-x", repeat=2) if puzzle.solved_by("".join(w))}
    assert right == {"x+"}
