"""The measures of single answers, question by question, from which paired intervals are made."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from r1v3.data.sample import Sample
from r1v3.evaluation.policy import Answers
from r1v3.rollout.contract import Rollout
from r1v3.rollout.repetition import repetition

_DIGITS = 5


def answer_measures(
    answers: Answers, critical: Sequence[int], high_entropy_nats: float
) -> dict[str, list[list[float]]]:
    """Return what was measured of each answer, as [questions, samples] by name.

    correct: 0 or 1. tokens: its length. entropy: the mean over its tokens, in nats, of the
    distribution each was drawn from. high_entropy_share: the fraction of them above
    `high_entropy_nats`. critical_tokens: how many of them are among `critical`. repetition: see
    `r1v3.rollout.repetition`.
    """
    rows = [_of_question(one, critical, high_entropy_nats) for one in answers.rollouts]
    found = {"correct": answers.correct.astype(int).tolist(), "tokens": answers.tokens.tolist()}
    for key in ("entropy", "high_entropy_share", "critical_tokens", "repetition"):
        found[key] = [[round(value, _DIGITS) for value in row[key]] for row in rows]
    return found


def question_facts(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return the domain and the difficulty of each question; None where it has none."""
    return {
        "domain": [sample.domain for sample in samples],
        "difficulty": [sample.extra_info.get("difficulty") for sample in samples],
    }


def _of_question(
    rollout: Rollout, critical: Sequence[int], high_entropy_nats: float
) -> dict[str, list[float]]:
    mask = rollout.mask
    counts = mask.sum(1).clamp(min=1).double()
    entropy = torch.where(mask, rollout.entropy.double(), 0.0)
    high = mask & (rollout.entropy > high_entropy_nats)
    # Some samplers do not tell entropies.
    unknown = (mask & rollout.entropy.isnan()).any(1)
    seen = mask & torch.isin(rollout.response_ids, torch.tensor(sorted(critical)))
    found = {
        "entropy": entropy.sum(1) / counts,
        "high_entropy_share": torch.where(unknown, np.nan, high.sum(1) / counts),
        "critical_tokens": seen.sum(1),
        "repetition": repetition(rollout.response_ids, mask),
    }
    return {key: value.tolist() for key, value in found.items()}
