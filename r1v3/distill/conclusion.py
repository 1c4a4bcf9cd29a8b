"""The answer that a thought ends with, to compare with the one that is given."""

import re

from r1v3.distill.text import sentences
from r1v3.rewards.agreement import agrees
from r1v3.rewards.extract import find_boxed, unwrap_boxed

_LETTER = r"\(?[A-J]\)?(?![A-Za-z])"
_NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_VALUE = rf"(?P<value>{_LETTER}|{_NUMBER})"
_OPENING = (
    r"(?:so|thus|therefore|hence|then|consequently|finally|in conclusion"
    r"|所以|因此|故|于是|那么|综上|总之)"
)
_NAMED = (
    r"(?:the\s+)?(?:final\s+|correct\s+|right\s+)?(?:answer|result|total|sum|option|choice|value)"
    r"(?:\s+(?:is|should be|must be|would be|equals)|\s*[:=])"
    r"|(?:最终|最后的?|正确)?的?(?:答案|结果|选项)(?:应该|应当)?(?:是|为|等于|选|：|:)"
    r"|应?选择?(?:项)?|that is|it is|it's|(?:我们)?得到|等于"
)
# "So 92.", "Therefore, the answer is B.", "所以答案是 12。"; the value ends the sentence.
_STATED = re.compile(
    rf"(?:^|[\s,，;；:：.。])(?:{_OPENING}[\s,，:：]*(?:{_NAMED})?|{_NAMED})"
    rf"[\s*:：$]*(?:[A-Za-z]\s*=\s*)?{_VALUE}[\s*$]*(?:[.。!！]|$)",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|hmm|actually|no,|not right|wrong|incorrect|mistake|let me (?:re|double)|hold on)\b"
    r"|等等|等一下|不对|错了|重新",
    re.IGNORECASE,
)


def conclusion(thought: str) -> str | None:
    """The answer that a thought states last; None where it states none, or takes it back."""
    last = None
    for sentence in sentences(thought):
        if boxes := find_boxed(sentence):
            last = unwrap_boxed(boxes[-1])
        elif stated := _STATED.search(sentence):
            last = stated["value"].strip("()")
        elif _TAKEN_BACK.search(sentence):
            last = None
    return last or None


def contradicts(thought: str, answer: str, options: tuple[str, ...] = ()) -> bool:
    """Return whether a thought's last conclusion is another answer than the one given.

    Only what is understood counts: a number that is another, a letter that is another.
    """
    stated = conclusion(thought)
    if stated is None:
        return False
    if options and not stated[:1].isalpha() and answer.strip("()").isalpha():
        return False  # a value against a letter: the option that has the value may well be meant
    return agrees(stated, answer, options) is False
