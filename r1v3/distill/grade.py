"""Verdicts on answers, by rule and then by a judge, and the filters that their chains do not pass.

Kept per answer, as entries `row`, `sample`, `right` (None: no verdict), `by`, `caught`, `words`. An
answer that lacks a verdict because the judge gave none is not kept, so that it is asked again.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from r1v3.config import Distill
from r1v3.cores import cores_of_rank
from r1v3.distill.chain import Chain, read_chain
from r1v3.distill.filters import caught_by
from r1v3.distill.questions import Question
from r1v3.distill.text import words
from r1v3.distill.work import Entry
from r1v3.journal import Journal
from r1v3.rewards.agreement import agrees
from r1v3.rewards.combine import with_options
from r1v3.suite.judge import Judge

QUESTIONS_PER_CHUNK = 64
# Changes when rules or filters do, so that what was graded before is graded anew.
_VERSION = 1


def grades_journal(config: Distill, answers: Journal) -> Journal:
    """The file of the verdicts, whose name depends on what they depend on."""
    judge = config.judge
    settings = {
        "version": _VERSION,
        "answers": answers.path.name,
        "filters": config.filters.model_dump(mode="json"),
        "judge": None if judge.url is None else judge.model,
    }
    return Journal(config.run / "distill", "grades", settings)


def grade(
    config: Distill,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[int, int]],
    done: Mapping[str, Mapping[int, int]],
    journal: Journal,
    judge: Judge | None,
) -> Iterator[tuple[int, list[Entry]]]:
    """Grade the answers that have no verdict yet, append them, and go on.

    Args:
        answers: positions of the answers by question and sample.
        done: those that are graded.
        journal: of the answers.

    Yields:
        How many answers were graded, and the entries to keep.
    """
    for start in range(0, len(questions), QUESTIONS_PER_CHUNK):
        chunk: list[tuple[Question, Entry]] = []
        for question in questions[start : start + QUESTIONS_PER_CHUNK]:
            kept = done.get(question.id, {})
            places = [
                place
                for sample, place in sorted(answers.get(question.id, {}).items())
                if sample not in kept and sample < config.teacher.answers
            ]
            chunk += [(question, entry) for entry in journal.read_at(places)]
        if chunk:
            yield len(chunk), _grade(config, chunk, judge)


def _grade(
    config: Distill, chunk: Sequence[tuple[Question, Entry]], judge: Judge | None
) -> list[Entry]:
    chains = [read_chain(entry) for _, entry in chunk]
    # The threads wait for the processes that run sympy.
    with ThreadPoolExecutor(cores_of_rank()) as threads:
        verdicts = list(
            threads.map(verdict, [question for question, _ in chunk], chains, chunksize=1)
        )
    by = ["rule"] * len(chunk)
    if judge is not None:
        open_rows = [i for i, right in enumerate(verdicts) if right is None]
        items = [_judged(chunk[i][0], chains[i]) for i in open_rows]
        for i, opinion in zip(open_rows, judge.verdicts(items), strict=True):
            verdicts[i], by[i] = opinion, "judge"
    found: list[Entry] = []
    for (question, entry), chain, right, who in zip(chunk, chains, verdicts, by, strict=True):
        graded: dict[str, Any] = {
            "row": question.id,
            "sample": entry["sample"],
            "right": right,
            "by": who if right is not None else None,
            "caught": caught(chain, question, right, config),
            "words": len(words(chain.thought)),
        }
        found.append(graded)
    return found


def verdict(question: Question, chain: Chain) -> bool | None:
    """Verdict of the rule on a chain's final answer; None where it cannot tell.

    A chain without a final answer is wrong.
    """
    if chain.final is None:
        return False
    return agrees(chain.final, question.ground_truth, question.options or ())


def caught(chain: Chain, question: Question, right: bool | None, config: Distill) -> list[str]:
    """Names of the filters that a chain does not pass, its verdict included."""
    found = caught_by(chain, question, config.filters)
    if found[:1] == ["refused"]:
        return found
    if right is None:
        found.append("no verdict")
    elif not right and "no boxed answer" not in found and chain.closed:
        found.append("wrong answer")
    return found


def _judged(question: Question, chain: Chain) -> tuple[str, str, str]:
    assert chain.final is not None
    return with_options(question.text, question.options), question.ground_truth, chain.final
