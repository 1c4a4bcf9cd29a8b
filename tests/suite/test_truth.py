"""Verdicts of every benchmark's rules on written responses."""

import time

import pytest

from r1v3.suite.benchmarks import BENCHMARKS
from r1v3.suite.question import Question, Response
from tests.suite.truths import (
    CHOICES,
    DRAFTS,
    FORMULAS,
    IN_PICTURE,
    LENGTHS,
    OPEN,
    PUZZLES,
    THOUGHT,
    TWO_LETTERS,
    YES_NO,
    Truth,
    question,
)

MULTIPLE_CHOICE = (
    *("mmmu", "emma", "mmmu_pro", "mmk12", "mmstar", "mmbench", "mathvista", "mathverse"),
    *("mathvision", "wemath", "logicvista", "mme_reasoning", "phyx", "digits"),
)
OPEN_QUESTIONS = (
    *("mmmu", "emma", "mmk12", "mathvista", "mathverse", "mathvision", "mme_reasoning", "seephys"),
    "digits",
)
PICTURED = ("visulogic", "mmmu_pro_vision", "mathverse", "phyx")


def wrong_verdicts(key: str, asked: Question, truths: tuple[Truth, ...]) -> list[str]:
    """Responses whose verdict is another than the written one, with and without a thought."""
    rule, found = BENCHMARKS[key].rule, []
    for text, wanted in truths:
        for thinking in (True, False):
            whole = THOUGHT + text if thinking else text
            if (verdict := rule(asked, Response(whole, thinking))) is not wanted:
                found.append(f"{whole!r} is {verdict}, not {wanted}")
    return found


def test_every_benchmark_has_its_table() -> None:
    """Fails if a benchmark is added without 25 written verdicts, right, wrong and open ones."""
    tables = (CHOICES, OPEN, FORMULAS, IN_PICTURE, TWO_LETTERS, YES_NO, PUZZLES)
    assert all(len(table) >= 25 for table in tables)
    of = (
        *((key, CHOICES) for key in MULTIPLE_CHOICE),
        *((key, OPEN) for key in OPEN_QUESTIONS),
        *((key, IN_PICTURE) for key in PICTURED),
        ("hallusionbench", YES_NO),
    )
    verdicts: dict[str, set[Truth]] = {}
    for key, table in of:
        verdicts.setdefault(key, set()).update(table)
    assert set(verdicts) == set(BENCHMARKS)
    for key, table in verdicts.items():
        assert len(table) >= 25, key
        assert {verdict for _, verdict in table} == {True, False, None}, key


@pytest.mark.parametrize("key", MULTIPLE_CHOICE)
def test_multiple_choice(key: str) -> None:
    """Fails if a benchmark takes a wrong option for right, or guesses where nothing is said."""
    assert wrong_verdicts(key, question("B", *LENGTHS), CHOICES) == []


@pytest.mark.parametrize("key", PICTURED)
def test_options_in_the_picture(key: str) -> None:
    """Fails if a letter counts otherwise where the rule does not know the options."""
    assert wrong_verdicts(key, question("B"), IN_PICTURE) == []


@pytest.mark.parametrize("key", OPEN_QUESTIONS)
def test_open_questions_need_the_value_itself(key: str) -> None:
    """Fails if 14 is found in 140, as where the gold is sought inside the response."""
    assert wrong_verdicts(key, question("14"), OPEN) == []


@pytest.mark.parametrize("key", ["mathvision", "mathverse", "seephys"])
def test_formulas_and_words(key: str) -> None:
    """Fails if equal formulas differ, unequal ones agree, or one of them is run."""
    found = [
        line for gold, text, wanted in FORMULAS
        for line in wrong_verdicts(key, question(gold), ((text, wanted),))
    ]  # fmt: skip
    assert found == []


def test_logicvista_takes_letters_in_any_order() -> None:
    """Fails if two right letters are missed, or one of them is enough."""
    assert wrong_verdicts("logicvista", question("B, C", "one", "two", "three"), TWO_LETTERS) == []


def test_puzzles_are_checked_by_their_rules() -> None:
    """Fails if a puzzle's rules are wrong, or text that is no answer is taken for one."""
    found = []
    for function, answer, info, text, wanted in PUZZLES:
        asked = question(answer, function_id=function, special_info=info)
        found += [
            f"{function}: {line}"
            for line in wrong_verdicts("mme_reasoning", asked, ((text, wanted),))
        ]
    assert found == []


def test_hallusionbench() -> None:
    """Fails if "yes, there is no ..." is a no, or if stars hide an answer."""
    assert wrong_verdicts("hallusionbench", question("Yes"), YES_NO) == []
    mirrored = tuple((text, None if want is None else not want) for text, want in YES_NO if text)
    assert wrong_verdicts("hallusionbench", question("No"), mirrored) == []


@pytest.mark.parametrize("key", BENCHMARKS)
def test_drafts_in_a_thought_do_not_count(key: str) -> None:
    """Fails if a letter or a box before the last `</think>` is taken for the answer, or if a
    thought that never ended is no plain failure."""
    asked = question("B", *LENGTHS)
    rule = BENCHMARKS[key].rule
    if key != "hallusionbench":
        for text, wanted in DRAFTS:
            assert rule(asked, Response(text, True)) is wanted, text
    assert rule(asked, Response("Wait, B: \\boxed{B} is it? Let me", True)) is False


@pytest.mark.parametrize(
    "part", ["x ", "A ", "A, ", "(A) ", "B and ", "yes ", "1 ", "\\boxed{", "is B "]
)
def test_a_response_that_repeats_itself_is_read_in_linear_time(part: str) -> None:
    """Fails if a loop of a model, as long as its limit, holds up the scoring of all others."""
    for key in ("mmstar", "hallusionbench", "mme_reasoning"):
        begun = time.process_time()
        BENCHMARKS[key].rule(question("B", *LENGTHS), Response(part * 4000, False))
        assert time.process_time() - begun < 2
