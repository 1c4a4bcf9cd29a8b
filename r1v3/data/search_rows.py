"""Builds the datasets of the search recipe: questions, cold-start chains, connector data."""

from collections.abc import Sequence

import numpy as np

from r1v3.data.builders import ColdStart, base_corpus, question_text, row_of
from r1v3.data.sample import Sample
from r1v3.data.search_chains import Searcher, sample_search
from r1v3.data.search_tasks import (
    DIFFICULTIES,
    SEARCH_BUILDERS,
    SEARCH_OUT_OF_DOMAIN,
    expected_trials,
)
from r1v3.data.tasks import OUT_OF_DOMAIN, Problem
from r1v3.data.thoughts import THINK_CLOSE
from r1v3.rewards.operators import read_puzzle

# Domain and difficulty of the rows, in a cycle: twice as many searches as second looks.
IN_DOMAIN_KINDS = (
    ("operators", "normal"),
    ("operators", "hard"),
    ("two_hands", "normal"),
    ("operators", "normal"),
    ("operators", "hard"),
    ("two_hands", "hard"),
)
OUT_OF_DOMAIN_KINDS = tuple(
    (domain, difficulty) for difficulty in DIFFICULTIES for domain in SEARCH_OUT_OF_DOMAIN
)


def _problem(
    kind: tuple[str, str], split: str, searcher: Searcher, rng: np.random.Generator
) -> Problem:
    domain, difficulty = kind
    return SEARCH_BUILDERS[domain](split, rng, difficulty, searcher.signs)


def _grading(problem: Problem, searcher: Searcher) -> dict[str, object]:
    """The difficulty of a row, and how many trials its search takes on average, if it is one."""
    puzzle = read_puzzle(problem.answer)
    if puzzle is None:
        return {"difficulty": problem.difficulty}
    trials = expected_trials(puzzle.digits, searcher.signs, puzzle.target, searcher.noise)
    return {"difficulty": problem.difficulty, "trials": round(trials, 3)}


def search_questions(
    split: str, kinds: Sequence[tuple[str, str]], count: int, seed: int, searcher: Searcher
) -> list[Sample]:
    """`count` questions about scans of one split, the kinds (domain, difficulty) taking turns."""
    rng = np.random.default_rng([seed, 11, *map(ord, split)])
    rows = []
    for index in range(count):
        problem = _problem(kinds[index % len(kinds)], split, searcher, rng)
        further = _grading(problem, searcher)
        rows.append(row_of(problem, question_text(problem), split, index, rng, further=further))
    return rows


def search_cold_start(
    split: str, count: int, seed: int, searcher: Searcher, *, bare: float = 0.0, tries: int = 4
) -> ColdStart:
    """`count` cold-start samples: chains that end in the right answer, and some bare answers.

    A question whose `tries` chains all fail is given up and another of its kind takes its place.

    Args:
        bare: chance that a question is answered without a thought, in the NoThink template, so
            that NoThink is a way of answering that the model was taught too.
    """
    rng = np.random.default_rng([seed, 12, *map(ord, split)])
    result = ColdStart()
    while len(result.samples) < count:
        index = len(result.samples)
        problem = _problem(IN_DOMAIN_KINDS[index % len(IN_DOMAIN_KINDS)], split, searcher, rng)
        chain, written = sample_search(problem, searcher, rng, tries)
        result.written += written
        if chain is None:
            result.abandoned += 1
            continue
        thinking = bool(rng.random() >= bare)
        response = f"\\boxed{{{chain.answer}}}"
        if thinking:
            result.rechecks += chain.rechecks > 0
            response = f"{chain.thought}\n{THINK_CLOSE}\n\n{response}"
        result.samples.append(
            row_of(
                problem,
                question_text(problem),
                split,
                index,
                rng,
                response=response,
                thinking=thinking,
                further=_grading(problem, searcher),
            )
        )
    return result


def search_connector_mix(
    split: str, count: int, seed: int, searcher: Searcher, *, tries: int = 4
) -> list[Sample]:
    """Half cold-start chains; the rest transcriptions and bare answers of the demo's domains."""
    chains = search_cold_start(split, count // 2, seed + 3, searcher, tries=tries).samples
    wider = [
        sample
        for sample in base_corpus(split, 2 * count, seed + 4, ("dense", "rows", "direct"))
        if sample.domain not in OUT_OF_DOMAIN
    ]
    return chains + wider[: count - len(chains)]
