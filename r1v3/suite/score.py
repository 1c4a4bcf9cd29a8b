"""Scores of kept answers: rule, then judge, then "no verdict", which counts as wrong and is shown.

Scoring asks no model under test and can be repeated with another protocol or judge in seconds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from r1v3.data.blindness import blind_phrase
from r1v3.evaluation.statistics import Score, score
from r1v3.suite.answers import Answer
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.judge import Judge
from r1v3.suite.metrics import Measured, measure
from r1v3.suite.phrases import Phrases, compare
from r1v3.suite.question import Question, Response

_UNFINISHED = ("length", "too long", "truncated picture")


class Incomplete(ValueError):
    """Answers are missing; a part of a benchmark has no score."""


@dataclass(frozen=True)
class Outcomes:
    """Verdicts on the answers to Q questions, K samples each.

    Attributes:
        right: bool [Q, K].
        no_verdict: bool [Q, K]; False in `right`.
        by_judge: bool [Q, K], where the judge decided.
        tokens: int64 [Q, K].
        unfinished: bool [Q, K], where the limit came first or the question could not be asked.
        entropy: mean over the answers in nats, None where the engine does not tell.
        critical_tokens: how many of all tokens are critical.
        critical_entropy: mean over these in nats, None where there are none or as `entropy`.
        phrases: table 5, of benchmarks that have it.
    """

    questions: tuple[Question, ...]
    right: np.ndarray
    no_verdict: np.ndarray
    by_judge: np.ndarray
    tokens: np.ndarray
    unfinished: np.ndarray
    entropy: float | None
    critical_tokens: int
    critical_entropy: float | None
    phrases: Phrases | None


@dataclass(frozen=True)
class Scored:
    """The score of one checkpoint on one benchmark in one mode.

    Attributes:
        upper: the score if everything without a verdict were right.
        tokens: mean length of an answer.
        unfinished, no_verdict, judged: fractions of the answers.
        views: further scores, by name.
        entropy, critical_tokens, critical_entropy, phrases: see `Outcomes`.
        labels: scores by category, by kind of category.
    """

    benchmark: str
    mode: str
    score: Measured
    upper: float
    questions: int
    tokens: float
    unfinished: float
    no_verdict: float
    judged: float
    entropy: float | None
    critical_tokens: int
    critical_entropy: float | None
    phrases: Phrases | None
    views: dict[str, Measured]
    labels: dict[str, dict[str, Score]]


def verdicts(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Iterable[Answer],
    *,
    samples: int,
    thinking: bool,
    protocol: str,
    judge: Judge | None = None,
    phrases: bool = False,
) -> Outcomes:
    """Grade kept answers.

    Args:
        samples: K; further ones are left out.
        thinking: whether the prompts opened a thought.
        protocol: `report` or `kit`.
        phrases: look for thoughts that say they cannot see the picture (table 5).

    Raises:
        Incomplete: a question lacks a sample; names its unit.
    """
    places = {question.id: i for i, question in enumerate(questions)}
    rule = benchmark.rule if protocol == "report" else (benchmark.kit_rule or benchmark.rule)
    tally = _Tally((len(questions), samples))
    open_cells: list[tuple[int, int]] = []
    items: list[tuple[str, str, str]] = []
    for answer in answers:
        row = places.get(answer.row)
        if row is None or answer.sample >= samples:
            continue
        question, cell = questions[row], (row, answer.sample)
        response = Response(answer.text, thinking)
        verdict = rule(question, response)
        shown = response.answer or response.final
        if verdict is None and not shown:
            verdict = False  # it says nothing, so that there is nothing to judge
        tally.add(cell, answer, verdict)
        if phrases:
            tally.said[cell] = blind_phrase(response.thought) is not None
            tally.said_in_answers += blind_phrase(response.final) is not None
        if verdict is None and judge is not None and question.gold and benchmark.judged:
            open_cells.append(cell)
            items.append((question.text, question.gold, shown))
    if not tally.there.all():
        _raise_incomplete(benchmark, questions, tally.there)
    if judge is not None:
        for cell, opinion in zip(open_cells, judge.verdicts(items), strict=True):
            if opinion is not None:
                tally.decide(cell, opinion)
    return tally.outcomes(questions, phrases=phrases)


class _Tally:
    """The account of the answers read so far, cell by cell of [questions, samples]."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.there, self.said = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        self.said_in_answers = 0
        self._right, self._no_verdict, self._by_judge, self._unfinished = (
            np.zeros(shape, dtype=bool) for _ in range(4)
        )
        self._tokens = np.zeros(shape, dtype=np.int64)
        self._entropies: list[float] = []
        self._critical: list[tuple[int, float]] = []

    def add(self, cell: tuple[int, int], answer: Answer, verdict: bool | None) -> None:
        """Take an answer and the rule's verdict on it."""
        self.there[cell], self._tokens[cell] = True, answer.tokens
        self._unfinished[cell] = answer.finish in _UNFINISHED
        self._right[cell], self._no_verdict[cell] = verdict is True, verdict is None
        if answer.entropy is not None:
            self._entropies.append(answer.entropy)
        if answer.critical_entropy is not None:
            self._critical.append((answer.critical_tokens, answer.critical_entropy))

    def decide(self, cell: tuple[int, int], right: bool) -> None:
        """Take the judge's verdict."""
        self._right[cell], self._no_verdict[cell], self._by_judge[cell] = right, False, True

    def outcomes(self, questions: Sequence[Question], *, phrases: bool) -> Outcomes:
        """Return the outcomes; `phrases` asks for table 5."""
        critical = sum(count for count, _ in self._critical)
        # `fsum` is the same in any order: answers are kept as they come.
        total = math.fsum(count * mean for count, mean in self._critical)
        known = len(self._entropies) == self.there.size
        return Outcomes(
            tuple(questions),
            self._right,
            self._no_verdict,
            self._by_judge,
            self._tokens,
            self._unfinished,
            entropy=math.fsum(self._entropies) / len(self._entropies) if known else None,
            critical_tokens=critical,
            critical_entropy=total / critical if critical else None,
            phrases=compare(self._right, self.said, self.said_in_answers) if phrases else None,
        )


