"""Scores of kept answers: rule, then judge, then "no verdict", which counts as wrong and is shown.

Scoring asks no model under test and can be repeated with another protocol or judge in seconds.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from r1v3.suite.answers import Answer
from r1v3.suite.benchmark import Benchmark
from r1v3.suite.judge import Judge
from r1v3.suite.metrics import Measured, measure
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
        entropy: mean over all sampled tokens in nats, None where the engine does not tell.
    """

    questions: tuple[Question, ...]
    right: np.ndarray
    no_verdict: np.ndarray
    by_judge: np.ndarray
    tokens: np.ndarray
    unfinished: np.ndarray
    entropy: float | None


@dataclass(frozen=True)
class Scored:
    """The score of one checkpoint on one benchmark in one mode.

    Attributes:
        upper: the score if everything without a verdict were right.
        tokens: mean length of an answer.
        unfinished, no_verdict, judged: fractions of the answers.
        views: further scores, by name.
        labels: accuracy and number of questions by category, by kind of category.
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
    views: dict[str, Measured]
    labels: dict[str, dict[str, tuple[float, int]]]


def verdicts(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Iterable[Answer],
    *,
    samples: int,
    thinking: bool,
    protocol: str,
    judge: Judge | None = None,
) -> Outcomes:
    """Grade kept answers.

    Args:
        samples: K; further ones are left out.
        thinking: whether the prompts opened a thought.
        protocol: `report` or `kit`.

    Raises:
        Incomplete: a question lacks a sample; names its unit.
    """
    places = {question.id: i for i, question in enumerate(questions)}
    rule = benchmark.rule if protocol == "report" else (benchmark.kit_rule or benchmark.rule)
    shape = (len(questions), samples)
    right, no_verdict, by_judge, unfinished, there = (np.zeros(shape, dtype=bool) for _ in range(5))
    tokens = np.zeros(shape, dtype=np.int64)
    entropy: list[float] = []
    open_cells: list[tuple[int, int]] = []
    items: list[tuple[str, str, str]] = []
    for answer in answers:
        row = places.get(answer.row)
        if row is None or answer.sample >= samples:
            continue
        question, cell = questions[row], (row, answer.sample)
        there[cell], tokens[cell] = True, answer.tokens
        unfinished[cell] = answer.finish in _UNFINISHED
        if answer.entropy is not None:
            entropy.append(answer.entropy)
        response = Response(answer.text, thinking)
        verdict = rule(question, response)
        shown = response.answer or response.final
        if verdict is None and not shown:
            verdict = False  # it says nothing, so that there is nothing to judge
        right[cell], no_verdict[cell] = verdict is True, verdict is None
        if verdict is None and question.gold and benchmark.judged:
            open_cells.append(cell)
            items.append((question.text, question.gold, shown))
    if not there.all():
        _raise_incomplete(benchmark, questions, there)
    if judge is not None:
        for cell, opinion in zip(open_cells, judge.verdicts(items), strict=True):
            if opinion is not None:
                right[cell], no_verdict[cell], by_judge[cell] = opinion, False, True
    mean = float(np.mean(entropy)) if len(entropy) == there.size else None
    return Outcomes(tuple(questions), right, no_verdict, by_judge, tokens, unfinished, mean)


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
        views={
            name: measure(grouping(questions, outcomes.right))
            for name, grouping in benchmark.views.items()
        },
        labels=_by_label(questions, outcomes.right),
    )


def _by_label(
    questions: Sequence[Question], right: np.ndarray
) -> dict[str, dict[str, tuple[float, int]]]:
    rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, question in enumerate(questions):
        for kind, names in question.labels.items():
            for name in names.split("|") if names else ():
                rows[kind][name].append(i)
    return {
        kind: {name: (float(right[at].mean()), len(at)) for name, at in sorted(by.items())}
        for kind, by in rows.items()
    }
