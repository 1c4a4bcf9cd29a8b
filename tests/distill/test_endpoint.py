"""Requests keep to limits, obey the server, and carry the key."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from r1v3.config import ConfigError, Distill, Endpoint, load
from r1v3.distill.ask import chat_messages, read_reply, request_seed, teacher_messages
from r1v3.distill.endpoint import Pace, connect
from r1v3.http import RequestFailed, refused, seconds_to_wait
from tests.distill.teacher import Teacher, question, says, settings, teaching


def ask(teacher: Teacher, count: int = 1, expect: int = 0, **options: Any) -> list[Any]:
    """Replies to so many requests at a time, or the failures."""
    fast = {"url": teacher.url, "model": "m", "backoff_seconds": 0.01}
    endpoint = Endpoint(**{**fast, **options})

    async def run() -> list[Any]:
        async with connect(endpoint, "the test", expect) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "1 + 2"}], "seed": 1}
            posts = [client.post("/chat/completions", body, dict) for _ in range(count)]
            return await asyncio.gather(*posts, return_exceptions=True)

    return asyncio.run(run())


def test_places_are_spread_over_the_minute() -> None:
    """Fails if more requests or tokens are sent in a minute than the limit allows."""
    pace, sent = Pace(30), []
    for _ in range(90):
        sent.append(100.0 + pace.reserve(1.0, 100.0))
    assert all(b - a == pytest.approx(2.0) for a, b in zip(sent, sent[1:], strict=False))
    tokens = Pace(6000)
    assert tokens.reserve(500, 0.0) == 0.0 and tokens.reserve(1, 0.0) == pytest.approx(5.0)
    tokens.correct(100)
    assert tokens.reserve(1, 0.0) == pytest.approx(6.01)
    assert Pace(None).reserve(1e9, 0.0) == 0.0
    late = Pace(60)
    late.reserve(1, 0.0)
    assert late.reserve(1, 50.0) == 0.0  # what was not used is not saved up
    assert late.reserve(1, 50.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("limits", "gap"),
    [({"requests_per_minute": 1200}, 0.05), ({"tokens_per_minute": 600_000}, 0.1)],
    ids=["requests", "tokens"],
)
def test_requests_keep_to_the_limits(
    limits: dict[str, float], gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a limit of the configuration does not reach the requests, or all tokens of a minute
    go out before the first answer tells how long answers are."""
    places: list[float] = []
    reserve = Pace.reserve

    def spy(pace: Pace, cost: float, now: float) -> float:
        pause = reserve(pace, cost, now)
        if pace._per_minute is not None:
            places.append(now + pause)
        return pause

    monkeypatch.setattr(Pace, "reserve", spy)
    with teaching() as teacher:
        ask(teacher, 4, expect=1000, **limits)
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert len(gaps) == 3 and min(gaps) > gap - 1e-6


def test_retry_after_holds_back_every_request() -> None:
    """Fails if a server that asks to be left alone is asked again at once, by anyone."""
    with teaching() as teacher:
        teacher.faults.append(says(b"slow down", 429, Retry_After="0.5"))
        ask(teacher, 1)
        assert teacher.times[1] - teacher.times[0] >= 0.5

        async def two() -> None:
            endpoint = Endpoint(url=teacher.url, model="m", backoff_seconds=0.0)
            async with connect(endpoint, "the test") as client:
                body = {"messages": [{"role": "user", "content": "1 + 2"}], "seed": 1}
                teacher.faults.append(says(b"slow down", 503, Retry_After="0.5"))
                first = asyncio.ensure_future(client.post("/chat/completions", body, dict))
                while len(teacher.times) < 3:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                await client.post("/chat/completions", body, dict)
                await first

        asyncio.run(two())
    assert all(later - teacher.times[2] >= 0.5 for later in teacher.times[3:])


def test_429_uses_up_no_attempt() -> None:
    """Fails if a busy server costs answers."""
    with teaching() as teacher:
        teacher.faults.extend([says(b"slow down", 429)] * 5)
        (found,) = ask(teacher, retries=0)
        assert found["choices"]
        teacher.faults.extend([says(b"oops", 500)] * 2)
        (failed,) = ask(teacher, retries=1)
        assert isinstance(failed, RequestFailed) and failed.reason == "http 500: oops"


def test_who_is_to_wait_until_tomorrow_stops() -> None:
    """Fails if a used-up quota makes a run sleep for a day."""
    with teaching() as teacher:
        teacher.faults.append(says(b"quota", 429, Retry_After="86400"))
        (failed,) = ask(teacher)
    assert isinstance(failed, RequestFailed) and "asks to wait 86400 s" in failed.reason


