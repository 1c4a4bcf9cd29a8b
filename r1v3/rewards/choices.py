r"""Multiple-choice answers: which option does a short answer name?

Letters are decided here and never by math-verify, whose string extraction reads the answer
"B is wrong, C" as B and does not see a letter inside `\boxed{}`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|rm)\s{0,4}\{([^{}]{0,1000})\}")
_SPACE = re.compile(r"\s+|~|\\[,;:! ]|\\q?quad")
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?"
    r"(?:[(\[（【]\s*([A-Za-z])\s*[)\]）】]\s*[.:：、]?"  # (B)  (B) 12  (B). 12
    r"|([A-Za-z])\s*[.:：、)）](?![a-z])"  # B.  B) 12  B: 12
    r"|([A-Za-z])\Z)"  # B
    r"\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_HEDGE = re.compile(r"(?:\b(?:or|and)\b|[,;/&、或和])\s*[(\[（【]?\s*([A-Z])(?![A-Za-z])")


@dataclass(frozen=True)
class Choice:
    """Option `index` (0 = A), named by its letter or by its text."""

    index: int
    by_text: bool


def plain_text(answer: str) -> str:
    r"""Answer without `$`, `**`, `\text{}`-like wrappers and repeated or LaTeX spacing."""
    text = answer.replace("$", "").replace("**", "")
    for _ in range(4):
        unwrapped = _MARKUP.sub(r"\1", text)
        if unwrapped == text:
            break
        text = unwrapped
    return _SPACE.sub(" ", text).strip()


def option_key(text: str) -> str:
    """Options that differ only in case, spacing, markup or a final full stop are the same."""
    return plain_text(text).rstrip(".。").replace(" ", "").casefold()


def letter_choice(answer: str) -> tuple[str, str] | None:
    """(letter as written, text after it) for "B", "(B)", "B.", "(B) 12", "option B", else None."""
    match = _CHOICE.fullmatch(plain_text(answer))
    if match is None:
        return None
    bracketed, delimited, bare, rest = match.groups()
    return bracketed or delimited or bare, rest.strip()


def find_choice(answer: str, options: Sequence[str]) -> Choice | None:
    """The option that `answer` names, or None if it names none or hedges between several.

    A letter wins over an option whose text happens to be that letter. Text after the letter may
    be the option's own text or a remark, but not another option's text and not a second letter
    ("B or C", "B. 12, C. 13").
    """
    keys = [option_key(option) for option in options]
    named = letter_choice(answer)
    if named is not None:
        letter, rest = named
        index = ord(letter.upper()) - ord("A")
        if index < len(options):
            rest_key = option_key(rest)
            if not rest_key or rest_key == keys[index]:
                return Choice(index, by_text=False)
            if rest_key in keys or _HEDGE.search(rest):
                return None
            return Choice(index, by_text=False)
    key = option_key(answer)
    return Choice(keys.index(key), by_text=True) if key and key in keys else None


def find_letter(answer: str) -> str | None:
    """The capital letter that `answer` names when the options are not known, else None."""
    named = letter_choice(answer)
    if named is None or not named[0].isupper() or _HEDGE.search(named[1]):
        return None
    return named[0]
