"""The tags of a thought in a text that grows token by token.

`<think>` and `</think>` may be plain text of several tokens, whose first and last characters merge
with their neighbors (` </`, `.</`, `>\\n\\n`): they are found in text, not by token ids.
"""

import math
from collections.abc import Sequence

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def follow_tags(written: str, closed: bool) -> tuple[str, bool, bool]:
    """Follow a thought through the tags in text.

    Args:
        written: what may hold the rest of a tag, and the text after it.
        closed: whether the thought is closed in front of it.

    Returns:
        The end of the text that may hold the beginning of a tag, whether the thought is closed
        now, and whether one was opened in between.
    """
    reopened = False
    while (sought := THINK_OPEN if closed else THINK_CLOSE) in written:
        written = written.partition(sought)[2]
        closed = sought == THINK_CLOSE
        reopened = reopened or not closed
    return written[1 - len(THINK_CLOSE) :], closed, reopened


def inside_tag(written: str) -> bool:
    """Return whether text ends in the beginning of a closing tag."""
    return any(written.endswith(THINK_CLOSE[:n]) for n in range(2, len(THINK_CLOSE)))


class BudgetedThought:
    """The thoughts of one completion, each of which is closed when its budget is spent.

    A thought is open at the start: the prompt opened it. A tag that is being written is not cut.

    Args:
        budget: tokens that a thought may have.
        forced: the token ids that close one, such as those of "\\n</think>\\n\\n".
        max_tokens: longest completion. A thought with a budget is closed while the tag still fits;
            one that has a budget of all of them is not.
    """

    def __init__(self, budget: int, forced: Sequence[int], max_tokens: int | None = None) -> None:
        self._budget, self._forced = budget, tuple(forced)
        self._latest = math.inf
        if max_tokens is not None:
            self._latest = max_tokens - len(forced) if budget < max_tokens else -1
        self._length, self._due = 0, min(budget, self._latest)
        self._forced_from: int | None = None
        self._written, self._closed = "", False

    def read(self, text: str) -> None:
        """Take note of the completion's next token, by its text."""
        self._written, self._closed, reopened = follow_tags(self._written + text, self._closed)
        self._length += 1
        if self._forced_from is not None and self._length - self._forced_from == len(self._forced):
            self._forced_from = None
        if reopened:
            self._due = min(self._length + self._budget, self._latest)

    def forced_token(self) -> int | None:
        """Return what the next token must be, or None where the model is free."""
        if self._forced_from is None:
            due = not self._closed and self._due <= self._length <= self._latest
            if not due or (self._length < self._latest and inside_tag(self._written)):
                return None
            self._forced_from = self._length
        return self._forced[self._length - self._forced_from]
