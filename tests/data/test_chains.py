"""The imperfect teacher: its chains say what it read, and only right ones are kept."""

import re
from dataclasses import replace

import numpy as np
import pytest

from r1v3.data import chains as chains_module
from r1v3.data import digits, tasks
from r1v3.data.chains import (
    CAREFUL_STRENGTH,
    GLANCE_STRENGTH,
    ORDINALS,
    Chain,
    TeacherConfig,
    sample_chain,
    show_rows,
    solve,
    think,
)
from r1v3.data.digits import reading_probabilities
from r1v3.data.tasks import BUILDERS, IN_DOMAIN, Problem

EQUATION = re.compile(r"(-?\d+(?:[+-]\d+)+)=(-?\d+)")
DOUBTFUL = TeacherConfig(glance_sharpness=0.7, doubt=0.9, slip=0.4, check=0.5)


def problems(domain: str, count: int = 60, seed: int = 0) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [BUILDERS[domain]("train", rng) for _ in range(count)]


def kept(domain: str, config: TeacherConfig, count: int = 60) -> list[tuple[Problem, Chain]]:
    rng = np.random.default_rng(1)
    pairs = [(p, sample_chain(p, config, rng, 6)[0]) for p in problems(domain, count)]
    return [(problem, chain) for problem, chain in pairs if chain is not None]


def glanced_rows(thought: str, problem: Problem) -> list[str]:
    seen = thought.split(".")[0].removeprefix("I see ")
    separator = problem.target if problem.target in ("+", "-") else ", "
    return seen.split(separator)


def sentence_about(thought: str, name: str) -> re.Match[str] | None:
    return re.search(rf"(Wait|Hmm), {name} is (\d+)(?: or (\d+)\. It is (\d+))?\.", thought)


def holds(equation: tuple[str, str]) -> bool:
    total = sum(int(term) for term in re.findall(r"[+-]?\d+", equation[0]))
    return total == int(equation[1])


@pytest.mark.parametrize("domain", IN_DOMAIN)
def test_accepted_chains_end_in_the_right_answer(domain: str) -> None:
    for problem, chain in kept(domain, DOUBTFUL):
        assert chain.answer == problem.answer
        stated = re.findall(r"(?:So|That is) ([A-D]|-?\d+)\.", chain.thought)[-1]
        assert stated == problem.answer


def test_a_question_whose_chains_all_fail_is_given_up_after_the_tries() -> None:
    (problem,) = problems("arithmetic", 1)
    impossible = replace(problem, answer="-1")
    assert sample_chain(impossible, DOUBTFUL, np.random.default_rng(0), 3) == (None, 3)


