"""Rollouts over HTTP: every prompt is answered once, with the tokens that were sampled."""

import math
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.data.encoding import encode_sample
from r1v3.data.sample import Sample, make_sample
from r1v3.engine.hf import HFEngine
from r1v3.engine.ranks import Ranks
from r1v3.model.conversion import Checkpoint, convert
from r1v3.rollout.contract import Request, Sampler
from r1v3.rollout.local import Rollout, Sampling
from r1v3.rollout.server_pool import NoServers
from r1v3.rollout.vllm_server import VLLMServers
from r1v3.rollout.weights import in_layout, published_step
from tests import tiny
from tests.rollout.speaking_server import (
    RULES,
    Fault,
    SpeakingServer,
    changed,
    cut,
    hang,
    local,
    serving,
    slow,
    status,
    truncated,
)

G = 3
SAMPLING = Sampling(1.0, 8)
TINY = Path(__file__).parents[2] / "assets" / "tiny-internvl"
NET = tiny.model(3)
tiny.sharpen(NET, 5.0)


def request(sample: Sample, thinking: bool = True) -> Request:
    example = encode_sample(sample, tiny.tokenizer(), tiny.SHAPE, thinking=thinking)
    return Request(example, sample, thinking)


def a_text(index: int) -> Sample:
    question = f"{index}+{index + 1}?"
    return make_sample(question=question, ground_truth="", data_source="t", index=index)


TEXTS = [request(a_text(i)) for i in range(6)]
PICTURES = [request(sample) for sample in tiny.some_questions(3)]


@pytest.fixture
def two() -> Iterator[list[SpeakingServer]]:
    with serving(NET, NET) as servers:
        yield servers


def client(servers: list[SpeakingServer], **options: Any) -> VLLMServers:
    settings = {"timeout_seconds": 20.0, "patience_seconds": 5.0, "pause_seconds": 0.05}
    folder = options.pop("model_folder", TINY)
    return VLLMServers([s.url for s in servers], RULES, folder, **{**settings, **options})


def complete(
    sampler: Sampler, requests: list[Request], sampling: Sampling = SAMPLING, g: int = G
) -> Rollout:
    generator = torch.Generator().manual_seed(5)
    return sampler.complete(requests, sampling, group_size=g, generator=generator)


def expect(
    found: Rollout,
    requests: list[Request],
    sampling: Sampling = SAMPLING,
    g: int = G,
    net: Any = NET,
) -> None:
    """The rows are those of local generation under the requests' own seeds, group by group."""
    generator = torch.Generator().manual_seed(5)
    seeds = torch.randint(0, 2**48, (len(requests),), generator=generator).tolist()
    assert found.response_ids.shape[0] == len(requests) * g
    for p, (asked, seed) in enumerate(zip(requests, seeds, strict=True)):
        true = local(net, asked.example, sampling, g if sampling.temperature else 1, seed)
        for i in range(g):
            row, other = p * g + i, i if sampling.temperature else 0
            ids = found.response_ids[row][found.mask[row]]
            assert torch.equal(ids, true.response_ids[other][true.mask[other]])
            values = found.logprobs[row][found.mask[row]]
            torch.testing.assert_close(
                values, true.logprobs[other][true.mask[other]], atol=1e-5, rtol=0
            )
            assert found.finished[row] == true.finished[other]
    assert found.sampled.equal(found.mask)
    assert found.entropy[found.mask].isnan().all() and (found.entropy[~found.mask] == 0).all()


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
    two[0].faults.extend([hang] * 9)
    began = time.monotonic()
    expect(complete(client(two, timeout_seconds=1.5), TEXTS), TEXTS)
    assert time.monotonic() - began < 20


def test_a_late_answer_is_overtaken_by_another_server(two: list[SpeakingServer]) -> None:
    """Fails if one slow server holds up the step until its time limit."""
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
    sampler = client(two, patience_seconds=0.5)
    complete(sampler, TEXTS[:2])
    for server in two:
        server.stop()
    began = time.monotonic()
    with pytest.raises(NoServers) as raised:
        complete(sampler, TEXTS)
    assert time.monotonic() - began < 5
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
    assert cut_off.response_ids[:, 4:].tolist() == [list(forced[:2])] * G
    with pytest.raises(ValueError, match="budget 4: .* sample locally"):
        complete(client(two), PICTURES[:1], budgeted)


def _export(net: Any) -> Iterator[tuple[str, Tensor]]:
    return HFEngine(net, tiny.tokenizer(), modules={}).export_hf()


