r"""Multiple-choice answers: which options does a short answer name?

Letters are decided here and never by the reader of formulas, to which `AC` is a product.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from r1v3.rewards.notation import tidy, unwrap_text

_LEAD = (
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?"
    r"(?:options?|choices?|answers?)\s*(?:is\s+|are\s+|:\s*)?"
    r"|(?:故|应|因此)?选项?:?|答案[是为选]?:?)?\s*"
)
_CHOICE = re.compile(
    # (B)  (B) 12  (B). 12
    rf"{_LEAD}(?:[(\[{{]\s*(?P<bracketed>[A-Za-z])\s*[)\]}}]\s*(?:[.:。]|,(?=\s*[^A-Z(\[\s]))?"
    # B.  B) 12  B: 12  B - 12
    r"|(?P<delimited>[A-Za-z])\s*(?:[.:。)](?![a-z])|,(?=[^\W\d_a-zA-Z])|-(?=\s))"
    r"|(?P<bare>[A-Za-z])\Z|(?P<spaced>[A-Z])(?=\s))"  # B  B twelve
    r"\s*(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_LETTER = r"[(\[]?\s*([A-Z])\s*[)\]]?(?![A-Za-z])\s*\.?"
_JOINED = r"\s*(?:\\?[,;/&+]\s*(?:and\s+)?|\band\b|[和与及]|以及)?\s*"
_LETTERS = re.compile(
    rf"{_LEAD}(?:{_LETTER}(?:{_JOINED}{_LETTER})+|(?P<run>[A-Z]{{2,8}})\.?)", re.DOTALL
)
_LETTER_FIRST = re.compile(r"(?P<letter>[A-Z])\s*(?:[,=]|(?=\(.*\)\Z)\()\s*(?P<text>.+?)\)?")
_LETTER_LAST = re.compile(r"(?P<text>.+?)\s*(?:,\s*|(?=\())\(?(?P<letter>[A-Z])\)?")
_ENUMERATED = re.compile(r"\A(\s*[A-Z])\s*、")
MAX_LETTERS = 8
_ONE_LETTER = re.compile(r"[A-Z]")
_SPLIT = re.compile(r"\s*(?:[,;\n]|\band\b)\s*(?=\(?[A-Z]\s*[).:])")
_HEDGE = re.compile(
    r"(?:\b(?:or|and)\b|[,;/&或和])\s*[(\[]?\s*([A-Z])(?![A-Za-z])|^[(\[]?\s*[A-Z]\s*[)\].]?\s*$"
)
_DENIAL = re.compile(
    r"\b(?:is|are|was|be)\s+(?:not|wrong|incorrect|false|never)\b|\bisn't\b|\b(?:wrong|incorrect)\b"
    r"|^\s*(?:not\b|or\b)|错|不对|不是|不正确|排除",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    r"\b(?:not?|none|nor|neither|never|cannot|impossible|unlikely|excluded?|eliminated?|rejected"
    r"|ruled|invalid|fails?|too|except|maybe|perhaps|possibly|actually|rather|instead|wait|mean)\b"
    r"|\w+n't\b|还是|但|而",
    re.IGNORECASE,
)
_OTHER_LETTER = re.compile(r"(?<![\w\\'])(?:(?![AI]\s+[a-z])([A-Z]))(?![\w'])")
_LABEL = re.compile(r"\s*(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.:)])[.:]?\s*(?=\S)")


@dataclass(frozen=True)
class Choice:
    """Option `index` (0 = A), named by its letter or by its text; `rest` is what follows it."""

    index: int
    by_text: bool
    rest: str = ""


def plain_text(answer: str) -> str:
    r"""Answer in one notation (`notation.tidy`), without `\text{}`-like wrappers."""
    return unwrap_text(tidy(answer)).strip()


def option_texts(options: Sequence[str]) -> list[str]:
    """Options without their labels, if every one carries its own letter (`A. 12`, `(B) 14`)."""
    texts = []
    for i, option in enumerate(options):
        match = _LABEL.match(option.replace("．", ".").replace("：", ":").replace("、", "."))
        if match is None or ord(match[1] or match[2]) != ord("A") + i:
            return list(options)
        texts.append(option[match.end() :])
    return texts


def option_key(text: str) -> str:
    """Options that differ only in case, spacing, markup or a final full stop are the same."""
    return plain_text(text).rstrip(".。").replace(" ", "").casefold()


def letter_choice(answer: str) -> tuple[str, str, bool] | None:
    """(letter as written, text after it, whether only a space parts them), else None.

    For "B", "(B)", "B.", "(B) 12", "B - 12", "B twelve", "option B".
    """
    match = _CHOICE.fullmatch(plain_text(_ENUMERATED.sub(r"\1. ", answer)))
    if match is None:
        return None
    letter = match["bracketed"] or match["delimited"] or match["bare"] or match["spaced"]
    return letter, match["rest"].strip(), match["spaced"] is not None


def find_letters(answer: str) -> frozenset[str] | None:
    """Several capital letters that an answer names, in any order: `AC`, `C, A`, `A and C`, `A、C`.

    None if it names one or none, names one twice, or says anything else ("A or C").
    """
    text = plain_text(answer)
    if len(text) > 2 and text[0] + text[-1] in ("()", "[]") and text.count(text[0]) == 1:
        text = text[1:-1]
    if text[:1] + text[-1:] == "{}":
        text = text[1:-1]
    text = text.removeprefix("\\{").removesuffix("\\}").strip()
    # The time of the pattern below multiplies with every letter.
    if len(re.findall(r"\b[A-Z]\b", text)) > MAX_LETTERS:
        return None
    match = _LETTERS.fullmatch(text)
    if match is None:
        return None
    found = _ONE_LETTER.findall(match["run"] or text[_lead_length(text) :])
    letters = frozenset(found)
    return letters if 1 < len(letters) == len(found) else None


def _lead_length(text: str) -> int:
    lead = re.match(_LEAD, text)
    return lead.end() if lead else 0


def _says_more(rest: str, index: int, options: Sequence[str]) -> bool:
    """Whether a remark behind a letter takes it back or names a second one.

    What the option's own text says as well is no remark: `D. cannot be determined`.
    """
    own, rest = plain_text(options[index]), plain_text(rest)
    if {v.casefold() for v in _VERDICT.findall(rest)} - {
        v.casefold() for v in _VERDICT.findall(own)
    }:
        return True
    letters = {chr(ord("A") + i) for i in range(len(options)) if i != index}
    return bool(letters & set(_OTHER_LETTER.findall(rest)) - set(_OTHER_LETTER.findall(own)))


def _with_own_text(answer: str, keys: Sequence[str]) -> int | None:
    """The option of `12 cm (B)`, `12 cm, B`, `B (12 cm)`, `B, 12 cm` or `B = 12 cm`."""
    text = plain_text(answer).rstrip(".。")
    for match in (_LETTER_FIRST.fullmatch(text), _LETTER_LAST.fullmatch(text)):
        if match is not None:
            index = ord(match["letter"]) - ord("A")
            if index < len(keys) and option_key(match["text"]) == keys[index] != "":
                return index
    return None


def find_choice(answer: str, options: Sequence[str]) -> Choice | None:
    """The option that `answer` names, or None if it names none or hedges between several.

    A letter wins over an option whose text happens to be that letter. Text after the letter may
    be the option's own text or a remark, but not another option's text and not a second letter
    ("B or C", "B. 12, C. 13"). Without a sign between them it must be the option's own text.
    """
    keys = [option_key(option) for option in options]
    key = option_key(answer)
    beside = _with_own_text(answer, keys)
    if beside is not None:
        return Choice(beside, by_text=False)
    named = letter_choice(answer)
    if named is not None:
        letter, rest, spaced = named
        index = ord(letter.upper()) - ord("A")
        rest_key = option_key(rest)
        if index < len(options):
            if not rest_key or rest_key == keys[index]:
                return Choice(index, by_text=False)
            if not spaced:
                hedged = rest_key in keys or bool(_HEDGE.search(rest) or _DENIAL.search(rest))
                hedged = hedged or _says_more(rest, index, options)
                return None if hedged else Choice(index, by_text=False, rest=rest)
    return Choice(keys.index(key), by_text=True) if key and key in keys else None


def find_choices(answer: str, options: Sequence[str]) -> frozenset[int] | None:
    """Several options that `answer` names, by letters alone or by letters with their texts."""
    letters = find_letters(answer)
    if letters is not None:
        indices = frozenset(ord(letter) - ord("A") for letter in letters)
        return indices if max(indices) < len(options) else None
    parts = _SPLIT.split(plain_text(answer))
    choices = [find_choice(part, options) for part in parts] if len(parts) > 1 else [None]
    found = [c.index for c in choices if c is not None and not c.rest]
    return frozenset(found) if len(set(found)) == len(parts) else None


def find_letter(answer: str) -> str | None:
    """The capital letter that `answer` names when the options are not known, else None."""
    named = letter_choice(answer)
    if named is None or not named[0].isupper():
        return None
    letter, rest, spaced = named
    if _HEDGE.search(rest) or _DENIAL.search(rest):
        return None
    # "A dog" and "I think" begin with words, not with letters of options.
    return None if spaced and letter in "AI" and rest[:1].islower() else letter
