"""The JSON of answers: whole completions, and the chunks of a stream."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from r1v3.serve.batching import Delta, Job, Token

# What OpenAI writes for a log-probability of minus infinity, which JSON cannot.
_LEAST = -9999.0


class Replies:
    """The answers to one request.

    Args:
        model: the name that the client asked for.
        vocabulary: bytes of every token id.
        logprobs: whether tokens are reported, with log-probabilities and entropies.
        token_ids: whether token ids are.
    """

    def __init__(
        self,
        job: Job,
        model: str,
        vocabulary: Sequence[bytes],
        *,
        logprobs: bool,
        token_ids: bool,
    ) -> None:
        self._job, self._vocabulary = job, vocabulary
        self._logprobs, self._token_ids = logprobs, token_ids
        self._tokens = self._thought_tokens = 0
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def count(self, delta: Delta) -> None:
        """Add a delta to the usage."""
        self._tokens += len(delta.tokens)
        self._thought_tokens += delta.thought_tokens

    def usage(self) -> dict[str, Any]:
        """Return the tokens of the prompt and of all completions."""
        prompt = len(self._job.example.prompt_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "completion_tokens_details": {"reasoning_tokens": self._thought_tokens},
        }

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the answer of all completions, each as one delta."""
        choices = []
        for delta in sorted(deltas, key=lambda delta: delta.sample):
            message = {
                "role": "assistant",
                "content": delta.answer,
                "reasoning_content": delta.thought or None,
            }
            choices.append(
                {"index": delta.sample, "message": message, **self._details(delta, always=True)}
            )
        answer = {**self._head, "object": "chat.completion", "choices": choices}
        if self._token_ids:
            answer["prompt_token_ids"] = list(self._job.example.prompt_ids)
        return {**answer, "usage": self.usage()}

    def opening(self, sample: int) -> dict[str, Any]:
        """Return the first chunk of a completion."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": sample, "delta": delta, "finish_reason": None}])

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """Return a delta's chunk; None where it shows nothing."""
        shown: dict[str, Any] = {}
        if delta.thought:
            shown["reasoning_content"] = delta.thought
        if delta.answer:
            shown["content"] = delta.answer
        if not (shown or delta.finish or self._logprobs or self._token_ids):
            return None
        choice = {"index": delta.sample, "delta": shown, **self._details(delta, always=False)}
        return self._chunk([choice])

    def closing(self) -> dict[str, Any]:
        """Return the chunk with the usage."""
        return {**self._chunk([]), "usage": self.usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def _details(self, delta: Delta, *, always: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"finish_reason": delta.finish}
        if self._logprobs:
            found["logprobs"] = {"content": [self._entry(token) for token in delta.tokens]}
        elif always:
            found["logprobs"] = None
        if self._token_ids:
            found["token_ids"] = [token.id for token in delta.tokens]
        return found

    def _entry(self, token: Token) -> dict[str, Any]:
        return {
            **self._named(token.id, token.logprob),
            "entropy": max(token.entropy, 0.0),
            "top_logprobs": [self._named(id, value) for id, value in token.alternatives],
        }

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        data = self._vocabulary[id]
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(data)}
