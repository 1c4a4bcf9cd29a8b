"""Loops and rambling in a thought."""

import re

import numpy as np

from r1v3.distill.text import sentences, words

_LONGEST_PASSAGE = 300
PHRASE_WORDS = 8
_LEAST_PHRASES = 50
_LEAST_SENTENCES = 20
_HESITATION = re.compile(
    r"[\s\"'*-]*(?:(?:but )?wait|hmm+|hold on|alternatively|actually|no,"
    r"|let me (?:re-?check|double[- ]check|reconsider|try again)"
    r"|等等|等一下|等下|嗯|慢着|不对|或者|重新|让我再|我再|再想想|再检查)",
    re.IGNORECASE,
)


def has_loop(text: str, repeats: int, least_words: int) -> bool:
    """Return whether a passage stands `repeats` times in a row, over `least_words` words in all."""
    found = words(text)
    if len(found) < least_words:
        return False
    _, numbers = np.unique(np.array(found, dtype=object).astype(str), return_inverse=True)
    for period in range(1, min(_LONGEST_PASSAGE, len(found) // repeats) + 1):
        wanted = max(period * repeats, least_words) - period
        if _longest_run(numbers[period:] == numbers[:-period]) >= wanted:
            return True
    return False


def _longest_run(equal: np.ndarray) -> int:
    """The most True values in a row."""
    ends = np.flatnonzero(np.concatenate(([True], ~equal, [True])))
    return int(np.diff(ends).max()) - 1


def repeated_phrases(text: str) -> float:
    """The fraction of phrases of eight words that stood in the text before; 0 in short texts."""
    found = words(text)
    count = len(found) - PHRASE_WORDS + 1
    if count < _LEAST_PHRASES:
        return 0.0
    different = {tuple(found[i : i + PHRASE_WORDS]) for i in range(count)}
    return 1 - len(different) / count


def hesitations(text: str) -> float:
    """The fraction of sentences that open with a re-check; 0 in texts of few sentences."""
    found = sentences(text)
    if len(found) < _LEAST_SENTENCES:
        return 0.0
    return sum(_HESITATION.match(sentence) is not None for sentence in found) / len(found)
