"""What samples completions for a trainer, wherever the weights that answer live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1v3.data.encoding import Example
from r1v3.data.sample import Sample
from r1v3.data.tokenizer import SPECIAL_TOKENS, THINK_CLOSE, TURN_END, token_id


@dataclass(frozen=True)
class Sampling:
    """How to decode.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: longest completion, forced tokens included.
        banned: token ids that are never sampled (image tokens; NoWait words).
        budget: thought tokens after which an open thought is closed; None leaves it alone.
    """

    temperature: float = 1.0
    max_tokens: int = 96
    banned: tuple[int, ...] = ()
    budget: int | None = None


@dataclass(frozen=True)
class ThoughtClosing:
    """How a thought ends, for a tokenizer where `</think>` is plain text of several tokens.

    `texts` is what every token writes (the tag is found in text, because its first and last marks
    merge with their neighbours: ` </`, `.</`, `>\n\n`), `forced` the token ids that are appended to
    close a thought whose budget is spent.
    """

    texts: tuple[str, ...]
    forced: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: object) -> "ThoughtClosing":
        encode = tokenizer.encode  # type: ignore[attr-defined]
        size = len(tokenizer)  # type: ignore[arg-type]
        texts = tokenizer.batch_decode([[i] for i in range(size)])  # type: ignore[attr-defined]
        forced = encode(f"\n{THINK_CLOSE}\n\n", add_special_tokens=False)
        return cls(tuple(texts), tuple(forced))


@dataclass(frozen=True)
class Rollout:
    """Completions of P prompts x G samples, padded on the right with the padding token.

    Attributes:
        response_ids: int64 [P * G, R].
        mask: bool [P * G, R], True up to and including the end-of-turn token.
        logprobs: float32 [P * G, R], behaviour log-probs at the sampling temperature, in nats.
        entropy: float32 [P * G, R], entropy of the distribution each token was drawn from.
        sampled: bool [P * G, R], False at tokens that were forced by the budget.
        finished: bool [P * G], the end-of-turn token was emitted in time.
    """

    response_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    sampled: Tensor
    finished: Tensor

    def rows(self, start: int, stop: int) -> "Rollout":
        """The completions `start` to `stop`."""
        return Rollout(*(getattr(self, field.name)[start:stop] for field in fields(self)))


def join(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Completions of different widths below each other."""
    width = max(rollout.mask.shape[1] for rollout in rollouts)
    joined = []
    for field in fields(Rollout):
        parts = [getattr(rollout, field.name) for rollout in rollouts]
        if parts[0].dim() == 2:
            value = pad_id if field.name == "response_ids" else 0
            parts = [
                torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value)
                for part in parts
            ]
        joined.append(torch.cat(parts))
    return Rollout(*joined)


@dataclass(frozen=True)
class Request:
    """One prompt to complete.

    Attributes:
        example: the prompt as the trainer sees it. Its token ids are the truth: a sampler that
            builds the prompt in another way must arrive at the same ids or raise.
        sample: where the prompt came from; a server is sent its pictures as the files they are.
        thinking: whether the prompt opens a thought, as it was when `example` was encoded.
    """

    example: Example
    sample: Sample
    thinking: bool = True


class Sampler(Protocol):
    """A source of completions whose weights can be replaced.

    One process drives it, from one thread.
    """

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
    ) -> Rollout:
        """Sample `group_size` completions of every request.

        Row p * group_size + g of the result answers request p. Special tokens other than the end
        of the turn are never sampled, whether `sampling.banned` names them or not.

        Args:
            generator: the only source of randomness; advanced by the call.
        Raises:
            RuntimeError: some prompt has no valid answer and trying again will not give one.
        """
        ...

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Answer with these weights from now on.

        Args:
            tensors: every weight under its HF-native name, as `Engine.export_hf` gives them. It
                is left unread by a sampler that already shares the trainer's weights.
            step: the training step they belong to.
        Raises:
            RuntimeError: the weights did not arrive; what the sampler would answer with is unknown.
        """
        ...

    def sleep(self) -> None:
        """Give up accelerator memory until `wake`; nothing where none is held. May be repeated."""
        ...

    def wake(self) -> None:
        """Be ready to complete again. After a sleep, the weights must be updated first."""
        ...

    def close(self) -> None:
        """Let go of everything: threads, connections, memory. The sampler is of no use after."""
        ...


@dataclass(frozen=True)
class TokenRules:
    """What a sampler must know of a tokenizer.

    Attributes:
        size: number of token ids; a sampled id is in [0, size).
        stop_id: the end-of-turn token, which ends a completion and belongs to it.
        pad_id: what rows are padded with.
        never: special tokens that must not be sampled. A sampled image token would stand for a
            picture that is not there.
        closing: how a thought ends.
    """

    size: int
    stop_id: int
    pad_id: int
    never: tuple[int, ...]
    closing: ThoughtClosing

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "TokenRules":
        """The rules of a tokenizer in Qwen2's layout with InternVL's special tokens."""
        return cls(
            len(tokenizer),
            token_id(tokenizer, TURN_END),
            tokenizer.pad_token_id,
            tuple(token_id(tokenizer, t) for t in SPECIAL_TOKENS if t != TURN_END),
            ThoughtClosing.of(tokenizer),
        )
