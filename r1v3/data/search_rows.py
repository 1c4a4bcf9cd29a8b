"""Builds the datasets of the search recipe: questions, cold-start chains, connector data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1v3.data.builders import ColdStart, question_text, row_of, widened
from r1v3.data.sample import Sample
from r1v3.data.search_chains import Searcher, sample_search, trial
from r1v3.data.search_tasks import (
    DIFFICULTIES,
    SEARCH_BUILDERS,
    SEARCH_OUT_OF_DOMAIN,
    SEARCH_TARGETS,
    expected_trials,
)
from r1v3.data.tasks import Problem
from r1v3.data.thoughts import THINK_CLOSE
from r1v3.rewards.operators import from_left, read_puzzle, write_line

# Domain and difficulty of the rows, in a cycle: three times as many searches as second looks.
IN_DOMAIN_KINDS = (
    ("operators", "normal"),
    ("operators", "hard"),
    ("operators", "normal"),
    ("two_hands", "normal"),
    ("operators", "hard"),
    ("operators", "normal"),
    ("operators", "hard"),
    ("two_hands", "hard"),
)
DRILL_LINES = 5
OUT_OF_DOMAIN_KINDS = tuple(
    (domain, difficulty) for difficulty in DIFFICULTIES for domain in SEARCH_OUT_OF_DOMAIN
)


@dataclass(frozen=True)
class Mix:
    """Shares of the cold start, in [0, 1], that are not chains of thought.

    bare: of the questions, those that are answered without a thought, in the NoThink template, so
        that NoThink is a way of answering that the model was taught too.
    drill: text-only sums among all rows, the arithmetic that searches need.
    """

    bare: float = 0.0
    drill: float = 0.0


def _problem(
    kind: tuple[str, str], split: str, searcher: Searcher, rng: np.random.Generator
) -> Problem:
    domain, difficulty = kind
    return SEARCH_BUILDERS[domain](split, rng, difficulty, searcher.allowed)


def _grading(problem: Problem, searcher: Searcher) -> dict[str, object]:
    """The difficulty of a row, and how many trials its search takes on average, if it is one."""
    puzzle = read_puzzle(problem.answer)
    if puzzle is None:
        return {"difficulty": problem.difficulty}
    noise = searcher.noise if searcher.order == "hunch" else None
    trials = expected_trials(puzzle.digits, searcher.allowed.signs, puzzle.target, noise)
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


def _drill(split: str, index: int, searcher: Searcher, rng: np.random.Generator) -> Sample:
    """Lines to calculate and to compare with a number, given as text: no picture, no thought."""

    def line() -> tuple[tuple[int, ...], str]:
        digits = searcher.allowed.digits(int(rng.integers(3, 5)), rng)
        return digits, "".join(rng.choice(list(searcher.allowed.signs), len(digits) - 1))

    lines = [line() for _ in range(DRILL_LINES)]
    target = int(rng.choice(SEARCH_TARGETS))
    # Two lines of five or so fit: a line that does not is mostly drawn again, some ten times.
    for place in range(DRILL_LINES):
        while rng.random() < 0.9 and from_left(*lines[place]) != target:
            lines[place] = line()
    fits = [from_left(*each) == target for each in lines]
    asked = ", ".join(write_line(*each) for each in lines)
    worked = [trial(*each, target) for each in lines]
    answer = str(sum(fits))
    problem = Problem("sums", f"How many of {asked} give ({target})?", answer, (), ())
    return row_of(
        problem,
        problem.question,
        split,
        index,
        rng,
        picture=False,
        response=f"{' '.join(worked)}\n\n\\boxed{{{answer}}}",
        thinking=False,
    )


def search_cold_start(
    split: str, count: int, seed: int, searcher: Searcher, mix: Mix = Mix(), *, tries: int = 4
) -> ColdStart:
    """`count` cold-start samples: chains that end in the right answer, bare answers and sums.

    A question whose `tries` chains all fail is given up and another of its kind takes its place.
    """
    rng = np.random.default_rng([seed, 12, *map(ord, split)])
    result = ColdStart()
    while len(result.samples) < count:
        index = len(result.samples)
        if rng.random() < mix.drill:
            result.samples.append(_drill(split, index, searcher, rng))
            continue
        problem = _problem(IN_DOMAIN_KINDS[index % len(IN_DOMAIN_KINDS)], split, searcher, rng)
        chain, written = sample_search(problem, searcher, rng, tries)
        result.written += written
        if chain is None:
            result.abandoned += 1
            continue
        thinking = bool(rng.random() >= mix.bare)
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
    return widened(chains, split, count, seed)
