"""What samples completions for a trainer, wherever the weights that answer live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1v3.data.encoding import Example
from r1v3.data.sample import Sample
from r1v3.data.tokenizer import SPECIAL_TOKENS, TURN_END, token_id
from r1v3.rollout.local import Rollout, Sampling, ThoughtClosing


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
