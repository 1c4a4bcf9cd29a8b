"""Scores of chains that passed, by a judge or a reward model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1v3.data.schema import load_samples
from r1v3.distill.run import Unfinished, run_distill
from r1v3.distill.score import read_grade, read_reward
from r1v3.http import RequestFailed
from tests.distill.teacher import complete, config, says, sum_of, teaching, text_of, write_questions
from tests.rewards.judge_server import says as judged
from tests.rewards.judge_server import serving
from tests.suite.test_judge import knows


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "questions.parquet", 8)


def grade(body: dict[str, Any]) -> dict[str, Any]:
    """A judge that likes odd numbers, and chains with tags of thought in the teacher's way."""
    a, _ = sum_of(text_of(body))
    return {"choices": [{"message": {"content": "9" if a % 2 else "2.5"}}]}


def pool(body: dict[str, Any]) -> dict[str, Any]:
    """vLLM's reward of each token; the last one counts."""
    assert body["messages"][-1]["role"] == "assistant"
    return {"data": [{"index": 0, "data": [[-3.0], [float(len(text_of(body)))]]}]}


@pytest.mark.parametrize(("kind", "reply"), [("judge", grade), ("reward", pool)])
def test_scores_are_asked_once_and_written(
    kind: str, reply: Callable[..., Any], questions: Path, tmp_path: Path
) -> None:
    """Fails if a chain that was dropped is scored, one is scored twice, or the score is lost."""
    with teaching() as teacher, teaching(reply) as scorer:
        settings = {"scorer": {"url": scorer.url, "kind": kind, "model": "s", "retries": 0}}
        asked = config(tmp_path / "run", teacher.url, questions, **settings)
        scorer.faults.append(says(b"oops", 500))
        with pytest.raises(Unfinished, match="1 of .* scores are missing .*oops"):
            run_distill(asked)
        first = scorer.answered.total()
        account = run_distill(asked)
        assert account is not None and account.passed == scorer.answered.total() == first + 1
        run_distill(asked)
        assert scorer.answered.total() == account.passed
    path = "/v1/pooling" if kind == "reward" else "/v1/chat/completions"
    assert set(scorer.paths) == {path}
    (file,) = (tmp_path / "run" / "distill").glob("scores.*.jsonl")
    scores = [json.loads(line)["score"] for line in file.read_text().splitlines()[1:]]
    rows = load_samples(tmp_path / "run" / "distill" / "sft.parquet")
    assert {row.extra_info["score"] for row in rows} <= set(scores) and len(scores) == first + 1


def test_low_scores_are_dropped_and_high_ones_chosen(questions: Path, tmp_path: Path) -> None:
    """Fails if `least` does nothing, or the threshold asks the scorer again."""
    with teaching() as teacher, teaching(grade) as scorer:
        found = {}
        for least in (None, 5.0):
            settings = {"scorer": {"url": scorer.url, "least": least}}
            account = run_distill(config(tmp_path / "run", teacher.url, questions, **settings))
            assert account is not None
            found[least] = account
        assert scorer.answered.total() == found[None].passed
    low = found[5.0].caught["low score"]
    assert 0 < low == found[5.0].alone["low score"] < found[None].passed
    assert found[5.0].passed == found[None].passed - low
    rows = load_samples(tmp_path / "run" / "distill" / "sft.parquet")
    assert {row.extra_info["score"] for row in rows} == {9.0}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("7", 7.0), (" **8.5** ", 8.5), ("10/10", 10.0), ("0", 0.0), ("11", None), ("-1", None),
     ("It is a 7", None), ("7\n8", None), ("", None), (None, None), ("1e1", None)],
)  # fmt: skip
def test_a_grade_is_a_number_and_nothing_else(text: Any, wanted: float | None) -> None:
    """Fails if a judge that chats, or obeys the solution that it grades, gives a score."""
    reply = {"choices": [{"message": {"content": text}}]}
    if wanted is None:
        with pytest.raises(RequestFailed):
            read_grade(reply)
    else:
        assert read_grade(reply) == wanted


@pytest.mark.parametrize(
    ("data", "wanted"),
    [(0.5, 0.5), ([0.1, 0.7], 0.7), ([[1.0], [-2.0]], -2.0), ([], None), ("7", None),
     (float("nan"), None), (True, None), (None, None)],
)  # fmt: skip
def test_a_reward_is_the_last_number(data: Any, wanted: float | None) -> None:
    """Fails if another token's reward, or none, counts as the score."""
    reply = {"data": [{"data": data}]}
    if wanted is None:
        with pytest.raises(RequestFailed):
            read_reward(reply)
    else:
        assert read_reward(reply) == wanted


def test_a_judge_tells_what_the_rule_cannot(tmp_path: Path) -> None:
    """Fails if the judge is not asked, a verdict is not kept, or one that fails is believed."""
    questions = write_questions(tmp_path / "questions.parquet", 4)

    def in_words(body: dict[str, Any]) -> dict[str, Any]:
        reply = complete(body)
        reply["choices"][0]["message"]["content"] = "\\boxed{\\text{fourteen}}"
        return reply

    def honest(handler: Any, body: dict[str, Any]) -> None:
        judged("CORRECT" if knows(body) else "INCORRECT")(handler, body)

    with teaching(in_words) as teacher:
        plain = run_distill(config(tmp_path / "run", teacher.url, questions))
        assert plain is not None and plain.caught["no verdict"] == 8
        with serving(judged("CORRECT")) as server:
            settings = {"judge": {"url": server.url}}
            yes = run_distill(config(tmp_path / "run", teacher.url, questions, **settings))
        assert yes is not None and yes.right == 0 and yes.caught["no verdict"] == 8
        with serving(honest) as server:
            settings = {"judge": {"url": server.url, "model": "honest"}}
            asked = run_distill(config(tmp_path / "run", teacher.url, questions, **settings))
            again = run_distill(config(tmp_path / "run", teacher.url, questions, **settings))
        assert asked is not None and again is not None
        assert asked.right == asked.by["judge"] == 8 == again.right
        assert teacher.asked.total() == 8
