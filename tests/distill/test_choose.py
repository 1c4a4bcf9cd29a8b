"""Choice of chains: the best of each question, balanced, with whole questions held out."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1v3.config import Choice
from r1v3.distill.choose import Candidate, choose, difficulty, fill


def candidate(row: str, sample: int = 0, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {"domain": "a", "words": 10, "score": None, "pass_rate": 0.5}
    return Candidate(row, sample, **{**fields, **changes})


def chosen(candidates: list[Candidate], **settings: Any) -> list[tuple[str, int]]:
    found = choose(candidates, Choice(**{"validation": 0, **settings}), seed=3)
    assert len(found.train) + len(found.validation) + len(found.dropped) == len(candidates)
    return [(one.row, one.sample) for one in found.train]


def test_the_best_chain_of_a_question_is_taken() -> None:
    """Fails if a worse chain is written, or ties do not go by `prefer`, then by number."""
    rows = [candidate("q", n, words=words) for n, words in enumerate((30, 10, 20, 10))]
    assert chosen(rows) == [("q", 0)]
    assert chosen(rows, prefer="shortest") == [("q", 1)]
    assert chosen(rows, prefer="longest", per_question=2) == [("q", 0), ("q", 2)]
    scored = [candidate("q", n, score=score) for n, score in enumerate((0.1, 0.9, 0.9, 0.5))]
    assert chosen(scored) == [("q", 1)]
    assert chosen(scored, per_question=3) == [("q", 1), ("q", 2), ("q", 3)]


def test_questions_outside_the_pass_rates_are_left_out() -> None:
    """Fails if what every answer gets right, or none, cannot be left out."""
    rows = [candidate(f"{rate}", pass_rate=rate) for rate in (0.0, 0.25, 0.75, 1.0)]
    assert chosen(rows, least_pass_rate=0.25, most_pass_rate=0.75) == [("0.25", 0), ("0.75", 0)]
    assert [difficulty(rate) for rate in (0, 0.25, 0.3, 0.74, 0.75, 1)] == [
        "hard", "hard", "medium", "medium", "easy", "easy",
    ]  # fmt: skip


def test_rows_are_balanced_by_weight() -> None:
    """Fails if a large domain crowds out a small one, or a weight does nothing."""
    rows = [candidate(f"a{n}") for n in range(90)]
    rows += [candidate(f"b{n}", domain="b") for n in range(30)]
    rows += [candidate(f"c{n}", domain="c") for n in range(5)]

    def counts(**settings: Any) -> list[int]:
        found = [row for row, _ in chosen(rows, rows=41, **settings)]
        return [sum(row.startswith(domain) for row in found) for domain in "abc"]

    assert counts() == [18, 18, 5]
    assert counts(domains={"a": 2}) == [24, 12, 5]
    assert counts(domains={"a": 0}) == [0, 30, 5]
    hard = [candidate(f"h{n}", pass_rate=0.2) for n in range(40)]
    easy = [candidate(f"e{n}", pass_rate=0.9) for n in range(40)]
    found = [row for row, _ in chosen(hard + easy, rows=30, difficulties={"hard": 2})]
    assert (sum(r[0] == "h" for r in found), sum(r[0] == "e" for r in found)) == (20, 10)


CELLS = st.dictionaries(
    st.tuples(st.sampled_from("abcde"), st.sampled_from(["easy", "hard"])),
    st.tuples(st.integers(0, 50), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    max_size=8,
)


@given(CELLS, st.integers(0, 200))
def test_a_total_is_divided_without_loss(
    cells: dict[tuple[str, str], tuple[int, float]], total: int
) -> None:
    """Fails if a cell gets more than it has, or rows are missing although some cell has them."""
    available = {cell: count for cell, (count, _) in cells.items()}
    weights = {cell: weight for cell, (_, weight) in cells.items()}
    found = fill(available, weights, total)
    usable = sum(count for cell, count in available.items() if weights[cell] > 0)
    assert all(0 <= found[cell] <= available[cell] for cell in cells)
    assert all(found[cell] == 0 for cell in cells if weights[cell] == 0)
    assert sum(found.values()) == min(total, usable)


def test_whole_questions_are_held_out() -> None:
    """Fails if a question stands in training and in validation, or validation takes it all."""
    rows = [candidate(f"q{n}", k) for n in range(10) for k in range(2)]
    found = choose(rows, Choice(per_question=2, validation=6), seed=0)
    held = {one.row for one in found.validation}
    assert len(found.validation) == 6 and len(held) == 3
    assert not held & {one.row for one in found.train} and len(found.train) == 14
    small = choose(rows[:4], Choice(per_question=2, validation=200), seed=0)
    assert (len(small.train), len(small.validation)) == (2, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_does_not_depend_on_other_questions(seed: int) -> None:
    """Fails if one further question reshuffles what is held out."""
    rows = [candidate(f"q{n}") for n in range(20)]
    before = choose(rows, Choice(validation=5), seed)
    after = choose([*rows, candidate("new")], Choice(validation=5), seed)
    moved = {one.row for one in before.validation} ^ {one.row for one in after.validation}
    assert len(moved) in (0, 2) and (not moved or "new" in moved)
