r"""Eq. 1 to 3 against values worked out by hand."""

from dataclasses import dataclass
from typing import Any

import pytest

from r1v3.data.sample import make_sample
from r1v3.rewards import Reward, score, total_reward
from tests.rewards.judge_server import client, says, serving

RIGHT = "thought</think>It is \\boxed{0.5}"
RIGHT_UNFORMATTED = "It is \\boxed{0.5}"
WRONG = "thought</think>It is \\boxed{0.6}"
NOTHING = "no idea"


@dataclass(frozen=True)
class Question:
    question: str
    ground_truth: str
    options: list[str] | None = None


@pytest.mark.parametrize(
    ("completion", "accuracy", "form", "total"),
    [
        (RIGHT, 1.0, 1.0, 1.0),
        (RIGHT_UNFORMATTED, 1.0, 0.0, 0.8),
        (WRONG, 0.0, 1.0, 0.2),
        (NOTHING, 0.0, 0.0, 0.0),
    ],
)
def test_worked_examples(completion: str, accuracy: float, form: float, total: float) -> None:
    """R = 0.8 R_acc + 0.2 R_format: 0.8 + 0.2 = 1; 0.8; 0.2; 0."""
    (reward,) = score([completion], ["1/2"])
    assert (reward.accuracy, reward.format, reward.rule) == (accuracy, form, accuracy)
    assert reward.total == pytest.approx(total, abs=1e-12)
    assert reward.verifier is None


@pytest.mark.parametrize(("weight", "total"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (1.0, 0.0)])
def test_weight_moves_the_total(weight: float, total: float) -> None:
    """A wrong answer in the right form earns 1 - w."""
    assert score([WRONG], ["1/2"], weight=weight)[0].total == pytest.approx(total)
    assert total_reward(0.0, 1.0, weight) == pytest.approx(total)


@pytest.mark.parametrize(
    ("word", "completion", "rule", "verifier", "total"),
    [
        ("CORRECT", WRONG, 0.0, 1.0, 1.0),
        ("INCORRECT", WRONG, 0.0, 0.0, 0.2),
        ("perhaps", WRONG, 0.0, None, 0.2),
        ("INCORRECT", RIGHT, 1.0, None, 1.0),
        ("CORRECT", NOTHING, 0.0, None, 0.0),
    ],
)
def test_rule_or_verifier(
    word: str, completion: str, rule: float, verifier: float | None, total: float
) -> None:
    """Eq. 2 is an OR: the verifier can only add, and no verdict adds nothing."""
    with serving(says(word)) as server:
        (reward,) = score([completion], [Question("q", "1/2")], verifier=client(server.url))
    assert (reward.rule, reward.verifier) == (rule, verifier)
    assert reward.total == pytest.approx(total)


def test_only_rejected_answers_are_sent_and_order_is_kept() -> None:
    """Mixed batches must not shift verdicts to a neighbor, nor pay for what the rule knows."""

    def answer(handler: Any, body: dict[str, Any]) -> None:
        asked_half = "\n0.7\n" in body["messages"][1]["content"]
        says("CORRECT" if asked_half else "INCORRECT")(handler, body)

    completions = [RIGHT, WRONG, NOTHING, "t</think>\\boxed{0.7}", RIGHT_UNFORMATTED]
    with serving(answer) as server:
        verifier = client(server.url)
        rewards = score(completions, [Question("q", "1/2")] * 5, verifier=verifier)
        assert len(server.requests) == 2
        assert not verifier.failures
    assert [reward.verifier for reward in rewards] == [None, 0.0, None, 1.0, None]
    assert [reward.accuracy for reward in rewards] == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert [reward.extracted for reward in rewards] == ["0.5", "0.6", None, "0.7", "0.5"]


def test_the_judge_sees_question_options_and_gold() -> None:
    """Without the options a letter as ground truth means nothing to a judge."""
    with serving(says("CORRECT")) as server:
        sample = Question("Which?", "B", ["ten", "twelve"])
        score(["t</think>\\boxed{a dozen}"], [sample], verifier=client(server.url))
        content = server.requests[0]["messages"][1]["content"]
    assert "Which?\nA. ten\nB. twelve\n" in content
    assert "\na dozen\n" in content


def test_a_dead_judge_costs_nothing_but_its_vote() -> None:
    """Training goes on by rule alone, and the count says so."""
    verifier = client("http://127.0.0.1:9/v1")
    rewards = score([RIGHT, WRONG], ["1/2", "1/2"], verifier=verifier)
    assert [reward.total for reward in rewards] == [1.0, pytest.approx(0.2)]
    assert verifier.failures == {"connection": 1}


def test_samples_of_the_data_package_can_be_graded() -> None:
    """The protocol must stay in step with `Sample`, options included."""
    sample = make_sample(
        question="Which?", ground_truth="B", options=["10", "12"], data_source="t", index=0
    )
    assert [r.accuracy for r in score(["\\boxed{12}", "\\boxed{A}"], [sample] * 2)] == [1.0, 0.0]


def test_nothink_template_is_passed_on() -> None:
    """In NoThink mode the tags cost the format reward instead of earning it."""
    bare, thinking = score([RIGHT_UNFORMATTED, RIGHT], ["1/2"] * 2, thinking=False)
    assert (bare.format, thinking.format) == (1.0, 0.0)


def test_wrong_arguments_are_named() -> None:
    """Silent truncation to the shorter list would mix up prompts."""
    with pytest.raises(ValueError, match="2 entries and samples 1"):
        score(["a", "b"], ["1"])
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight"):
            score(["a"], ["1"], weight=weight)
    assert score([], []) == []


def test_verifier_is_off_by_default() -> None:
    """No network unless one asks for it."""
    (reward,) = score([WRONG], ["1/2"])
    assert reward == Reward(reward.total, 0.0, 1.0, 0.0, None, "0.6")
