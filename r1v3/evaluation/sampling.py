"""A model that answers samples: prompts in, graded completions out, in every decoding mode."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from r1v3.data.encoding import ImageShape, encode_sample
from r1v3.data.sample import Sample
from r1v3.data.tokenizer import TURN_END, token_id
from r1v3.rewards import accuracy_reward
from r1v3.rollout.contract import Request, Rollout, Sampler, Sampling
from r1v3.rollout.local import decode_texts


@dataclass(frozen=True)
class Answers:
    """Completions of Q questions, S each, question by question."""

    rollouts: list[Rollout]
    texts: list[str]
    correct: np.ndarray
    tokens: np.ndarray


class Policy:
    """A sampler with its tokenizer, ready to complete and grade.

    Args:
        shape: how pictures become tiles.
    """

    def __init__(
        self, sampler: Sampler, tokenizer: PreTrainedTokenizerFast, shape: ImageShape
    ) -> None:
        self.sampler, self.tokenizer, self.shape = sampler, tokenizer, shape
        self.stop_id = token_id(tokenizer, TURN_END)

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        generator: torch.Generator,
        group_size: int = 1,
    ) -> tuple[Rollout, list[str]]:
        """Sample `group_size` completions per prompt; the rollout and its texts."""
        rollout = self.sampler.complete(
            requests, sampling, group_size=group_size, generator=generator
        )
        return rollout, decode_texts(self.tokenizer, rollout, self.stop_id)

    def answer(
        self,
        samples: Sequence[Sample],
        sampling: Sampling,
        *,
        generator: torch.Generator,
        repeats: int = 1,
        thinking: bool = True,
        batch_prompts: int = 64,
    ) -> Answers:
        """Complete and grade every sample `repeats` times.

        Questions are batched in order of prompt length; the result is in the samples' order.
        """
        asked = [
            Request(
                encode_sample(sample, self.tokenizer, self.shape, thinking=thinking),
                sample,
                thinking,
            )
            for sample in samples
        ]
        by_length = sorted(range(len(samples)), key=lambda i: len(asked[i].example.prompt_ids))
        texts: list[str] = [""] * (len(samples) * repeats)
        tokens = np.zeros((len(samples), repeats), dtype=np.int64)
        rollouts: list[Rollout | None] = [None] * len(samples)
        for start in range(0, len(samples), batch_prompts):
            chosen = by_length[start : start + batch_prompts]
            rollout, completed = self.complete(
                [asked[i] for i in chosen], sampling, generator=generator, group_size=repeats
            )
            lengths = rollout.mask.sum(1).view(-1, repeats).numpy()
            for position, i in enumerate(chosen):
                rows = slice(position * repeats, (position + 1) * repeats)
                texts[i * repeats : (i + 1) * repeats] = completed[rows]
                tokens[i] = lengths[position]
                rollouts[i] = rollout.rows(rows.start, rows.stop)
        correct = np.array(
            [
                accuracy_reward(
                    text, samples[n // repeats].ground_truth, options=samples[n // repeats].options
                )
                for n, text in enumerate(texts)
            ]
        ).reshape(len(samples), repeats)
        return Answers([r for r in rollouts if r is not None], texts, correct, tokens)

    def grade(
        self,
        samples: Sequence[Sample],
        sampling: Sampling,
        *,
        samples_each: int = 1,
        generator: torch.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Correctness and token counts [Q, S] of slow-thinking answers."""
        answers = self.answer(samples, sampling, generator=generator, repeats=samples_each)
        return answers.correct, answers.tokens