def test_new_weights_reach_every_server_also_one_that_was_away(
    two: list[SpeakingServer], tmp_path: Path
) -> None:
    """Fails if a server that missed an update would answer with old weights."""
    base, new, newer = tiny.save(tmp_path / "base"), tiny.model(8), tiny.model(9)
    for server in two:
        server.loads = tmp_path / "weights" / "current"
    sampler = client(two, weights_folder=tmp_path / "weights", model_folder=base)
    sampler.update_weights(_export(new), 1)
    expect(complete(sampler, TEXTS), TEXTS, net=new)
    names = ["/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert two[0].controls == two[1].controls == names
    first = complete(sampler, PICTURES[:1])
    expect(first, PICTURES[:1], net=new)
    two[1].stop()
    sampler.update_weights(_export(newer), 2)
    expect(complete(sampler, TEXTS), TEXTS, net=newer)
    two[1].start(two[1].port)
    two[0].stop()
    expect(complete(sampler, TEXTS + PICTURES), TEXTS + PICTURES, net=newer)
    assert two[1].controls == names * 2
    assert published_step(tmp_path / "weights") == 2
    names_of_pictures = [
        part["uuid"].rpartition("-")
        for server in two
        for body in server.asked
        for message in body.get("messages", ())
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "image_url"
    ]
    assert {step for _, _, step in names_of_pictures} == {"1", "2"}
    two[0].start(two[0].port)


def test_a_model_in_the_original_layout_is_published_and_asked_in_it(tmp_path: Path) -> None:
    """Fails if names, fused tensors or placeholders of the 38B's own layout were wrong."""
    convert(tiny.save(tmp_path / "native"), tmp_path / "base", "original")
    new = tiny.model(8)
    with serving(NET) as servers:
        servers[0].placeholder = "<image>"
        servers[0].loads = tmp_path / "w" / "current"
        sampler = client(servers, weights_folder=tmp_path / "w", model_folder=tmp_path / "base")
        sampler.update_weights(_export(new), 3)
        expect(complete(sampler, PICTURES[:2]), PICTURES[:2], net=new)
    published = Checkpoint(tmp_path / "w" / "current")
    assert set(published) == set(Checkpoint(tmp_path / "base"))
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in published
    lacking = (item for item in list(_export(new))[:-1])
    with pytest.raises(ValueError, match="1 weights did not come, such as "):
        list(in_layout(lacking, tmp_path / "base"))


class Pair(Ranks):
    """One of two ranks that are threads of this process."""

    def __init__(self, rank: int, box: queue.Queue[Any]) -> None:
        super().__init__()
        self.rank, self.size, self.box = rank, 2, box

    def lead(self, function: Callable[[], Any]) -> Any:
        if self.leads:
            try:
                self.box.put((function(), None))
            except Exception as error:
                self.box.put((None, error))
            value, failure = self.box.queue[-1]
        else:
            value, failure = self.box.get(timeout=30)
        if failure is not None:
            raise failure
        return value


def test_only_the_first_rank_talks_to_servers_and_all_have_the_outcome(tmp_path: Path) -> None:
    """Fails if ranks would disagree, or if one would not take its part in gathering weights."""
    new, read, base = tiny.model(8), [], tiny.save(tmp_path / "base")

    def counted(rank: int) -> Iterator[tuple[str, Tensor]]:
        for item in _export(new):
            read.append(rank)
            yield item

    def rank_of(rank: int, box: queue.Queue[Any], url: str) -> Any:
        sampler = VLLMServers(
            [url if rank == 0 else "http://127.0.0.1:9"],
            RULES,
            base,
            weights_folder=tmp_path / "w",
            ranks=Pair(rank, box),
            patience_seconds=0.2,
        )
        sampler.update_weights(counted(rank), 1)
        generator = torch.Generator().manual_seed(5)
        found = sampler.complete(TEXTS[:2], SAMPLING, group_size=G, generator=generator)
        with pytest.raises(NoServers):
            sampler.complete([Request(TEXTS[0].example, a_text(0))], SAMPLING, generator=generator)
        return found

    with serving(NET) as servers, ThreadPoolExecutor(2) as pool:
        servers[0].loads = tmp_path / "w" / "current"
        servers[0].faults.extend([lambda s, h, a: a] * 2 + [status(400)])
        box: queue.Queue[Any] = queue.Queue()
        ranks = [pool.submit(rank_of, rank, box, servers[0].url) for rank in range(2)]
        first, second = (rank.result(60) for rank in ranks)
    expect(first, TEXTS[:2], net=new)
    assert torch.equal(first.response_ids, second.response_ids)
    assert torch.equal(first.logprobs, second.logprobs)
    assert read.count(0) == read.count(1) == len(list(_export(new)))


def test_weights_that_no_server_loads_are_an_error(
    two: list[SpeakingServer], tmp_path: Path
) -> None:
    base = tiny.save(tmp_path / "base")
    sampler = client(two, weights_folder=tmp_path / "w", model_folder=base, patience_seconds=0.2)
    with pytest.raises(NoServers, match="/pause.mode=abort: http 404.*VLLM_SERVER_DEV_MODE=1"):
        sampler.update_weights(_export(NET), 1)
    with pytest.raises(ValueError, match="no weights_folder"):
        client(two).update_weights(_export(NET), 1)
    other = client(two, weights_folder=tmp_path / "other")
    with pytest.raises(ValueError, match=r"has shape \(.*\), the model in .*tiny-internvl has"):
        other.update_weights(_export(NET), 1)
    assert list((tmp_path / "other").iterdir()) == []


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
        VLLMServers(urls, RULES, TINY, **options)


def test_settings_that_vllm_would_change_are_refused() -> None:
    sampler = VLLMServers(["http://127.0.0.1:9/v1/"], RULES, TINY)
    assert sampler.servers[0].url == "http://127.0.0.1:9"
    with pytest.raises(ValueError, match="temperature 0.001 is raised to 0.01"):
        complete(sampler, TEXTS[:1], Sampling(0.001, 4))
    with pytest.raises(ValueError, match="1100 banned|banned tokens; vLLM takes at most 1024"):
        complete(sampler, TEXTS[:1], Sampling(1.0, 4, tuple(range(1100))))
    assert complete(sampler, []).response_ids.shape == (0, 1)
