"""Rollouts over HTTP: every prompt is answered once, with the tokens that were sampled."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from r1v3.rollout import server_pool
from r1v3.rollout.contract import Request, Sampling
from r1v3.rollout.server_pool import NoServers, ServerLimits
from r1v3.rollout.vllm_server import VLLMServers
from tests import tiny
from tests.rollout.served import (
    NET,
    PICTURES,
    TEXTS,
    TINY,
    G,
    a_text,
    client,
    complete,
    expect,
    request,
)
from tests.rollout.speaking_server import (
    RULES,
    Fault,
    SpeakingServer,
    changed,
    cut,
    hang,
    serving,
    slow,
    status,
    truncated,
)


def test_completions_are_those_of_local_generation(two: list[SpeakingServer]) -> None:
    """Order, groups, tokens and log-probs survive the wire, for text and for pictures."""
    requests = [TEXTS[0], PICTURES[0], TEXTS[1], PICTURES[1], PICTURES[2]]
    found = complete(client(two), requests)
    expect(found, requests)
    assert len(two[0].asked) + len(two[1].asked) == 5 and two[0].asked and two[1].asked
    assert len({tuple(row) for row in found.response_ids.tolist()}) > 8


def test_bans_temperature_and_nothink_reach_the_server(two: list[SpeakingServer]) -> None:
    banned = tuple(range(40, 60))
    requests = [request(a_text(7), thinking=False), request(tiny.some_questions(1)[0], False)]
    sampling = Sampling(1.7, 8, banned)
    found = complete(client(two), requests, sampling)
    expect(found, requests, sampling)
    assert not set(found.response_ids[found.mask].tolist()) & {*banned, *RULES.never}


def test_greedy_completions_are_asked_for_once(two: list[SpeakingServer]) -> None:
    """vLLM refuses n > 1 at temperature 0; the group is the one completion, repeated."""
    sampling = Sampling(0.0, 8)
    found = complete(client(two), TEXTS[:2], sampling)
    expect(found, TEXTS[:2], sampling)
    assert all(body["n"] == 1 for server in two for body in server.asked)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda choice: choice.update({key: value})


def _logprob(value: float) -> Callable[[dict[str, Any]], None]:
    return lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, value)


def _token(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda choice: choice["token_ids"].__setitem__(0, value)


FAULTS: dict[str, tuple[Fault, str]] = {
    "500": (status(500), "http 500: "),
    "429": (status(429), "http 429"),
    "truncated": (truncated, "not JSON"),
    "cut": (cut, "connection"),
    "nan": (changed(_logprob(math.nan)), "nan is not a finite"),
    "positive": (changed(_logprob(0.5)), "0.5 is not a finite"),
    "out of range": (changed(_token(RULES.size)), "is not in [0, "),
    "not a number": (changed(_token("7")), "is not in [0, "),
    "banned": (changed(_token(RULES.never[0])), "banned"),
    "no tokens": (changed(_set("token_ids", [])), "0 tokens"),
    "no ids": (changed(_set("token_ids", None)), "not lists"),
    "lengths": (changed(lambda c: c["logprobs"]["token_logprobs"].pop()), "log-probs"),
    "short": (changed(_set("finish_reason", "abort")), "finish reason"),
    "index": (changed(_set("index", 9)), "instead of 0 to 2"),
    "boolean index": (changed(_set("index", True)), "instead of 0 to 2"),
    "choices": (lambda s, h, a: {**a, "choices": a["choices"][1:]}, "instead of 0 to 2"),
    "no choices": (lambda s, h, a: {"choices": "none"}, "no list of choices"),
    "list": (lambda s, h, a: [], "no list of choices"),  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_answer_is_not_used_and_the_prompt_is_asked_again(name: str) -> None:
    """Fails if a false completion gets into training, or if its prompt is lost."""
    fault, reason = FAULTS[name]
    with serving(NET) as servers:
        servers[0].faults.append(fault)
        sampler = client(servers)
        expect(complete(sampler, TEXTS[:2]), TEXTS[:2])
        assert len(servers[0].asked) == 3
        assert sampler.counters()["rollout_failed_attempts"] == 1
        servers[0].faults.extend([fault] * 2)
        with pytest.raises(NoServers) as raised:
            complete(client(servers, retries=1), TEXTS[:1])
        assert "after 2 attempts" in str(raised.value) and reason in str(raised.value)
        assert servers[0].url in str(raised.value)


def test_a_refused_request_is_not_repeated(two: list[SpeakingServer]) -> None:
    two[0].faults.append(status(400))
    two[1].faults.append(status(400))
    with pytest.raises(NoServers, match="after 1 attempt .http 400: .*scripted"):
        complete(client(two), TEXTS[:1])


def test_a_server_that_hangs_times_out_and_another_answers(two: list[SpeakingServer]) -> None:
    two[0].faults.append(hang)
    sampler = client(two, timeout_seconds=3.0, retries=8)
    expect(complete(sampler, TEXTS[:1]), TEXTS[:1])
    assert sampler.counters()["rollout_failed_attempts"] >= 1
    assert "no answer within 3 s" in sampler.servers[0].trouble


def test_a_late_answer_is_overtaken_by_another_server(
    two: list[SpeakingServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one slow server holds up the step until its time limit."""
    monkeypatch.setattr(server_pool, "LATE_SECONDS", 1.0)
    two[0].faults.append(slow(90))
    sampler = client(two, timeout_seconds=120.0)
    began = time.monotonic()
    expect(complete(sampler, TEXTS), TEXTS)
    assert time.monotonic() - began < 60
    resent = sampler.counters()["rollout_resent"]
    assert resent >= 1 and sampler.counters()["rollout_failed_attempts"] == 0
    assert len(two[0].asked) + len(two[1].asked) == len(TEXTS) + resent


