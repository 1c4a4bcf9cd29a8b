"""The order of GRPO's questions under dynamic sampling, without a model."""

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r1v3.config import DynamicSampling
from r1v3.trainer.grpo import GRPOTrainer
from r1v3.trainer.questions import Questions
from r1v3.trainer.randomness import order

# questions, prompts of a step, rounds, share of groups with signal in percent
CASES = [
    (24, 4, 3, 70),
    (24, 4, 3, 30),
    (24, 6, 2, 50),
    (30, 4, 4, 90),
    (17, 5, 3, 60),
    (40, 8, 3, 100),
    (40, 8, 3, 0),
    (7, 2, 5, 40),
    (96, 16, 2, 55),
    (13, 1, 3, 50),
    (50, 7, 3, 80),
    (9, 3, 1, 50),
]


class Asking(GRPOTrainer):
    """The trainer's choice of questions; whether a group has signal depends on its question."""

    def __init__(self, count: int, size: int, rounds: int, share: int) -> None:
        dynamic = DynamicSampling(enabled=True, rounds=rounds)
        self.config: Any = SimpleNamespace(
            dynamic_sampling=dynamic, prompts_per_step=size, signal="reward"
        )
        self.questions = Questions(range(count), 5)
        self.course: Any = SimpleNamespace(state=dict)  # no curriculum
        self.signal = np.random.default_rng(count).integers(0, 100, count) < share
        self.asked: list[int] = []

    def sample_and_reward(self, indices: list[int], key: int) -> list[Any]:
        self.asked += indices
        rewards = {True: [0.0, 1.0], False: [1.0, 1.0]}
        return [
            SimpleNamespace(
                index=i, rewards=[SimpleNamespace(total=r) for r in rewards[bool(self.signal[i])]]
            )
            for i in indices
        ]

    def step_of(self) -> list[int]:
        return [group.index for group in self.sample_groups()]


@pytest.mark.parametrize(("count", "size", "rounds", "share"), CASES)
def test_no_question_of_a_pass_is_skipped(count: int, size: int, rounds: int, share: int) -> None:
    """Fails if dynamic sampling reserves questions and drops them: each question of a pass must be
    trained on, or found to be without signal, once."""
    made = Asking(count, size, rounds, share)
    trained: list[int] = []
    passes = 3
    while made.questions.drawn < passes * count:
        trained += made.step_of()
    assert set(made.asked) == set(range(count))
    drawn = order(count, 0, made.questions.drawn, 5, "grpo")
    asked_again = Counter(made.asked) - Counter(drawn)
    assert set(asked_again) <= set(np.flatnonzero(made.signal))
    used = Counter(trained) + Counter(made.questions.waiting)
    for i in np.flatnonzero(made.signal):
        assert used[i] == Counter(drawn)[i], "a question with signal was lost or trained twice"


@pytest.mark.parametrize(("count", "size", "rounds", "share"), CASES)
def test_a_resumed_run_asks_the_same_questions(
    count: int, size: int, rounds: int, share: int
) -> None:
    """Fails if what was drawn ahead is forgotten in a checkpoint, which is JSON."""
    whole = Asking(count, size, rounds, share)
    wanted = [whole.step_of() for _ in range(8)]
    for stop in range(1, 8):
        first, second = (Asking(count, size, rounds, share) for _ in range(2))
        found = [first.step_of() for _ in range(stop)]
        second.questions.restore(json.loads(json.dumps(first.state()))["questions"])
        found += [second.step_of() for _ in range(8 - stop)]
        assert found == wanted and second.questions.waiting == whole.questions.waiting


@pytest.mark.parametrize(("count", "size"), [(c, s) for c, s, _, _ in CASES])
def test_without_dynamic_sampling_steps_follow_the_passes(count: int, size: int) -> None:
    """Fails if a step repeats or leaves out a question where one pass goes over into the next."""
    questions = Questions(range(count), 5)
    asked = [i for _ in range(-(-3 * count // size)) for i in questions.take(size)]
    for start in range(0, 3 * count, count):
        assert sorted(asked[start : start + count]) == list(range(count))
