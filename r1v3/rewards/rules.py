r"""Rule-based accuracy: the first half of eq. 2 of the Skywork-R1V3 report.

Order: extract the answer; options and choice letters; plain numbers; equal text; math-verify.
Nothing a completion or a ground truth holds can raise or hang: long text, huge exponents and huge
numbers are refused before sympy sees them, and what sympy sees runs in a process with a limit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from r1v3.rewards.choices import find_choice, find_letter, letter_choice, option_key, plain_text
from r1v3.rewards.extract import MAX_ANSWER_CHARS, extract_answer, unwrap_boxed
from r1v3.rewards.quantities import RELATIVE_TOLERANCE, numbers_equal, parse_number
from r1v3.rewards.symbolic import symbolically_equal

__all__ = ["accuracy_reward", "extract_answer"]

_LETTER = re.compile(r"\(?[A-Z]\)?[.)]?")
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[ '\-]+[^\W\d_]+)*")
_SPACING = re.compile(r"\s+|\\left(?![a-z])|\\right(?![a-z])|\\[,;:!]")
_ASSIGNMENT = re.compile(r"[^=<>]{0,40}?[A-Za-z][^=<>]{0,40}?(?<![\\!])=(?P<value>[^=<>]+)")
_RELATION = re.compile(r"[=<>]|\\(?:leq?|geq?|neq?|lt|gt|in)(?![A-Za-z])")
_TRAILING_TEXT = re.compile(r"(?<=\S)\s*\\(?:text|mathrm)\s*\{[^{}]{0,40}\}(?:\^\{?-?\d\}?)?\Z")


def _canonical(text: str) -> str:
    """Text with markup, spacing and sizing commands removed: equal strings mean equal answers."""
    text = _SPACING.sub("", plain_text(text).replace("−", "-").replace("\\dfrac", "\\frac"))
    return text.replace("\\tfrac", "\\frac").rstrip(".。")


def _without_assignment(gold: str, answer: str) -> tuple[str, str]:
    """`x = 3` against `3`: drop the left side of whichever of the two is the only assignment."""
    gold_relation, answer_relation = _RELATION.search(gold), _RELATION.search(answer)
    if bool(gold_relation) == bool(answer_relation):
        return gold, answer
    match = _ASSIGNMENT.fullmatch(gold if gold_relation else answer)
    if match is None:
        return gold, answer
    value = match["value"].strip()
    return (value, answer) if gold_relation else (gold, value)


def _equivalent(gold: str, answer: str) -> bool:
    """True if two short answers that are not choice letters mean the same."""
    gold_text, answer_text = _canonical(gold), _canonical(answer)
    if not gold_text or not answer_text:
        return False
    if gold_text == answer_text:
        return True
    gold_words, answer_words = plain_text(gold).rstrip("."), plain_text(answer).rstrip(".")
    if _WORDS.fullmatch(gold_words):
        return gold_words.casefold() == answer_words.casefold()
    gold, answer = _without_assignment(gold, answer)
    gold_number, answer_number = parse_number(gold), parse_number(answer)
    if gold_number is not None and answer_number is not None:
        return numbers_equal(gold_number, answer_number)
    if "=" in answer and not _RELATION.search(gold):
        return False  # math-verify takes the right side of "5=3"
    gold = _TRAILING_TEXT.sub("", gold.strip().strip("$"))
    answer = _TRAILING_TEXT.sub("", answer.strip().strip("$"))
    return symbolically_equal(gold, answer, RELATIVE_TOLERANCE)


def _option_correct(answer: str, gold: str, options: Sequence[str]) -> bool | None:
    """Verdict when the gold answer is one of the options, else None."""
    gold_choice = find_choice(gold, options)
    if gold_choice is None:
        return None
    gold_option = options[gold_choice.index]
    choice = find_choice(answer, options)
    if choice is not None:
        if choice.by_text or gold_choice.by_text:  # two options may carry the same text
            return option_key(options[choice.index]) == option_key(gold_option)
        return choice.index == gold_choice.index
    if letter_choice(answer) is not None:
        return False  # a letter of no option, or several letters
    if not _equivalent(gold_option, answer):
        return False
    others = (option for option in options if option_key(option) != option_key(gold_option))
    return not any(_equivalent(option, answer) for option in others)


def answers_match(answer: str, ground_truth: str, *, options: Sequence[str] | None = None) -> bool:
    """True if an extracted answer agrees with the ground truth (see `accuracy_reward`)."""
    if max(len(answer), len(ground_truth)) > MAX_ANSWER_CHARS:
        return False
    gold, answer = (unwrap_boxed(text.replace("\x00", "")) for text in (ground_truth, answer))
    if options:
        verdict = _option_correct(answer, gold, options)
        if verdict is not None:
            return verdict
    letter = find_letter(gold)
    if letter is not None and _LETTER.fullmatch(plain_text(gold)):
        return find_letter(answer) == letter
    return _equivalent(gold, answer)


def accuracy_reward(
    completion: str, ground_truth: str, *, options: Sequence[str] | None = None
) -> float:
    r"""1.0 if the completion's final answer agrees with the ground truth by rule, else 0.0.

    Args:
        completion: generated text; its answer is found by `extract_answer`.
        ground_truth: a number, LaTeX expression, word, choice letter or option text; may be
            wrapped in `\boxed{}` or `$`.
        options: texts of the options A, B, ... in order, for a multiple-choice question. The
            ground truth and the answer may each name an option by letter ("B", "(B)", "B.",
            `\text{B}`, "B. 12") or by its text. An answer that is neither is compared with the
            right option's text and must not fit another option as well. Without options, a ground
            truth of one capital letter is a choice letter.

    Integers must be met exactly, other numbers within a relative 1e-3. An answer or ground truth
    above 1,000 characters scores 0.0.

    Raises:
        RuntimeError: math-verify cannot be run (see `symbolic`).
    """
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    return float(answers_match(answer, ground_truth, options=options))