def test_a_dead_server_is_left_out_and_taken_back_when_it_returns(
    two: list[SpeakingServer],
) -> None:
    sampler = client(two)
    expect(complete(sampler, TEXTS), TEXTS)
    before, port = len(two[0].asked), two[0].port
    two[0].stop()
    expect(complete(sampler, TEXTS), TEXTS)
    assert len(two[0].asked) == before
    assert sampler.counters()["rollout_servers_live"] == 1
    assert "connection" in sampler.servers[0].trouble
    two[0].start(port)
    two[1].stop()
    expect(complete(sampler, TEXTS), TEXTS)
    assert len(two[0].asked) == before + len(TEXTS)
    two[1].start(two[1].port)


def test_without_any_server_the_error_names_all_and_comes_in_time(
    two: list[SpeakingServer],
) -> None:
    """Fails if the trainer would wait for ever, or not say where to look."""
    urls = [server.url for server in two]
    sampler = client(two, patience_seconds=2.0)
    complete(sampler, TEXTS[:2])
    for server in two:
        server.stop()
    began = time.monotonic()
    with pytest.raises(NoServers) as raised:
        complete(sampler, TEXTS)
    assert time.monotonic() - began < 30
    assert all(f"{url}: connection" in str(raised.value) for url in urls)
    assert "6 requests are unanswered" in str(raised.value)
    for server in two:
        server.start(server.port)
    expect(complete(sampler, TEXTS), TEXTS)


def test_another_prompt_than_the_trainers_ends_the_run(two: list[SpeakingServer]) -> None:
    """Fails if the model would be trained on answers to a prompt that it did not see."""
    other = Request(TEXTS[1].example, PICTURES[0].sample)
    with pytest.raises(ValueError, match="another prompt than the trainer's: .* from position"):
        complete(client(two), [other])
    for server in two:
        server.faults.append(changed(lambda c: c.pop("prompt_token_ids")))
    with pytest.raises(ValueError, match="does not say which prompt tokens"):
        complete(client(two), TEXTS[:1])


def test_logprobs_from_before_the_bans_are_refused() -> None:
    """Fails if a server of the default log-prob mode is used without a word."""
    with serving(NET) as servers:
        servers[0].raw = True
        with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
            complete(client(servers), TEXTS[:1])


