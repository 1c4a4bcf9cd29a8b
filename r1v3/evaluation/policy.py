"""A policy that answers questions: samples in, graded completions out, in every decoding mode."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from r1v3.config import DEFAULT_PICTURES, Decoding, Evaluate, Pictures, Suite
from r1v3.data.encoding import Example, encode_sample, model_image_shape
from r1v3.data.sample import Sample
from r1v3.data.special_tokens import TURN_END
from r1v3.data.tiles import ImageShape, TileCache
from r1v3.data.tokenizer import load_tokenizer, token_id
from r1v3.data.words import expand_words
from r1v3.engine.build import build_engine
from r1v3.engine.contract import Decoder
from r1v3.engine.hf.decoder import HFDecoder
from r1v3.model.internvl import load_model
from r1v3.ranks import ALONE, Ranks
from r1v3.rewards import score
from r1v3.rollout.build import build_sampler
from r1v3.rollout.contract import Request, Rollout, Sampler, Sampling, TokenRules, decode_texts
from r1v3.rollout.exchange import own_rows
from r1v3.rollout.local import LocalSampler


def mode_sampling(
    decoding: Decoding, words: Sequence[str], tokenizer: PreTrainedTokenizerFast, mode: str
) -> tuple[Sampling, bool]:
    """Return the sampling of a mode, and whether its template opens a thought.

    As in the report, section 6.2. slow: the thinking template. nothink: the template without
    `<think>`. nowait: slow, with every surface form of `words` banned. budget-N: slow, with the
    thought closed after N tokens.

    Raises:
        ValueError: the mode is none of these.
    """
    banned: tuple[int, ...] = ()
    budget = None
    if mode == "nowait":
        banned = tuple(expand_words(tokenizer, words))
    elif mode.startswith("budget-") and mode.removeprefix("budget-").isdecimal():
        budget = int(mode.removeprefix("budget-"))
    elif mode not in ("slow", "nothink"):
        raise ValueError(f"mode {mode!r} is not slow, nothink, nowait or budget-N")
    sampling = Sampling(decoding.temperature, decoding.max_tokens, banned, budget)
    return sampling, mode != "nothink"


def question_seed(seed: int, *question: str | bytes) -> int:
    """The seed of a question's random numbers: that of the run, and what tells it from others.

    It is the same in every mode and for every checkpoint, so that gains are paired.
    """
    digest = hashlib.sha256(str(seed).encode())
    for part in question:
        digest.update(b"\0" + (part.encode() if isinstance(part, str) else part))
    return int.from_bytes(digest.digest()[:6], "big")


@dataclass(frozen=True)
class Answers:
    """S completions of each of Q questions, question by question.

    Attributes:
        rollouts: Q rollouts of S rows.
        texts: Q * S completions.
        correct: float64 [Q, S], 1 where the answer is right, else 0.
        tokens: int64 [Q, S], lengths in tokens.
    """

    rollouts: list[Rollout]
    texts: list[str]
    correct: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Part:
    """The completions that one rank answers for.

    Attributes:
        rows: their numbers among all.
        rollout, texts: of these.
    """

    rows: range
    rollout: Rollout
    texts: list[str]


class Policy:
    """A sampler with its tokenizer, ready to answer and to be graded.

    Args:
        shape: how images become tiles.
        cache: where tiles are kept; None for one of its own.
        ranks: the processes that answer together; each grades a part.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerFast,
        shape: ImageShape,
        cache: TileCache | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.sampler, self.tokenizer, self.shape, self.ranks = sampler, tokenizer, shape, ranks
        self.cache = cache or TileCache()
        self.stop_id = token_id(tokenizer, TURN_END)
        self._asked: Sequence[Sample] = ()
        self._requests: dict[bool, list[Request]] = {}

    def remember(self, samples: Sequence[Sample], examples: Sequence[Example]) -> None:
        """Take `examples` for these samples, as encoded in the thinking template."""
        pairs = zip(samples, examples, strict=True)
        self._asked = samples
        self._requests = {True: [self._request(sample, example, True) for sample, example in pairs]}

    def requests(self, samples: Sequence[Sample], thinking: bool) -> list[Request]:
        """Encode samples; those of the same sequence are encoded once for each template."""
        if samples is not self._asked:
            self._asked, self._requests = samples, {}
        if thinking not in self._requests:
            self._requests[thinking] = [
                self._request(
                    sample,
                    encode_sample(
                        sample, self.tokenizer, self.shape, thinking=thinking, cache=self.cache
                    ),
                    thinking,
                )
                for sample in samples
            ]
        return self._requests[thinking]

    def _request(self, sample: Sample, example: Example, thinking: bool) -> Request:
        return Request(example, sample, thinking, self.shape.pictures)

    def ask(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        generator: torch.Generator,
        repeats: int = 1,
        batch_prompts: int,
    ) -> Iterator[tuple[list[int], Rollout, list[str]]]:
        """Sample `repeats` completions of each prompt; yield them with their texts as they come.

        See `contract.Sampler.stream`.
        """
        for numbers, rollout in self.sampler.stream(
            requests,
            sampling,
            group_size=repeats,
            generator=generator,
            batch_prompts=batch_prompts,
        ):
            yield numbers, rollout, decode_texts(self.tokenizer, rollout, self.stop_id)

    def complete_part(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        generator: torch.Generator,
        group_size: int,
    ) -> Part:
        """Sample completions of each prompt; return those that this rank answers for."""
        rollout = self.sampler.complete(
            requests, sampling, group_size=group_size, generator=generator
        )
        copies, prompts = self.sampler.copies, len(requests)
        own = own_rows(rollout, copies, prompts, group_size)
        texts = decode_texts(self.tokenizer, own, self.stop_id)
        return Part(copies.rows(prompts, group_size), own, texts)

    def answer(
        self,
        samples: Sequence[Sample],
        sampling: Sampling,
        *,
        generator: torch.Generator,
        seeds: Sequence[int] | None = None,
        repeats: int = 1,
        thinking: bool = True,
        batch_prompts: int = 64,
        notify: Callable[[int], None] = lambda completions: None,
    ) -> Answers:
        """Complete and grade every sample `repeats` times.

        Prompts are asked in order of their length; the answers come in the order of `samples`.

        Args:
            generator: as `contract.Sampler.stream`.
            seeds: of the random numbers of each sample; None takes them from `generator`.
            notify: told how many completions have come, whenever some have.
        """
        requests = self.requests(samples, thinking)
        if seeds is not None:
            pairs = zip(requests, seeds, strict=True)
            requests = [replace(request, seed=seed) for request, seed in pairs]
        by_length = _by_length(requests)
        texts: list[str] = [""] * (len(samples) * repeats)
        tokens = np.zeros((len(samples), repeats), dtype=np.int64)
        rollouts: list[Rollout | None] = [None] * len(samples)
        for numbers, rollout, completed in self.ask(
            (requests[i] for i in by_length),
            sampling,
            generator=generator,
            repeats=repeats,
            batch_prompts=batch_prompts,
        ):
            lengths = rollout.mask.sum(1).view(-1, repeats).numpy()
            for position, number in enumerate(numbers):
                i, rows = by_length[number], slice(position * repeats, (position + 1) * repeats)
                texts[i * repeats : (i + 1) * repeats] = completed[rows]
                tokens[i] = lengths[position]
                rollouts[i] = rollout.rows(rows.start, rows.stop)
            notify(len(completed))
        asked = [sample for sample in samples for _ in range(repeats)]
        # Time limits may differ from rank to rank; grades must not.
        rewards = self.ranks.divide(
            len(texts),
            lambda own: score(
                texts[own.start : own.stop], asked[own.start : own.stop], thinking=thinking
            ),
        )
        correct = np.array([reward.rule for reward in rewards]).reshape(len(samples), repeats)
        return Answers([r for r in rollouts if r is not None], texts, correct, tokens)

    def grade(
        self,
        samples: Sequence[Sample],
        sampling: Sampling,
        *,
        generator: torch.Generator,
        repeats: int,
        batch_prompts: int,
        stopping: Callable[[], bool],
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Complete and grade samples as `answer` does, each completion where it was sampled.

        Args:
            stopping: asked before each batch, with the same answer on every rank.

        Returns:
            `Answers.correct` and `Answers.tokens`, or None when it was stopped.
        """
        requests = self.requests(samples, True)
        texts: dict[int, str] = {}
        lengths: dict[int, int] = {}
        by_length = _by_length(requests)
        for start in range(0, len(by_length), batch_prompts):
            if stopping():
                return None
            chosen = by_length[start : start + batch_prompts]
            part = self.complete_part([requests[i] for i in chosen], sampling, generator, repeats)
            counts = part.rollout.mask.sum(1).tolist()
            for row, text, count in zip(part.rows, part.texts, counts, strict=True):
                number = chosen[row // repeats] * repeats + row % repeats
                texts[number], lengths[number] = text, count

        def graded() -> list[float]:
            asked = [samples[number // repeats] for number in texts]
            return [reward.rule for reward in score(list(texts.values()), asked)]

        # Time limits may differ from rank to rank; grades must not.
        own = self.ranks.call_all(graded)[self.ranks.rank]
        found = {
            number: torch.tensor([correct, length], dtype=torch.float64)
            for (number, length), correct in zip(lengths.items(), own, strict=True)
        }
        table = self.ranks.table(found, len(samples) * repeats, 2).view(-1, repeats, 2).numpy()
        return table[..., 0], table[..., 1].astype(np.int64)


def _by_length(requests: Sequence[Request]) -> list[int]:
    """Positions of requests in the order of their prompts' lengths."""
    return sorted(range(len(requests)), key=lambda i: len(requests[i].example.prompt_ids))


def build_policy(
    config: Evaluate | Suite,
    tokenizer: PreTrainedTokenizerFast,
    shape: ImageShape,
    ranks: Ranks,
    *,
    max_length: int,
    cache: TileCache | None = None,
) -> Policy:
    """Load the model of a configuration into the engine that is to sample from it.

    Args:
        max_length: longest prompt and completion together, in tokens.
        shape, cache, ranks: see `Policy`.
    """

    def local() -> tuple[Decoder, Ranks]:
        engine = build_engine(config, ranks)
        return engine.decoder(), engine.samplers

    sampler = build_sampler(
        config.rollout, config, tokenizer, ranks=ranks, max_length=max_length, local=local
    )
    return Policy(sampler, tokenizer, shape, cache, ranks)


def load_policy(
    folder: Path, *, max_tiles: int | None = None, pictures: Pictures = DEFAULT_PICTURES
) -> Policy:
    """Load a model folder on the CPU, ready to answer; `max_tiles` as `model_image_shape`."""
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    sampler = LocalSampler(HFDecoder(model), TokenRules.of(tokenizer))
    return Policy(sampler, tokenizer, model_image_shape(model.config, max_tiles, pictures))