@pytest.mark.parametrize("domain", IN_DOMAIN)
def test_the_teacher_sees_neither_labels_nor_the_answer(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all labels permuted and the answer hidden, it writes the same chains."""
    asked = problems(domain, 20)
    for strength in (GLANCE_STRENGTH, CAREFUL_STRENGTH):
        reading_probabilities(strength)
    rng = np.random.default_rng(2)
    before = [think(problem, DOUBTFUL, rng) for problem in asked]
    true = digits.scans()
    permuted = replace(true, labels=(true.labels + 3) % 10)
    for module in (digits, tasks):
        monkeypatch.setattr(module, "scans", lambda: permuted)
    assert problems(domain, 1)[0] != asked[0]
    rng = np.random.default_rng(2)
    assert [think(replace(p, answer="?"), DOUBTFUL, rng) for p in asked] == before


@pytest.mark.parametrize("domain", IN_DOMAIN)
def test_a_row_is_looked_at_again_exactly_where_the_glance_was_doubtful(domain: str) -> None:
    """ "Wait" where the careful look disagrees, "Hmm" where it confirms, silence where sure."""
    weak = reading_probabilities(GLANCE_STRENGTH)
    rng = np.random.default_rng(3)
    words = set()
    for problem in problems(domain):
        thought = think(problem, DOUBTFUL, rng).thought
        glanced = glanced_rows(thought, problem)
        assert len(glanced) == len(problem.rows)
        for i, (row, text) in enumerate(zip(problem.rows, glanced, strict=True)):
            least = min(weak[scan, int(digit)] for scan, digit in zip(row, text, strict=True))
            name = f"the {ORDINALS[i]}" if len(glanced) > 1 else "it"
            found = sentence_about(thought, name)
            assert (found is not None) == (least < DOUBTFUL.doubt)
            if found is None:
                continue
            words.add(found[1])
            if found[1] == "Wait":
                assert found[2] != text
            else:
                assert found[4] == text and found[3] == text and found[2] != text
                assert sum(a != b for a, b in zip(found[2], text, strict=True)) == 1
    assert words == {"Wait", "Hmm"}


@pytest.mark.parametrize("domain", IN_DOMAIN)
def test_the_recheck_count_is_the_number_of_recheck_words(domain: str) -> None:
    rng = np.random.default_rng(4)
    for problem in problems(domain):
        chain = think(problem, DOUBTFUL, rng)
        assert chain.rechecks == len(re.findall("Wait|Hmm|Alternatively", chain.thought))


def test_equations_are_true_unless_retracted() -> None:
    """A slip stands in a kept chain only in front of the check that finds it."""
    retracted = 0
    for problem, chain in kept("arithmetic", DOUBTFUL, 150):
        before, check, after = chain.thought.partition("Alternatively,")
        caught = re.match(r" -?\d+[+-]-?\d+=-?\d+, not (\d+)\.", after) if check else None
        if caught:
            retracted += 1
            assert int(caught[1]) == int(final_reading(problem, chain)[0])
        else:
            assert all(map(holds, EQUATION.findall(before))), chain.thought
        assert all(map(holds, EQUATION.findall(after))), chain.thought
        tens = re.findall(r"So (-?\d+)\.", chain.thought)
        assert len(tens) == (2 if caught else 1)
    assert retracted > 5


def final_reading(problem: Problem, chain: Chain) -> list[str]:
    rows = glanced_rows(chain.thought, problem)
    for i in range(len(rows)):
        found = sentence_about(chain.thought, f"the {ORDINALS[i]}")
        if found:
            rows[i] = found[4] or found[2]
    return rows


def test_without_slips_every_sum_of_the_reading_is_worked_out_right() -> None:
    """Also for numbers that were misread, and over carries and borrows."""
    careful = TeacherConfig(slip=0.0, check=1.0)
    rng = np.random.default_rng(5)
    for problem in problems("arithmetic", 150):
        chain = think(problem, careful, rng)
        a, b = (int(row) for row in final_reading(problem, chain))
        assert chain.answer == str(a + b if problem.target == "+" else a - b)
        assert chain.thought.endswith("it fits.")
        assert all(map(holds, EQUATION.findall(chain.thought))), chain.thought


@pytest.mark.parametrize("sign", ["+", "-"])
def test_worked_columns_are_right_for_every_pair_of_numbers(sign: str) -> None:
    """All carries and borrows: a wrong one would teach wrong arithmetic."""
    template = Problem("arithmetic", "", "", (), (), target=sign)
    for a in range(100):
        for b in range(100):
            steps, answer = solve(template, (str(a), str(b)))
            assert answer == str(a + b if sign == "+" else a - b), (a, b)
            assert all(map(holds, EQUATION.findall(steps))), steps
            assert steps.endswith(f"So {answer}.")


@pytest.mark.parametrize("domain", [*IN_DOMAIN, "counting"])
def test_a_right_reading_leads_to_the_right_answer(domain: str) -> None:
    for problem in problems(domain):
        steps, answer = solve(problem, problem.true_rows())
        assert answer == problem.answer
        assert steps.endswith(f"{answer}.")


@pytest.mark.parametrize(
    ("row", "steps", "letter"),
    [
        ("358", "3<5, 5<8: rise. That is A.", "A"),
        ("851", "8>5, 5>1: fall. That is B.", "B"),
        ("818", "8>1, 1<8: neither. That is C.", "C"),
        ("558", "5=5, 5<8: neither. That is C.", "C"),
        ("555", "5=5, 5=5: neither. That is C.", "C"),
    ],
)
def test_a_trend_is_worked_out_pair_by_pair(row: str, steps: str, letter: str) -> None:
    """Also for misread rows with equal digits, which no question has."""
    (problem,) = problems("ordering", 1)
    assert solve(problem, (row,)) == (steps, letter)


@pytest.mark.parametrize(
    ("rows", "target", "steps", "letter"),
    [
        (("34", "58", "12"), "largest", "58>34: row 2. 12<58: row 2. That is B.", "B"),
        (("34", "58", "12"), "smallest", "58>34: row 1. 12<34: row 3. That is C.", "C"),
        (("34", "34", "12"), "largest", "34=34: row 1. 12<34: row 1. That is A.", "A"),
    ],
)
def test_a_comparison_keeps_the_best_row_so_far(
    rows: tuple[str, ...], target: str, steps: str, letter: str
) -> None:
    (problem,) = problems("comparison", 1)
    assert solve(replace(problem, target=target), rows) == (steps, letter)


def test_a_domain_without_a_worked_solution_is_named() -> None:
    with pytest.raises(ValueError, match="domain 'reading' has no worked solution"):
        solve(problems("reading", 1)[0], ("1",))


def test_the_same_seed_gives_the_same_chains() -> None:
    (problem,) = problems("arithmetic", 1)
    first, again, other = (
        [think(problem, DOUBTFUL, rng) for _ in range(5)]
        for rng in map(np.random.default_rng, (7, 7, 8))
    )
    assert first == again != other


def test_the_teacher_errs_at_the_default_settings_but_not_often() -> None:
    """A perfect teacher leaves nothing to reject; a bad one nothing to learn."""
    rng = np.random.default_rng(6)
    asked = [p for domain in IN_DOMAIN for p in problems(domain, 80)]
    right = np.mean([think(p, TeacherConfig(), rng).answer == p.answer for p in asked])
    assert 0.75 < right < 0.99


def test_rows_are_shown_as_a_sum_or_as_a_list() -> None:
    assert show_rows(("34", "58"), "-") == "34-58"
    assert show_rows(("34", "58"), "largest") == "34, 58"
    assert chains_module.ORDINALS[:3] == ("first", "second", "third")
