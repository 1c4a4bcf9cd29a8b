"""Builds the recipe's datasets from handwritten scans: questions, cold-start chains, base data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from r1v3.data.chains import TeacherConfig, sample_chain, show_rows, solve
from r1v3.data.compose import compose, to_png
from r1v3.data.sample import Sample
from r1v3.data.tasks import BUILDERS, IN_DOMAIN, LETTERS, OUT_OF_DOMAIN, Problem, show_grid
from r1v3.data.thoughts import THINK_CLOSE


def question_text(problem: Problem) -> str:
    """The question, with lettered options below it where there are some."""
    lines = [problem.question]
    for letter, option in zip(LETTERS, problem.options or (), strict=False):
        lines.append(f"{letter}. {option}")
    return "\n".join(lines)


def row_of(
    problem: Problem,
    text: str,
    split: str,
    index: int,
    rng: np.random.Generator,
    *,
    picture: bool = True,
    answer: str | None = None,
    response: str | None = None,
    thinking: bool = True,
    further: Mapping[str, object] | None = None,
) -> Sample:
    """A problem as a row, with its picture composed; `further` goes into extra_info."""
    gold = problem.answer if answer is None else answer
    return Sample(
        data_source="r1v3/handwriting",
        prompt=[{"role": "user", "content": f"<image>\n{text}" if picture else text}],
        images=[to_png(compose(list(problem.cells), rng))] if picture else [],
        ability="visual-reasoning",
        reward_model={"style": "rule", "ground_truth": gold},
        extra_info={
            "split": split,
            "index": index,
            "domain": problem.domain,
            "question": text,
            "answer": gold,
            "options": list(problem.options) if problem.options else None,
            "response": response,
            "thinking": thinking,
            **(further or {}),
        },
    )


def questions(split: str, domains: Sequence[str], count: int, seed: int) -> list[Sample]:
    """`count` questions about scans of one split, the domains taking turns."""
    rng = np.random.default_rng([seed, *map(ord, split)])
    samples = []
    for index in range(count):
        problem = BUILDERS[domains[index % len(domains)]](split, rng)
        samples.append(row_of(problem, question_text(problem), split, index, rng))
    return samples


@dataclass
class ColdStart:
    """Cold-start samples and the account of the rejection sampling that kept them."""

    samples: list[Sample] = field(default_factory=list)
    written: int = 0
    abandoned: int = 0
    rechecks: int = 0


def cold_start(
    split: str, count: int, seed: int, teacher: TeacherConfig, *, tries: int = 4
) -> ColdStart:
    """`count` slow-thinking samples: chains whose final answer matches; the others are rejected.

    A question whose `tries` chains all fail is given up and another is taken in its place.
    """
    rng = np.random.default_rng([seed, 1, *map(ord, split)])
    result = ColdStart()
    while len(result.samples) < count:
        domain = IN_DOMAIN[len(result.samples) % len(IN_DOMAIN)]
        problem = BUILDERS[domain](split, rng)
        chain, written = sample_chain(problem, teacher, rng, tries)
        result.written += written
        if chain is None:
            result.abandoned += 1
            continue
        result.rechecks += chain.rechecks > 0
        response = f"{chain.thought}\n{THINK_CLOSE}\n\n\\boxed{{{chain.answer}}}"
        text, index = question_text(problem), len(result.samples)
        result.samples.append(row_of(problem, text, split, index, rng, response=response))
    return result


def _spoken(problem: Problem, rng: np.random.Generator, index: int, split: str) -> Sample:
    """A worked text-only problem: the numbers are given in words, no picture."""
    rows = problem.true_rows()
    steps, answer = solve(problem, rows)
    text = f"The picture shows {show_rows(rows, problem.target)}.\n{question_text(problem)}"
    response = f"{steps}\n\n\\boxed{{{answer}}}"
    return row_of(
        problem, text, split, index, rng, picture=False, response=response, thinking=False
    )


def _transcript(
    problem: Problem, rng: np.random.Generator, index: int, split: str, *, dense: bool
) -> Sample:
    """Transcription of a picture: every cell of the grid, or the rows as chains read them."""
    if dense:
        text, answer = "Transcribe the grid cell by cell.", show_grid(problem)
    else:
        text = "Read the digits row by row."
        answer = f"{show_rows(problem.true_rows(), problem.target)}."
    return row_of(problem, text, split, index, rng, answer=answer, response=answer, thinking=False)


def _direct(problem: Problem, rng: np.random.Generator, index: int, split: str) -> Sample:
    """A question about a picture with the bare answer."""
    response = f"\\boxed{{{problem.answer}}}"
    text = question_text(problem)
    return row_of(problem, text, split, index, rng, response=response, thinking=False)


def _explained(problem: Problem, rng: np.random.Generator, index: int, split: str) -> Sample:
    """A question about a picture with a short worked answer: read once, never doubted."""
    rows = problem.true_rows()
    steps, answer = solve(problem, rows)
    response = f"I see {show_rows(rows, problem.target)}. {steps}\n\n\\boxed{{{answer}}}"
    text = f"{question_text(problem)}\nExplain."
    return row_of(problem, text, split, index, rng, response=response, thinking=False)


def _matching(problem: Problem, rng: np.random.Generator, index: int, split: str) -> Sample:
    """Find the letter of an option, no picture."""
    options = problem.options or ()
    place = int(rng.integers(0, len(options)))
    text = f"Which option says {options[place]}?\n{question_text(problem)}"
    response = f"That is {LETTERS[place]}.\n\n\\boxed{{{LETTERS[place]}}}"
    return row_of(
        problem,
        text,
        split,
        index,
        rng,
        picture=False,
        answer=LETTERS[place],
        response=response,
        thinking=False,
    )


# The kinds of rows of the base corpus, in a cycle: first to see, then to work.
_BASE_KINDS = ("dense", "rows", "worked", "dense", "worked", "rows", "worked", "direct")

SKILL_KINDS = ("worked", "matching", "rows", "worked", "direct", "worked", "dense", "worked")

EXPLAINED_KINDS = ("explained", "worked", "explained", "explained", "rows", "explained", "direct")


def base_corpus(
    split: str, count: int, seed: int, kinds: Sequence[str] = _BASE_KINDS
) -> list[Sample]:
    """Pre-training data: the abilities of a vision-language model before it is taught to reason.

    Transcriptions of pictures (cell by cell, and row by row), questions with the bare answer, and
    worked text-only problems, in all domains; never a picture with a chain of thought.
    """
    rng = np.random.default_rng([seed, 2, *map(ord, split)])
    asked = (*IN_DOMAIN, *OUT_OF_DOMAIN)
    samples = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        domain = asked[index // len(kinds) % len(asked)]
        if kind == "dense":
            domain = "grid"
        elif kind == "matching":
            domain = str(rng.choice(["comparison", "ordering"]))
        elif kind == "rows" and rng.random() < 0.3:
            domain = "reading"
        problem = BUILDERS[domain](split, rng)
        if kind in ("dense", "rows"):
            sample = _transcript(problem, rng, index, split, dense=kind == "dense")
        elif kind == "direct":
            sample = _direct(problem, rng, index, split)
        elif kind == "explained":
            sample = _explained(problem, rng, index, split)
        elif kind == "matching":
            sample = _matching(problem, rng, index, split)
        else:
            sample = _spoken(problem, rng, index, split)
        samples.append(sample)
    return samples


def connector_mix(split: str, count: int, seed: int, teacher: TeacherConfig) -> list[Sample]:
    """Data for connector-only tuning: wider than the recipe's domains, still without the held-out.

    Half cold-start chains; the rest transcriptions and bare answers (report, section 5.6:
    connector tuning re-balances on many domains).
    """
    return widened(cold_start(split, count // 2, seed + 3, teacher).samples, split, count, seed)


def widened(chains: list[Sample], split: str, count: int, seed: int) -> list[Sample]:
    """`count` samples: these chains, then transcriptions and bare answers of the demo's domains."""
    wider = [
        sample
        for sample in base_corpus(split, 2 * count, seed + 4, ("dense", "rows", "direct"))
        if sample.domain not in OUT_OF_DOMAIN
    ]
    return chains + wider[: count - len(chains)]
