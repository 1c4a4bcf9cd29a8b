"""Verdicts of every benchmark's rules on written responses."""

import pytest

from r1v3.suite.benchmarks import BENCHMARKS
from r1v3.suite.question import Question, Response
from tests.suite import truths
from tests.suite.truths import CHOICES, DRAFTS, LENGTHS, THOUGHT, YES_NO, Truth, question

MULTIPLE_CHOICE = ("mmmu", "mmstar", "mmbench")


def wrong_verdicts(key: str, asked: Question, truths: tuple[Truth, ...]) -> list[str]:
    """Responses whose verdict is another than the written one, with and without a thought."""
    rule, found = BENCHMARKS[key].rule, []
    for text, wanted in truths:
        for thinking in (True, False):
            whole = THOUGHT + text if thinking else text
            if (verdict := rule(asked, Response(whole, thinking))) is not wanted:
                found.append(f"{whole!r} is {verdict}, not {wanted}")
    return found


@pytest.mark.parametrize("key", MULTIPLE_CHOICE)
def test_multiple_choice(key: str) -> None:
    """Fails if a benchmark takes a wrong option for right, or guesses where nothing is said."""
    assert len(CHOICES) >= 25
    assert wrong_verdicts(key, question("B", *LENGTHS), CHOICES) == []


@pytest.mark.parametrize("key", BENCHMARKS)
def test_drafts_in_a_thought_do_not_count(key: str) -> None:
    """Fails if a letter or a box before the last `</think>` is taken for the answer, or if a
    thought that never ended is no plain failure."""
    asked = question("B", *LENGTHS)
    if BENCHMARKS[key].rule in (BENCHMARKS["mmstar"].rule,):
        for text, wanted in DRAFTS:
            assert BENCHMARKS[key].rule(asked, Response(text, True)) is wanted, text
    assert not BENCHMARKS[key].rule(asked, Response("Wait, B: \\boxed{B} is it? Let me", True))


def test_hallusionbench() -> None:
    """Fails if "yes, there is no ..." is a no, or if stars hide an answer."""
    assert len(YES_NO) >= 25
    assert wrong_verdicts("hallusionbench", question("Yes"), YES_NO) == []
    mirrored = tuple((text, None if want is None else not want) for text, want in YES_NO if text)
    assert wrong_verdicts("hallusionbench", question("No"), mirrored) == []


def test_open_questions_of_mmmu_need_the_value_itself() -> None:
    """Fails if 14 is found in 140, as where the gold is sought inside the response."""
    assert wrong_verdicts("mmmu", question("14"), truths.OPEN_MMMU) == []
