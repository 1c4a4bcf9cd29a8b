"""Verdicts of the report's protocol: right, wrong, or None where rules cannot tell.

The answer is what follows the last `</think>`; a box in the thought is a draft. A rule says wrong
only of what it has understood: an option that is not the right one, a number that is another. The
rest is for a judge, and without one has no verdict.
"""

import re

from r1v3.rewards.agreement import agrees
from r1v3.rewards.choices import find_letters
from r1v3.suite.question import Question, Response

_SHORT = 40
_YES_OR_NO = re.compile(r"(?<![\w'])(yes|no)(?![\w'-])", re.IGNORECASE)
_OPENING = re.compile(r"[^\w]*(yes|no)(?![\w'-])(.*)", re.IGNORECASE | re.DOTALL)
_CLOSING = re.compile(
    r"(?:\A|[.!?:\n*]\s*|\b(?:answer|so|therefore|thus)\b[^.\n]{0,20}?[\s*:]+)"
    r"(yes|no)[\s.!*]*\Z",
    re.IGNORECASE,
)


def answer_rule(question: Question, response: Response) -> bool | None:
    """Verdict on a letter, an option, a number, a formula or words."""
    answer = response.answer
    if answer is None and len(response.final) < _SHORT and find_letters(response.final):
        answer = response.final
    if answer is None:
        return None if response.final else False
    return agrees(answer, question.gold, question.options)


def yes_or_no(response: Response) -> str | None:
    """`yes` or `no`, whichever a response says, or None where it says neither or both."""
    text = response.answer if response.answer is not None else response.final
    opening = _OPENING.match(text)
    if opening is not None:
        said, rest = opening[1].lower(), opening[2]
        closing = _CLOSING.search(rest)
        if re.match(r"[\s,/]*(?:and|or|/)?\s*(?:yes|no)\b", rest, re.IGNORECASE):
            return None
        if closing is not None and closing[1].lower() != said:
            return None
        return said
    closing = _CLOSING.search(text)
    if closing is not None:
        return closing[1].lower()
    found = {word.lower() for word in _YES_OR_NO.findall(text)}
    return "yes" if found == {"yes"} else None


def yes_no_rule(question: Question, response: Response) -> bool | None:
    """Verdict on a question whose answer is yes or no."""
    said = yes_or_no(response)
    if said is None:
        return None if response.final else False
    return said == question.gold.strip().lower()
