"""NoWait and a thinking budget as logits processors for `generate` of transformers.

    from r1v3.integrations.transformers import NoWait, ThoughtBudget
    model.generate(**inputs, logits_processor=[NoWait(tokenizer), ThoughtBudget(tokenizer, 512, n)])

They need no base class of transformers, which `generate` does not ask for.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from r1v3.data.thoughts import THINK_CLOSE, BudgetedThought
from r1v3.data.words import expand_words
from r1v3.kernels import ban_tokens_

REFLECTION_WORDS = ("Wait", "Alternatively", "Hmm")


class NoWait:
    """Never sample a reflection word, in any form that the vocabulary has as one token.

    Args:
        tokenizer: a fast tokenizer of transformers.
        words: those that the vocabulary splits cannot be banned and are left out.
        enabled: bool [rows], the rows of the batch that are held to it; None for all. With beams,
            rows are prompts times beams.

    Attributes:
        token_ids: int64 [K], what is banned.

    Raises:
        ValueError: no word is a single token.
    """

    def __init__(
        self,
        tokenizer: Any,
        words: Iterable[str] = REFLECTION_WORDS,
        enabled: Tensor | None = None,
    ) -> None:
        self.token_ids = torch.tensor(banned_ids(tokenizer, words))
        self.enabled = enabled
        # There, rows are other requests from step to step.
        self.supports_continuous_batching = enabled is None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, V] with -inf at the banned tokens of the enabled rows."""
        self.token_ids = self.token_ids.to(scores.device)
        if self.enabled is not None:
            self.enabled = self.enabled.to(scores.device)
        # generate() may hand out logits that it goes on using (output_logits): not in place.
        return ban_tokens_(scores.clone(), self.token_ids, enabled=self.enabled)


class ThoughtBudget:
    """Close a thought that is still open after `budget` tokens, by forcing the tag's tokens.

    The prompt opens the thought. The tag is found in text, so that it does not matter into which
    tokens it merges; one that is being written is not cut, and a thought that is opened again has
    a budget of its own. A thought that was closed in time is left alone.

    Args:
        tokenizer: a fast tokenizer of transformers.
        budget: tokens of a thought.
        prompt_length: columns of `input_ids` that hold the prompt, padding included.
        closing: the text that closes a thought; it must hold `</think>`.

    Raises:
        ValueError: budget or prompt_length is negative, or closing has no tag.
    """

    supports_continuous_batching = False

    def __init__(
        self, tokenizer: Any, budget: int, prompt_length: int, closing: str = f"\n{THINK_CLOSE}\n\n"
    ) -> None:
        if budget < 0 or prompt_length < 0:
            raise ValueError(
                f"budget and prompt_length must be at least 0, got {budget} and {prompt_length}"
            )
        if THINK_CLOSE not in closing:
            raise ValueError(f"closing must hold {THINK_CLOSE}, got {closing!r}")
        self._texts = token_texts(tokenizer)
        self._forced = tokenizer.encode(closing, add_special_tokens=False)
        self._budget, self._start = budget, prompt_length
        self._seen: Tensor | None = None
        self._thoughts: list[BudgetedThought] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, V]; a row with a forced token has that one alone."""
        for thought, texts in zip(self._current(input_ids), self._new(input_ids), strict=True):
            for text in texts:
                thought.read(text)
        self._seen = input_ids.clone()
        forced = [thought.forced_token() for thought in self._thoughts]
        rows = [row for row, token in enumerate(forced) if token is not None]
        if not rows:
            return scores
        scores = scores.clone()
        scores[rows] = -torch.inf
        scores[rows, [token for token in forced if token is not None]] = 0.0
        return scores

    def _current(self, input_ids: Tensor) -> list[BudgetedThought]:
        """The rows' thoughts so far, begun anew where beams or another call changed the rows."""
        seen = self._seen
        goes_on = (
            seen is not None
            and input_ids.shape[0] == seen.shape[0]
            and input_ids.shape[1] > seen.shape[1]
            and torch.equal(input_ids[:, : seen.shape[1]], seen)
        )
        if not goes_on:
            self._seen = None
            self._thoughts = [
                BudgetedThought(self._budget, self._forced) for _ in range(len(input_ids))
            ]
        return self._thoughts

    def _new(self, input_ids: Tensor) -> list[list[str]]:
        """The texts of each row's tokens that were not read yet."""
        start = self._start if self._seen is None else max(self._start, self._seen.shape[1])
        size = len(self._texts)
        return [
            [self._texts[i] if i < size else "" for i in row]
            for row in input_ids[:, start:].tolist()
        ]


def banned_ids(tokenizer: Any, words: Iterable[str]) -> list[int]:
    """Return every token that alone writes one of the words; split words are left out.

    Raises:
        ValueError: no word is a single token of this vocabulary.
    """
    words = [words] if isinstance(words, str) else list(words)
    found: set[int] = set()
    for word in words:
        try:
            found.update(expand_words(tokenizer, [word]))
        except ValueError:
            continue
    if not found:
        raise ValueError(f"none of the words {words} is a single token of this vocabulary")
    return sorted(found)


def token_texts(tokenizer: Any) -> Sequence[str]:
    """Return the text of every token id."""
    texts: list[str] = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return texts
