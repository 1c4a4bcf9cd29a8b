r"""VLMEvalKit's rules of November 2026 (commit e8e78f0), without its random choices and `eval`.

They are for comparison: what the kit would count, on the text after the last `</think>` (its
SPLIT_THINK). Where the kit asks a judge, the verdict here is None.
"""

import re
from collections.abc import Sequence

from r1v3.rewards.extract import find_boxed
from r1v3.suite.question import LETTERS, Question, Response

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 5
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_PUNCTUATION = re.compile(r"[^\w\s']")
_PHYX_WORDS = re.compile(r"\b(?:correct|answer|option|Answer|Option|Correct)\b")
_VISULOGIC_STATED = (
    "answer:", "the final answer is:", "the answer is option:", "the answer is:",
    "the correct answer is option:", "the correct answer is:", "the answer should be:",
    "the final answer is", "the answer is option", "the answer is", "the correct answer is option",
    "the correct answer is", "the answer should be",
)  # fmt: skip


def infer_letter(text: str, options: Sequence[str]) -> str | None:
    """The only option letter among the words of a text, if it is one of its last five."""
    words = text.translate(_MARKS).split()
    letters = LETTERS[: len(options)]
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    stated = _STATED.search(text)
    if stated is not None and stated[1].upper() in letters:
        return stated[1].upper()
    return None


def infer_option(text: str, options: Sequence[str]) -> str | None:
    """`infer_letter`, else the letter of the only option whose text is in a short text."""
    letter = infer_letter(text, options)
    if letter is not None:
        return letter
    if len(text) > 2 * sum(map(len, options)):
        return None
    found = [i for i, option in enumerate(options) if option.lower() in text.lower()]
    return LETTERS[found[0]] if len(found) == 1 else None


def choice_rule(question: Question, response: Response) -> bool | None:
    """Multiple choice; open questions have the options gold and "Other Answers", as MMMU's."""
    if question.options:
        found, gold = infer_option(response.final, question.options), question.gold
    elif question.gold in LETTERS:  # the options are in the picture
        found, gold = infer_letter(response.final, LETTERS[:10]), question.gold
    else:
        found, gold = infer_option(response.final, (question.gold, "Other Answers")), "A"
    return None if found is None else found == gold


def known_choice_rule(question: Question, response: Response) -> bool | None:
    """Multiple choice; a judge is asked about open questions."""
    return choice_rule(question, response) if question.options else None


def yes_no_rule(question: Question, response: Response) -> bool | None:
    """Yes xor no among the words."""
    words = _PUNCTUATION.sub("", response.final.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return ("yes" if "yes" in words else "no") == question.gold.strip().lower()


def judge_rule(question: Question, response: Response) -> bool | None:
    """No rule: a judge is always asked."""
    return None


def visulogic_rule(question: Question, response: Response) -> bool | None:
    """The last box of at most two characters, else a letter behind a phrase; never a judge."""
    return visulogic_letter(response.final) == question.gold


def visulogic_letter(text: str) -> str | None:
    """The letter that VisuLogic's rules find."""
    boxes = find_boxed(text)
    content = text if not boxes else boxes[-1]
    for mark in ("\\text{", "\\rm{", "\\mathbf{", "$", "}"):
        content = content.replace(mark, "")
    if boxes and len(content) <= 2 and content.strip() in ("A", "B", "C", "D"):
        return content.strip()
    for letter in "ABCD":
        ends, starts = (f" {letter}.", f" ({letter})."), (f"{letter}\n", f"({letter})\n")
        if text.endswith(ends) or text.startswith(starts):
            return letter
    lower = text.lower()
    for phrase in _VISULOGIC_STATED:
        if phrase in lower:
            rest = lower.rpartition(phrase)[2].strip().partition("\n")[0].partition(".")[0]
            if rest.upper() in ("A", "B", "C", "D"):
                return rest.upper()
    return None


def phyx_rule(question: Question, response: Response) -> bool | None:
    """The first of A to D behind the word correct, answer or option, else the last before ":"."""
    text, gold = response.final, question.gold.strip()
    found = None
    word = _PHYX_WORDS.search(text)
    if word is not None:
        behind = re.search("[A-D]", text[word.end() :])
        found = behind[0] if behind else None
    if found is None:
        letters = re.findall("([ABCD]):", text)
        found = letters[-1] if letters else None
    if found == gold or any(mark in text for mark in (f"{gold}:", f"{gold}**", f"**{gold}")):
        return True
    return None if found is None else False


def seephys_rule(question: Question, response: Response) -> bool | None:
    """Digits in answer tags, else what a phrase states up to its full stop, as equal text."""
    text = response.final
    tagged = re.search(r"<answer>\s*(\d+)\s*</answer>", text)
    stated = re.search(r"(?:the final|The) answer is: (.+?)\.", text)
    match = tagged or stated
    found = match[1] if match else text
    return True if found == question.gold else None