def test_a_spent_thought_is_closed_and_goes_on(two: list[SpeakingServer]) -> None:
    """Budgeted rows: the same beginning, the forced tag, then further samples."""
    budgeted = Sampling(1.0, 20, (RULES.stop_id,), 4)
    forced = RULES.closing.forced
    free = complete(client(two), TEXTS[:2], Sampling(1.0, 4, (RULES.stop_id,)))
    found = complete(client(two), TEXTS[:2], budgeted)
    tag = slice(4, 4 + len(forced))
    assert found.mask.all() and found.response_ids.shape == (2 * G, 20)
    assert torch.equal(found.response_ids[:, :4], free.response_ids)
    assert (found.response_ids[:, tag] == torch.tensor(forced)).all()
    assert (~found.sampled[:, tag]).all() and (found.logprobs[:, tag] == 0).all()
    assert found.sampled[:, :4].all() and found.sampled[:, tag.stop :].all()
    batch_free = complete(client(two), TEXTS[:2], Sampling(1.0, 20, (RULES.stop_id,), 0))
    assert (batch_free.response_ids[:, : len(forced)] == torch.tensor(forced)).all()
    cut_off = complete(client(two), TEXTS[:1], Sampling(1.0, 6, (RULES.stop_id,), 4))
    assert cut_off.response_ids[:, 6 - len(forced) :].tolist() == [list(forced)] * G


def test_a_spent_thought_over_pictures_is_closed_by_the_server(two: list[SpeakingServer]) -> None:
    """Fails if a thought over a picture is not cut, is cut elsewhere than one over text, or if the
    tag that the server forced counts as sampled."""
    forced = RULES.closing.forced
    mixed = [PICTURES[0], TEXTS[0], PICTURES[1]]
    found = complete(client(two), mixed, Sampling(1.0, 20, (RULES.stop_id,), 4))
    tag = slice(4, 4 + len(forced))
    assert found.mask.all() and found.response_ids.shape == (3 * G, 20)
    assert (found.response_ids[:, tag] == torch.tensor(forced)).all()
    assert (~found.sampled[:, tag]).all() and (found.logprobs[:, tag] == 0).all()
    assert found.sampled[:, :4].all() and found.sampled[:, tag.stop :].all()
    chats = [body for server in two for body in server.asked if "messages" in body]
    assert len(chats) == 2 and all(body["n"] == G for body in chats)  # one request for each
    at_once = complete(client(two), mixed, Sampling(1.0, 20, (RULES.stop_id,), 0))
    assert (at_once.response_ids[:, : len(forced)] == torch.tensor(forced)).all()
    fits = complete(client(two), PICTURES[:1], Sampling(1.0, 6, (RULES.stop_id,), 4))
    assert fits.response_ids[:, 6 - len(forced) :].tolist() == [list(forced)] * G
    free = complete(client(two), PICTURES[:1], Sampling(1.0, 6, (RULES.stop_id,), 6))
    assert free.sampled.all()


def test_a_server_that_does_not_close_thoughts_is_told_from_one_that_does(
    two: list[SpeakingServer],
) -> None:
    """Fails if scores under a budget come from servers that ignore it."""
    for server in two:
        server.closes = False
    with pytest.raises(ValueError, match="must be started with --logits-processors r1v3"):
        complete(client(two), PICTURES[:1], Sampling(1.0, 20, (RULES.stop_id,), 4))


@pytest.mark.parametrize(
    ("urls", "options", "message"),
    [
        ((), {}, "at least one server"),
        (("localhost:8000",), {}, "http:// or https://"),
        (("http://a",), {"concurrency": 0}, "concurrency 0 must be above 0"),
        (("http://a",), {"retries": -1}, "retries -1 must be 0 or more"),
    ],
)
def test_bad_settings_are_named(urls: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMServers(urls, RULES, TINY, limits=ServerLimits(**options))


def test_settings_that_vllm_would_change_are_refused() -> None:
    sampler = VLLMServers(["http://127.0.0.1:9/v1/"], RULES, TINY)
    assert sampler.servers[0].url == "http://127.0.0.1:9"
    with pytest.raises(ValueError, match="temperature 0.001 is raised to 0.01"):
        complete(sampler, TEXTS[:1], Sampling(0.001, 4))
    with pytest.raises(ValueError, match="1100 banned|banned tokens; vLLM takes at most 1024"):
        complete(sampler, TEXTS[:1], Sampling(1.0, 4, tuple(range(1100))))
    assert complete(sampler, []).response_ids.shape == (0, 1)