def test_retry_after_is_read_in_both_forms() -> None:
    """Fails if a date, which HTTP allows, is not understood, or nonsense is."""
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert seconds_to_wait("2") == 2.0 and 25 < (seconds_to_wait(soon) or 0) <= 30
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 == seconds_to_wait("-3")
    assert seconds_to_wait("soon") is None is seconds_to_wait("nan")
    assert refused(429, retry_after="7").wait_seconds == 7.0


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the key is not sent, or a forgotten one is noticed only by the server."""
    monkeypatch.setenv("TEACHER_KEY", " secret\n")
    with teaching() as teacher:
        ask(teacher, api_key_env="TEACHER_KEY")
        assert teacher.authorization == "Bearer secret"
        monkeypatch.delenv("TEACHER_KEY")
        with pytest.raises(ValueError, match="TEACHER_KEY, which is not set"):
            ask(teacher, api_key_env="TEACHER_KEY")


def test_keys_of_the_request_can_be_changed() -> None:
    """Fails if a server with other names for a setting cannot be asked."""
    with teaching() as teacher:
        ask(teacher, body={"seed": None, "max_completion_tokens": 7})
    assert teacher.bodies[-1]["max_completion_tokens"] == 7 and "seed" not in teacher.bodies[-1]


def test_pictures_stand_where_their_placeholders_do() -> None:
    """Fails if a teacher sees a question without its picture, or in another order."""
    sample = question(3)
    turns = [{"role": "user", "content": "A:<image>\nB:<image> which?"}]
    (message,) = chat_messages(turns, [sample.images[0], question(4).images[0]])
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    urls = [p["image_url"]["url"] for p in message["content"] if p["type"] == "image_url"]
    assert urls[0] != urls[1] and all(url.startswith("data:image/png;base64,") for url in urls)
    assert chat_messages([{"role": "user", "content": "no picture"}], []) == [
        {"role": "user", "content": "no picture"}
    ]


def test_the_instruction_is_asked_and_not_written() -> None:
    """Fails if the instruction is missing from the request."""
    tree = settings(Path("r"), "http://x", Path("q.parquet"))
    tree["teacher"] |= {"system": "Be brief.", "instruction": "Box it."}
    teacher = Distill.model_validate(tree).teacher
    messages = teacher_messages(question(3), teacher)
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1]["content"][-1]["text"].endswith("Box it.")


@pytest.mark.parametrize(
    ("message", "finish", "wanted"),
    [
        ({"content": "a", "reasoning_content": "t"}, "stop", ("t", "a", "stop")),
        ({"content": "a", "reasoning": "t"}, None, ("t", "a", "stop")),
        ({"content": None, "reasoning_content": "t"}, "length", ("t", "", "length")),
        ({"content": [{"type": "text", "text": "a"}]}, "stop", (None, "a", "stop")),
        ({"content": "a\ud83d", "reasoning": "\udc00t"}, "stop", ("?t", "a?", "stop")),
        ({"content": ""}, "content_filter", (None, "", "content_filter")),
    ],
)
def test_replies_of_different_servers_are_read(
    message: dict[str, Any], finish: str | None, wanted: tuple[Any, ...]
) -> None:
    """Fails if the thought or the reason to stop of some server is lost."""
    found = read_reply({"choices": [{"message": message, "finish_reason": finish}]})
    assert (found["reasoning"], found["content"], found["finish"]) == wanted
    assert found["tokens"] is None


def test_seeds_differ_and_stay() -> None:
    """Fails if two answers to a question would be the same, or a rerun asks with other seeds."""
    seeds = [request_seed(0, row, k) for row in ("a", "b") for k in range(4)]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(0, "a", 1) == seeds[1] != request_seed(1, "a", 1)


def test_settings_that_make_no_sense_are_refused() -> None:
    """Fails if a misspelled filter or a contradiction is found after the money is spent."""
    for override, message in [
        ("filters.off=[loops]", "loop"),
        ("choice.rows=5", "validation"),
        ("teacher.answers=0", "answers"),
        ("teacher.url=localhost:8000", "must be an http:// or https:// address"),
        ("filters.blind_phrases=['(']", "no regular expression"),
        ("questions=[]", "questions"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load(Distill, "configs/distill/demo.yaml", [override])
    for name in ("demo", "r1v3-38b"):
        assert load(Distill, f"configs/distill/{name}.yaml").teacher.answers == 4
