"""The interface of everything that samples completions for a trainer or an evaluation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1v3.config import DEFAULT_PICTURES, Pictures
from r1v3.data.encoding import Example
from r1v3.data.sample import Sample
from r1v3.data.special_tokens import SPECIAL_TOKENS, TURN_END
from r1v3.data.thoughts import THINK_CLOSE
from r1v3.data.tokenizer import token_id
from r1v3.rollout.copies import Copies


@dataclass(frozen=True)
class Request:
    """One prompt to complete.

    Attributes:
        example: the prompt as the trainer sees it. Its token ids are binding: a sampler that
            builds the prompt in another way must arrive at the same ids or raise.
        sample: the source of the prompt; a server is sent the pixels of its images.
        thinking: whether the prompt opens a thought, as it did when `example` was encoded.
        pictures: how the images were decoded for `example`; a sampler that is given images gets
            these pixels.
        seed: of this prompt's own random numbers, below 2**48, so that its completions do not
            depend on what else is asked; None takes them from the generator of the call.
        max_tiles: most tiles of a picture in `example`, where that is not the model's own number.
    """

    example: Example
    sample: Sample
    thinking: bool = True
    pictures: Pictures = DEFAULT_PICTURES
    seed: int | None = None
    max_tiles: int | None = None

    def own_generator(self, sample: int = 0) -> torch.Generator | None:
        """The source of random numbers of one of this prompt's completions, at its beginning."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed + sample)


@dataclass(frozen=True)
class Sampling:
    """Settings of decoding.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: longest completion, forced tokens included.
        banned: token ids that are never sampled (image tokens; NoWait words).
        budget: thought tokens after which an open thought is closed; None sets no limit.
    """

    temperature: float = 1.0
    max_tokens: int = 96
    banned: tuple[int, ...] = ()
    budget: int | None = None


@dataclass(frozen=True)
class Rollout:
    """Completions of P prompts x G samples, padded on the right with the padding token.

    Attributes:
        response_ids: int64 [P * G, R].
        mask: bool [P * G, R], True up to and including the end-of-turn token.
        logprobs: float32 [P * G, R], log-probs of the sampling distribution, in nats.
        entropy: float32 [P * G, R], entropy of the distribution each token was drawn from, in
            nats.
        sampled: bool [P * G, R], False at tokens that the budget forced.
        finished: bool [P * G], True where the end-of-turn token came within the limit.
    """

    response_ids: Tensor
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    sampled: Tensor
    finished: Tensor

    def rows(self, start: int, stop: int) -> "Rollout":
        """Return the completions `start` to `stop`."""
        return Rollout(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def take(self, rows: Sequence[int]) -> "Rollout":
        """Return some completions, in this order."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        return Rollout(*(getattr(self, field.name)[chosen] for field in fields(self)))


def nothing() -> Rollout:
    """Return a rollout without completions."""
    whole, number = torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, 1)
    return Rollout(torch.zeros(0, 1, dtype=torch.int64), whole, number, number, whole, whole[:, 0])


def join(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Concatenate rollouts, padding all of them to the widest."""
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


def decode_texts(tokenizer: PreTrainedTokenizerFast, rollout: Rollout, stop_id: int) -> list[str]:
    """Decode completions, special tokens included, without the end-of-turn token."""
    texts: list[str] = []
    lists: Sequence[list[int]] = rollout.response_ids.tolist()
    for ids, mask in zip(lists, rollout.mask.tolist(), strict=True):
        kept = [i for i, m in zip(ids, mask, strict=True) if m and i != stop_id]
        texts.append(str(tokenizer.decode(kept, skip_special_tokens=False)))
    return texts


class Sampler(Protocol):
    """A source of completions whose weights can be replaced.

    Attributes:
        rules: of the tokenizer.
        copies: which ranks of the job hold which completions; of one process, all.
    """

    rules: "TokenRules"
    copies: Copies

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
    ) -> Rollout:
        """Sample `group_size` completions of every request; return those that this rank holds.

        They are of the requests `copies.prompts(len(requests))`: row p * group_size + g of the
        result answers the p-th of these. Special tokens other than the end
        of the turn are never sampled, whether `sampling.banned` names them or not.

        Args:
            generator: the only source of randomness; advanced by the call.
        Raises:
            RuntimeError: some prompt has no valid answer, and a retry would not give one.
        """
        ...

    def stream(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
        batch_prompts: int,
    ) -> Iterator[tuple[list[int], Rollout]]:
        """Sample `group_size` completions of every request; yield them as they come.

        Every rank is given what every other is: the numbers of the requests that were completed,
        counted from 0 as they were drawn, and all their completions, in the order of `complete`.

        Args:
            requests: drawn as there is room, so that their pictures need not all be held; perhaps
                on the first rank alone, and in another thread.
            generator: as `complete`; requests with seeds of their own do not use it.
            batch_prompts: how many are completed at a time by an engine that waits for the last of
                them.
        Raises:
            RuntimeError: as `complete`.
        """
        ...

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> None:
        """Replace the weights that answer.

        Args:
            tensors: every weight under its HF-native name, as `Engine.export_hf` gives them. A
                sampler that already shares the trainer's weights does not read it.
            step: the training step that the weights belong to.
        Raises:
            RuntimeError: the weights did not arrive; the sampler's weights are undefined.
        """
        ...

    def sleep(self) -> None:
        """Release accelerator memory until `wake`, where some is held; may be called twice."""
        ...

    def wake(self) -> None:
        """Prepare to complete again. After a sleep, the weights must be updated first."""
        ...

    def close(self) -> None:
        """Release threads, connections and memory; the sampler cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class ThoughtClosing:
    r"""The end of a thought, for a tokenizer that writes `</think>` as several text tokens.

    Attributes:
        texts: the text of every token id. The tag is found in text, because its first and last
            characters merge with their neighbors: ` </`, `.</`, `>\n\n`.
        forced: token ids that are appended to close a thought whose budget is spent.
    """

    texts: tuple[str, ...]
    forced: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "ThoughtClosing":
        """Build it from a tokenizer."""
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        forced = tokenizer.encode(f"\n{THINK_CLOSE}\n\n", add_special_tokens=False)
        return cls(tuple(texts), tuple(forced))

    def text(self, token: int) -> str:
        """Return the text of a token; none of an id beyond the tokenizer's."""
        return self.texts[token] if token < len(self.texts) else ""


@dataclass(frozen=True)
class TokenRules:
    """Properties of a tokenizer that a sampler needs.

    Attributes:
        size: number of token ids; a sampled id is in [0, size).
        stop_id: the end-of-turn token, which ends a completion and belongs to it.
        pad_id: the padding token.
        never: special tokens that must not be sampled. A sampled image token would stand for an
            image that does not exist.
        closing: the end of a thought.
    """

    size: int
    stop_id: int
    pad_id: int
    never: tuple[int, ...]
    closing: ThoughtClosing

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "TokenRules":
        """Build the rules of a tokenizer in Qwen2's layout with InternVL's special tokens."""
        return cls(
            len(tokenizer),
            token_id(tokenizer, TURN_END),
            tokenizer.pad_token_id,
            tuple(token_id(tokenizer, t) for t in SPECIAL_TOKENS if t != TURN_END),
            ThoughtClosing.of(tokenizer),
        )
