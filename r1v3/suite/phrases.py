"""Answers whose thought says that the picture cannot be seen, beside the others (table 5)."""

from dataclasses import dataclass

import numpy as np

from r1v3.suite.metrics import Measured, Units, gain, measure

REPORT_SCORES = {"said": (0.511, 47), "others": (0.773, 853)}  # of one run of MMMU


@dataclass(frozen=True)
class Phrases:
    """The two kinds of answers to one benchmark.

    Attributes:
        said, others: answers whose thought says so, and those whose thought does not: how many
            there are, and their score; None where there are none.
        difference: of the scores on the questions with answers of both kinds, which are equally
            hard; None where no question has both.
        in_answers: answers that say so to the reader, behind the thought.
    """

    said: tuple[int, Measured | None]
    others: tuple[int, Measured | None]
    difference: Measured | None
    in_answers: int


def compare(right: np.ndarray, said: np.ndarray, in_answers: int) -> Phrases:
    """Compare the answers that say so with the others; intervals are clustered by question.

    Args:
        right, said: bool [questions, samples].
    """
    both = said.any(axis=1) & ~said.all(axis=1)
    difference = None
    if both.any():
        with_it, without = (_mean_of(right[both], kind[both]) for kind in (said, ~said))
        difference = gain(without, with_it)
    counts = int(said.sum()), int((~said).sum())
    return Phrases(
        (counts[0], _score_of(right, said)),
        (counts[1], _score_of(right, ~said)),
        difference,
        in_answers,
    )


def _score_of(right: np.ndarray, chosen: np.ndarray) -> Measured | None:
    """The fraction of the chosen answers that is right."""
    rows = chosen.any(axis=1)
    if not rows.any():
        return None
    sums = (right & chosen)[rows].sum(axis=1).astype(np.float64)
    counts = chosen[rows].sum(axis=1).astype(np.float64)
    return measure(Units(sums[:, None, None], counts[:, None]))


def _mean_of(right: np.ndarray, chosen: np.ndarray) -> Units:
    """The fraction of each question's chosen answers that is right."""
    means = (right & chosen).sum(axis=1) / chosen.sum(axis=1)
    return Units(means[:, None, None], np.ones((len(means), 1)))
