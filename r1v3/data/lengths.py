"""Rows that are longer than a model has positions, or than a micro-batch may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import InternVLConfig

from r1v3.data.encoding import Example
from r1v3.progress import say

TooLong = Literal["error", "drop"]
_SHOWN_ROWS = 5


@dataclass(frozen=True)
class PositionLimit:
    """The positions of a model, and what happens to rows that need more.

    Attributes:
        positions: the language model's max_position_embeddings.
        too_long: rows beyond them are an error, or are dropped and counted.
        response_tokens: longest response that may be sampled; None for rows with their own.
    """

    positions: int
    too_long: TooLong = "error"
    response_tokens: int | None = None

    @classmethod
    def of(
        cls, config: InternVLConfig, too_long: TooLong, response_tokens: int | None = None
    ) -> "PositionLimit":
        """Build the limit of a model."""
        positions = int(config.get_text_config().max_position_embeddings)
        return cls(positions, too_long, response_tokens)

    def rows(
        self,
        path: Path,
        examples: Mapping[int, Example],
        *,
        shown: bool = True,
    ) -> list[int]:
        """Return the rows of a file that fit, in order.

        Args:
            examples: encoded rows, by their number.
            shown: print how many rows are dropped.

        Raises:
            ValueError: rows do not fit and `too_long` is "error", or none fits; names the first
                of them with their lengths.
        """
        too_long = {row: text for row, one in examples.items() if (text := self._excess(one))}
        kept = [row for row in examples if row not in too_long]
        if not too_long:
            return kept
        told = (
            f"{len(too_long)} of {len(examples)} rows of {path} exceed the model's "
            f"{self.positions} positions (max_position_embeddings)"
        )
        if self.too_long == "drop" and kept:
            say(f"{told} and are dropped", shown=shown)
            return kept
        named = [f"row {row}: {text}" for row, text in list(too_long.items())[:_SHOWN_ROWS]]
        more = f"; and {len(too_long) - _SHOWN_ROWS} more" if len(too_long) > _SHOWN_ROWS else ""
        remedy = "none is left" if self.too_long == "drop" else "shorten them, or set too_long=drop"
        raise ValueError(f"{told}: {'; '.join(named)}{more}; {remedy}")

    def _excess(self, example: Example) -> str | None:
        return self.excess(len(example.prompt_ids), len(example.response_ids))

    def excess(self, prompt: int, response: int) -> str | None:
        """The lengths of a row of so many tokens that does not fit."""
        kind = "response"
        if self.response_tokens is not None:
            response, kind = self.response_tokens, "up to"
        if prompt + response <= self.positions:
            return None
        return f"prompt {prompt} + {kind} {response} = {prompt + response} tokens"


def check_micro_batch_tokens(
    budget: int | None, path: Path, examples: Sequence[Example], response_tokens: int | None = None
) -> None:
    """See that a micro-batch of `budget` tokens holds every sample, before the first step.

    Args:
        response_tokens: longest response that may be sampled; None for rows with their own.

    Raises:
        ValueError: one sample alone has more tokens.
    """
    if budget is None:
        return

    def lengths(example: Example) -> tuple[int, int]:
        own = len(example.response_ids) if response_tokens is None else response_tokens
        return len(example.prompt_ids), own

    prompt, response = max((lengths(example) for example in examples), key=sum)
    # The last token of a response is predicted, and never an input.
    needed = prompt + max(0, response - 1)
    if needed > budget:
        remedy = "max_length" if response_tokens is None else "decoding.max_tokens"
        kind = "a response" if response_tokens is None else "up to"
        raise ValueError(
            f"micro_batch_tokens {budget} is less than one sample of {path} takes: a prompt of "
            f"{prompt} and {kind} {response} tokens; set micro_batch_tokens to {needed} or more, "
            f"or lower {remedy}"
        )
