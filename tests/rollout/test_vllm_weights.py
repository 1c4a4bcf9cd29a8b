"""New weights reach every server, in the layout it serves, from all ranks of a job."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from r1v3.engine.hf.engine import HFEngine
from r1v3.model.conversion import Checkpoint, convert
from r1v3.ranks import Ranks
from r1v3.rollout.contract import Request, join
from r1v3.rollout.server_pool import NoServers, ServerLimits
from r1v3.rollout.vllm_server import VLLMServers
from r1v3.rollout.weights import in_layout
from tests import tiny
from tests.rollout.served import (
    NET,
    PICTURES,
    SAMPLING,
    TEXTS,
    G,
    a_text,
    client,
    complete,
    expect,
)
from tests.rollout.speaking_server import RULES, SpeakingServer, serving, status


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
    assert (tmp_path / "weights" / "current").readlink() == Path("step-00000002")
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


class Meeting:
    """Where two threads give each other a value."""

    def __init__(self) -> None:
        self.values: list[Any] = [None, None]
        self.both = threading.Barrier(2, timeout=30)

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.both.wait()
        found = list(self.values)
        self.both.wait()
        return found


class Pair(Ranks):
    """One of two ranks that are threads of this process."""

    def __init__(self, rank: int, box: queue.Queue[Any], meeting: "Meeting") -> None:
        super().__init__()
        self.rank, self.size, self.box, self.meeting = rank, 2, box, meeting

    def sum(self, values: Tensor) -> Tensor:
        first, second = self.meeting.swap(self.rank, values.clone())
        return values.copy_(first + second)

    def exchange(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        found = [sent[self.rank] for sent in self.meeting.swap(self.rank, list(outgoing))]
        assert [len(one) for one in found] == list(sizes)
        return found

    def on_main(self, function: Callable[[], Any]) -> Any:
        if self.is_main:
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


def test_only_the_first_rank_talks_to_servers_and_each_has_a_part(tmp_path: Path) -> None:
    """Fails if completions get lost or doubled between ranks, if an error of the first one stays
    there, or if one would not take its part in gathering weights."""
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
            ranks=Pair(rank, box, meeting),
            limits=ServerLimits(patience_seconds=0.2),
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
        meeting = Meeting()
        ranks = [pool.submit(rank_of, rank, box, servers[0].url) for rank in range(2)]
        first, second = (rank.result(60) for rank in ranks)
    assert len(first.response_ids) == len(second.response_ids) == G
    expect(join([first, second], RULES.pad_id), TEXTS[:2], net=new)
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
