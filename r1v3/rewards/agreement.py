"""Verdicts on answers by rule, with a third one for what no rule can tell."""

import re

from r1v3.rewards.choices import find_choice, find_choices, find_letter, find_letters
from r1v3.rewards.extract import unwrap_boxed
from r1v3.rewards.notation import tidy
from r1v3.rewards.rules import judge

_NUMBER = re.compile(r"[-+]?(?:\d{1,30}(?:,\d{3})*(?:\.\d{1,30})?|\.\d{1,30})%?")
_ONE_LETTER = re.compile(r"\(?([A-Z])\)?\.?")


def agrees(answer: str, gold: str, options: tuple[str, ...] = ()) -> bool | None:
    """Verdict on an extracted answer: right, wrong, or None where rules cannot tell.

    Wrong is said only of what is understood: an option that is not the right one, a number that is
    another.
    """
    if judge(answer, gold, options=options or None).correct:
        return True
    plain, truth = unwrap_boxed(answer), unwrap_boxed(gold)
    if options and (find_choice(plain, options) or find_choices(plain, options)):
        return False
    if _ONE_LETTER.fullmatch(truth) or find_letters(truth):
        return False if find_letter(plain) or find_letters(plain) else None
    if all(_NUMBER.fullmatch(tidy(text)) for text in (plain, truth)):
        return False
    return None