def _raise_incomplete(
    benchmark: Benchmark, questions: Sequence[Question], there: np.ndarray
) -> None:
    row, sample = np.argwhere(~there)[0]
    first = questions[int(row)]
    whose = f"of {first.unit} " if first.unit and first.unit != first.id else ""
    raise Incomplete(
        f"{benchmark.title}: {int((~there).sum())} of {there.size} answers are missing, the first "
        f"is sample {int(sample)} to row {first.id} {whose}".rstrip()
        + "; a partial set has no score: run the suite again to ask them"
    )


def scored(benchmark: Benchmark, mode: str, outcomes: Outcomes) -> Scored:
    """Return the scores of graded answers."""
    questions = outcomes.questions
    upper = measure(benchmark.grouping(questions, outcomes.right | outcomes.no_verdict))
    return Scored(
        benchmark=benchmark.key,
        mode=mode,
        score=measure(benchmark.grouping(questions, outcomes.right)),
        upper=upper.value,
        questions=len(questions),
        tokens=float(outcomes.tokens.mean()),
        unfinished=float(outcomes.unfinished.mean()),
        no_verdict=float(outcomes.no_verdict.mean()),
        judged=float(outcomes.by_judge.mean()),
        entropy=outcomes.entropy,
        critical_tokens=outcomes.critical_tokens,
        critical_entropy=outcomes.critical_entropy,
        phrases=outcomes.phrases,
        views={
            name: measure(grouping(questions, outcomes.right))
            for name, grouping in benchmark.views.items()
        },
        labels=_by_label(questions, outcomes.right, outcomes.tokens),
    )


def _by_label(
    questions: Sequence[Question], right: np.ndarray, tokens: np.ndarray
) -> dict[str, dict[str, Score]]:
    rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, question in enumerate(questions):
        for kind, names in question.labels.items():
            for name in names.split("|") if names else ():
                rows[kind][name].append(i)
    return {
        kind: {name: score(right[at], tokens[at]) for name, at in sorted(by.items())}
        for kind, by in rows.items()
    }
