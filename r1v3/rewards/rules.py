r"""Rule-based accuracy: the first half of eq. 2 of the Skywork-R1V3 report.

Order: extract the answer; options and choice letters; equal text; words; values and what is made of
them (`answers`). Nothing a completion or a ground truth holds can raise or hang: what is too large
is refused, and what sympy sees are trees, in a process with a limit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from r1v3.rewards.answers import Answer, answers_agree, read_answer
from r1v3.rewards.choices import (
    find_choice,
    find_choices,
    find_letter,
    find_letters,
    letter_choice,
    option_key,
    option_texts,
    plain_text,
)
from r1v3.rewards.extract import MAX_ANSWER_CHARS, extract_answer, unwrap_boxed
from r1v3.rewards.formula import Unreadable
from r1v3.rewards.notation import same_key
from r1v3.rewards.operators import read_puzzle
from r1v3.rewards.symbolic import Undecided

__all__ = ["accuracy_reward", "extract_answer"]

_LETTER = re.compile(r"\(?[A-Z]\)?[.)]?")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[ '\-]+[^\W\d_]+)*")
_PARTS = re.compile(r"[,;/、，\n]|\b(?:and|or)\b")
_DECIMAL_COMMA = re.compile(r"-?(?:0,\d{1,20}|\d{1,20},(?:\d{2}|\d{4,20}))")
_WORDS_OF_FORMULAS = frozenset(["pi", "infinity", "inf"])


@dataclass(frozen=True)
class Judgement:
    """Whether an answer agrees; `refused` if that could not be decided, and so was not paid."""

    correct: bool
    refused: bool = False


@lru_cache(maxsize=8192)
def _read(text: str) -> Answer | None:
    try:
        return read_answer(text)
    except (Unreadable, Undecided):
        return None


def _equivalent(gold: str, answer: str) -> bool:
    """True if two short answers that are not choice letters mean the same.

    Raises:
        Undecided: one cannot be read, or neither answer could be shown.
    """
    gold_key, answer_key = same_key(gold), same_key(answer)
    if not gold_key or not answer_key:
        return False
    if gold_key == answer_key:
        return True
    if gold_key.replace(" ", "") == answer_key.replace(" ", ""):
        if not _two_numbers(gold_key, answer_key):
            return True
    if _same_with_decimal_comma(gold_key, answer_key):
        return True
    gold_words, answer_words = plain_text(gold).rstrip("."), plain_text(answer).rstrip(".")
    if _WORDS.fullmatch(gold_words) and gold_words.lower() not in _WORDS_OF_FORMULAS:
        return gold_words.casefold() == answer_words.casefold()
    expected = _read(gold)
    if expected is None:
        raise Undecided("the ground truth cannot be read")
    given = _read(answer)
    if given is None:
        raise Undecided("the answer cannot be read")
    try:
        return answers_agree(expected, given)
    except Unreadable as error:
        raise Undecided(str(error)) from error


def _same_with_decimal_comma(gold: str, answer: str) -> bool:
    """`0,25` is `0.25` (but 1,000 is a thousand, and a list against anything else)."""
    pair = (gold, answer) if "," in gold else (answer, gold)
    return bool(_DECIMAL_COMMA.fullmatch(pair[0])) and pair[0].replace(",", ".") == pair[1]


def _two_numbers(gold: str, answer: str) -> bool:
    """Whether a space that only one of two texts has parts digits: `12 13` is not `1213`."""
    parted = [re.findall(r"\d\s+\d", text) for text in (gold, answer)]
    return len(parted[0]) != len(parted[1])


def _option_correct(answer: str, gold: str, options: Sequence[str]) -> bool | None:
    """Verdict when the gold answer is one of the options, else None."""
    gold_choice = find_choice(gold, options)
    if gold_choice is None:
        wanted = find_choices(gold, options)
        if wanted is not None:
            return find_choices(answer, options) == wanted
        alike = [i for i, option in enumerate(options) if _agrees(option, gold)]
        choice = find_choice(answer, options) if len(alike) == 1 else None
        return None if choice is None or choice.rest else choice.index == alike[0]
    gold_option = options[gold_choice.index]
    choice = find_choice(answer, options)
    if choice is not None:
        if choice.by_text or gold_choice.by_text:  # two options may carry the same text
            return option_key(options[choice.index]) == option_key(gold_option)
        return choice.index == gold_choice.index and not _fits_another(
            choice.rest, gold_choice.index, options
        )
    named = letter_choice(answer)
    if (named is not None and not named[2]) or find_letters(answer) is not None:
        return False  # a letter of no option, or several letters
    if not _equivalent(gold_option, answer):
        return False
    others = (option for option in options if option_key(option) != option_key(gold_option))
    return not any(_agrees(option, answer) for option in others)


def _agrees(gold: str, answer: str) -> bool:
    """`_equivalent`, and False where that is not decided."""
    try:
        return _equivalent(gold, answer)
    except Undecided:
        return False


def _fits_another(rest: str, index: int, options: Sequence[str]) -> bool:
    """Whether the text behind a letter is that of another option in another notation."""
    if not rest or _agrees(options[index], rest):
        return False
    parts = [part for part in _PARTS.split(rest) if part.strip()]
    own = [] if len(parts) == 1 else [p for p in _PARTS.split(options[index]) if p.strip()]
    parts = [part for part in parts if not any(_agrees(one, part) for one in own)]
    return any(
        _agrees(option, part) for i, option in enumerate(options) if i != index for part in parts
    )


def judge(answer: str, ground_truth: str, *, options: Sequence[str] | None = None) -> Judgement:
    """Whether an extracted answer agrees with the ground truth (see `accuracy_reward`).

    Raises:
        RuntimeError: sympy cannot be run (see `symbolic`).
    """
    if max(len(answer), len(ground_truth)) > MAX_ANSWER_CHARS:
        return Judgement(False, refused=True)
    gold, answer = (unwrap_boxed(text.replace("\x00", "")) for text in (ground_truth, answer))
    try:
        return Judgement(_correct(answer, gold, options))
    except Undecided:
        return Judgement(False, refused=True)


def _correct(answer: str, gold: str, options: Sequence[str] | None) -> bool:
    puzzle = read_puzzle(gold)
    if puzzle is not None:
        return puzzle.solved_by(answer)
    if options:
        verdict = _option_correct(answer, gold, option_texts(options))
        if verdict is not None:
            return verdict
    letter = find_letter(gold)
    if letter is not None and _LETTER.fullmatch(plain_text(gold)):
        return find_letter(answer) == letter
    letters = find_letters(gold)
    if letters is not None and max(letters) <= "H":
        named = find_letters(answer)
        if named is not None or not plain_text(gold).isalpha():  # AC may also be a segment
            return named == letters
    return _equivalent(gold, answer)


def answers_match(answer: str, ground_truth: str, *, options: Sequence[str] | None = None) -> bool:
    """True if an extracted answer agrees with the ground truth (see `accuracy_reward`)."""
    return judge(answer, ground_truth, options=options).correct


def accuracy_reward(
    completion: str,
    ground_truth: str,
    *,
    options: Sequence[str] | None = None,
    thinking: bool = False,
) -> float:
    r"""1.0 if the completion's final answer agrees with the ground truth by rule, else 0.0.

    Args:
        completion: generated text; its answer is found by `extract_answer`.
        ground_truth: a number, LaTeX expression, word, choice letter or option text; may be
            wrapped in `\boxed{}` or `$`.
        options: texts of the options A, B, ... in order, for a multiple-choice question, with or
            without their letters. The ground truth and the answer may each name an option by letter
            ("B", "(B)", "B.", `\text{B}`, "B. 12") or by its text, or several by letters ("AC",
            "C, A", "A and C"). An answer that is neither is compared with the right option's text
            and must not fit another option as well. Without options, a ground truth of one capital
            letter is a choice letter.
        thinking: see `extract_answer`.

    Exact values must be equal; a decimal is judged by the digits it shows (`values`). A unit that
    one side leaves out is understood, but a percent sign divides: for the ground truth "5%" both
    "5" and "0.05" are right, for "5" the answer "5%" is wrong. Degree signs may be left out on both
    sides. What cannot be decided scores 0.0, as does an answer or ground truth above 1,000
    characters.

    Raises:
        RuntimeError: sympy cannot be run (see `symbolic`).
    """
    answer = extract_answer(completion, thinking=thinking)
    if answer is None:
        return 0.0
    return float(answers_match(answer, ground_truth, options=options))
