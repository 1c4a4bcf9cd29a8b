"""Asks a policy the questions of a benchmark that have no answers yet.

Questions are drawn in file order as there is room for them, when their pictures are read and they
are encoded. Every question has random numbers of its own, so that an answer depends neither on the
batch nor on what was asked before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby

import torch
from torch import Tensor

from r1v3.config import Suite
from r1v3.data.encoding import encode_sample, share_tiles, verify
from r1v3.data.images import TruncatedImage
from r1v3.data.lengths import PositionLimit
from r1v3.data.sample import Sample
from r1v3.data.words import expand_words
from r1v3.evaluation.policy import Policy, mode_sampling, question_seed
from r1v3.ranks import Ranks
from r1v3.rollout.contract import Request, Rollout
from r1v3.suite.answers import Answer, AnswerFile, Finish
from r1v3.suite.question import Question
from r1v3.suite.table import Table, pictures


@dataclass(frozen=True)
class Asked:
    """A question and where its row is: the number of its table and of its row in it."""

    question: Question
    table: int
    row: int


class Asker:
    """Asks in one mode.

    Args:
        limit: positions of the model.
        ranks: processes that answer together; the first one writes.
    """

    def __init__(
        self, config: Suite, policy: Policy, limit: PositionLimit, ranks: Ranks, mode: str
    ) -> None:
        self.config, self.policy, self.limit, self.ranks = config, policy, limit, ranks
        self.sampling, self.thinking = mode_sampling(
            config.decoding, config.monitor.words, policy.tokenizer, mode
        )
        self._critical = torch.tensor(expand_words(policy.tokenizer, config.monitor.words))

    def ask(
        self,
        benchmark: str,
        asked: Sequence[Asked],
        tables: Sequence[Table],
        answers: AnswerFile,
        notify: Callable[[int], None],
    ) -> None:
        """Ask what is missing and append the answers to the file as they come.

        Args:
            notify: told how many samples have come, whenever some have.

        Raises:
            ValueError: a prompt does not fit the model, or a picture cannot be read; names the row.
        """
        wanted = set(range(self.config.samples))
        have = self.ranks.on_main(answers.samples)
        missing = [one for one in asked if wanted - have.get(one.question.id, set())]
        under_way: dict[int, tuple[Question, Request]] = {}
        unasked: list[Answer] = []

        def requests() -> Iterator[Request]:
            numbers = count()
            for question, images in _with_pictures(missing, tables):
                request = self._request(benchmark, question, images)
                if isinstance(request, Request):
                    under_way[next(numbers)] = question, request
                    yield request
                else:
                    unasked.extend(self._unasked(benchmark, question, request))

        def keep(found: list[Answer]) -> None:
            def append() -> int:
                first = len(unasked)  # while it grows in the thread that draws requests
                rows = [*unasked[:first], *found]
                del unasked[:first]
                new = [one for one in rows if one.sample not in have.get(one.row, set())]
                answers.append(new)
                return len(new)

            notify(self.ranks.on_main(append))

        for numbers, rollout, texts in self.policy.ask(
            requests(),
            self.sampling,
            generator=torch.Generator(),
            repeats=self.config.samples,
            batch_prompts=self.config.batch_prompts,
        ):
            # Other ranks than the first have drawn nothing where servers answer.
            batch = [under_way.pop(number) for number in numbers if number in under_way]
            keep(self._read(batch, rollout, texts))
        keep([])

    def _request(
        self, benchmark: str, question: Question, images: Sequence[bytes]
    ) -> Request | Finish:
        """The request, or why the question cannot be asked."""
        shape = share_tiles(self.policy.shape, len(question.pictures), self.config.row_tiles)
        try:
            sample = _sample(benchmark, question, images)
            example = encode_sample(
                sample,
                self.policy.tokenizer,
                shape,
                thinking=self.thinking,
                name=f"{benchmark} row {question.id}",
                cache=self.policy.cache,
            )
            verify(example)
        except TruncatedImage as error:
            if self.config.pictures.truncated == "skip":
                return "truncated picture"
            raise ValueError(f"{benchmark} row {question.id}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{benchmark} row {question.id}: {error}") from error
        excess = self.limit.excess(len(example.prompt_ids), 0)
        if excess is not None:
            if self.limit.too_long == "drop":
                return "too long"
            raise ValueError(
                f"{benchmark} row {question.id}: {excess}, but the model has "
                f"{self.limit.positions} positions; lower decoding.max_tokens or row_tiles, or set "
                "too_long=drop, which counts such rows as not answered"
            )
        return Request(
            example,
            sample,
            self.thinking,
            shape.pictures,
            question_seed(self.config.seed, benchmark, question.id),
            shape.max_tiles if shape.max_tiles < self.policy.shape.max_tiles else None,
        )

    def _unasked(self, benchmark: str, question: Question, why: Finish) -> list[Answer]:
        seed = question_seed(self.config.seed, benchmark, question.id)
        return [Answer(question.id, k, seed, "", 0, why) for k in range(self.config.samples)]

    def _read(
        self, batch: Sequence[tuple[Question, Request]], rollout: Rollout, texts: Sequence[str]
    ) -> list[Answer]:
        lengths = rollout.mask.sum(1).tolist()
        entropies = _means(rollout.entropy, rollout.sampled)
        critical = rollout.sampled & torch.isin(rollout.response_ids, self._critical)
        critical_entropies = _means(rollout.entropy, critical)
        critical_tokens = critical.sum(1).tolist()
        found = []
        for i, (question, request) in enumerate(batch):
            for k in range(self.config.samples):
                row = i * self.config.samples + k
                found.append(
                    Answer(
                        question.id,
                        k,
                        request.seed or 0,
                        texts[row],
                        lengths[row],
                        "stop" if rollout.finished[row] else "length",
                        entropies[row],
                        critical_tokens[row],
                        critical_entropies[row],
                        rollout.response_ids[row, : lengths[row]].tolist()
                        if self.config.cuts
                        else None,
                    )
                )
        return found


def _means(entropy: Tensor, where: Tensor) -> list[float | None]:
    """Mean entropy [rows] of the tokens at `where` [rows, T]; None where none is known."""
    means = entropy.where(where, 0.0).sum(1) / where.sum(1)
    return [round(mean, 4) if math.isfinite(mean) else None for mean in means.tolist()]


def _with_pictures(
    asked: Sequence[Asked], tables: Sequence[Table]
) -> Iterator[tuple[Question, list[bytes]]]:
    """Questions in file order with the pictures that they show."""
    for number, group in groupby(asked, key=lambda one: one.table):
        by_row = {one.row: one.question for one in group}
        for row, images in pictures(tables[number], list(by_row)):
            question = by_row[row]
            yield question, [images[i] for i in question.pictures]


def _sample(benchmark: str, question: Question, images: Sequence[bytes]) -> Sample:
    return Sample.model_validate(
        {
            "data_source": f"r1v3/suite/{benchmark}",
            "prompt": [{"role": "user", "content": question.prompt}],
            "images": list(images),
            "ability": None,
            "reward_model": {"style": "rule", "ground_truth": question.gold},
            "extra_info": {"index": question.id},
        }
    )
