"""Answers as they come: none waits for another, and few are held at a time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch

from r1v3.ranks import Ranks
from r1v3.rollout.contract import Request, Rollout, Sampling
from r1v3.rollout.local import LocalSampler
from r1v3.rollout.vllm_server import VLLMServers
from tests import tiny
from tests.rollout.served import NET, PICTURES, TEXTS, client, complete, expect
from tests.rollout.speaking_server import RULES, SpeakingServer, serving, status

T = TypeVar("T")
ASKED = [*TEXTS, *PICTURES]
SHORT = Sampling(1.0, 4)


def streamed(
    sampler: VLLMServers,
    requests: Iterator[Request],
    sampling: Sampling = SHORT,
    g: int = 1,
) -> Iterator[tuple[list[int], Rollout]]:
    generator = torch.Generator().manual_seed(5)
    return sampler.stream(requests, sampling, group_size=g, generator=generator, batch_prompts=1)


def in_order(parts: Sequence[tuple[list[int], Rollout]], g: int) -> list[list[list[int]]]:
    """The tokens of every completion, request by request."""
    found: dict[int, list[list[int]]] = {}
    for numbers, rollout in parts:
        assert len(rollout.mask) == g * len(numbers)
        rows = [i[m].tolist() for i, m in zip(rollout.response_ids, rollout.mask, strict=True)]
        for place, number in enumerate(numbers):
            found[number] = rows[place * g : (place + 1) * g]
    return [found[number] for number in range(len(found))]


def test_a_long_answer_holds_back_no_other(two: list[SpeakingServer]) -> None:
    """Fails if servers idle while one answer is awaited, or if more requests are drawn or under
    way than `concurrency` allows."""
    released, lock = threading.Event(), threading.Lock()
    drawn, answered, under_way, most = 0, 0, 0, 0

    def held(server: SpeakingServer, handler: Any, answer: dict[str, Any]) -> dict[str, Any]:
        released.wait(60)
        return answer

    def counted(post: Callable[..., None]) -> Callable[..., None]:
        def counting(handler: Any, body: dict[str, Any]) -> None:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            post(handler, body)

        return counting

    def replied(reply: Callable[..., None]) -> Callable[..., None]:
        def replying(handler: Any, *further: Any) -> None:
            nonlocal under_way
            if handler.command == "POST":
                with lock:
                    under_way -= 1
            reply(handler, *further)

        return replying

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for request in ASKED:
            drawn += 1
            assert drawn - answered <= 6  # under way, or come and not yet taken
            yield request

    for server in two:
        server.post = counted(server.post)  # type: ignore[method-assign]
        server.reply = replied(server.reply)  # type: ignore[method-assign]
    two[0].faults.append(held)
    order = []
    for numbers, _ in streamed(client(two, concurrency=3), requests()):
        order += numbers
        answered += len(numbers)
        if answered == len(ASKED) - 1:
            assert not released.is_set()
            released.set()
    assert sorted(order) == list(range(len(ASKED)))
    assert order != sorted(order) and most == 3


@pytest.mark.parametrize("budget", [None, 0, 2])
def test_a_stream_has_the_completions_of_one_call(
    budget: int | None, two: list[SpeakingServer]
) -> None:
    """Fails if an answer depends on when it came, or a row's second thought on other rows."""
    sampling = Sampling(1.0, 8, (RULES.stop_id,), budget)
    asked = [TEXTS[0], PICTURES[0], TEXTS[1]]
    parts = list(streamed(client(two), iter(asked), sampling, 2))
    whole = complete(client(two), asked, sampling, 2)
    assert in_order(parts, 2) == in_order([([0, 1, 2], whole)], 2)
    if budget is None:
        expect(whole, asked, sampling, 2)


def test_what_came_is_kept_when_the_run_ends(two: list[SpeakingServer]) -> None:
    """Fails if a row that cannot be asked, or a refused request, loses the answers before it."""
    sampler, got = client(two, concurrency=1), list[int]()

    def requests() -> Iterator[Request]:
        yield from TEXTS[:2]
        raise ValueError("row 2 cannot be read")

    with pytest.raises(ValueError, match="row 2 cannot be read"):
        for numbers, _ in streamed(sampler, requests()):
            got += numbers
    assert got == [0, 1]
    two[0].faults.append(status(400))
    two[1].faults.append(status(400))
    with pytest.raises(RuntimeError, match="http 400"):
        list(streamed(sampler, iter(TEXTS)))


def test_a_stream_can_be_left(two: list[SpeakingServer]) -> None:
    """Fails if an interrupted run goes on asking behind the caller's back."""
    stream = streamed(client(two, concurrency=1), iter(ASKED))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    asked = sum(len(server.asked) for server in two)
    assert asked <= 2
    with serving(NET) as servers:
        assert len(list(streamed(client(servers, concurrency=1), iter(ASKED)))) == len(ASKED)
    assert sum(len(server.asked) for server in two) == asked


class _First(Ranks):
    """The first of two ranks; remembers what it tells the other."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def on_main(self, function: Callable[[], T]) -> T:
        self.told.append(function())
        return self.told[-1]


class _Second(_First):
    """The second one."""

    is_main = False

    def on_main(self, function: Callable[[], T]) -> T:
        return self.told.pop(0)


def test_the_other_ranks_get_the_same_stream() -> None:
    """Fails if ranks part ways where servers answer one of them, or a second one asks again."""
    first, second = _First(), _Second()
    with serving(NET) as servers:
        wanted = list(streamed(client(servers, ranks=first), iter(TEXTS)))
    second.told = first.told
    found = list(streamed(client(servers, ranks=second), iter(())))
    assert [numbers for numbers, _ in found] == [numbers for numbers, _ in wanted]
    assert in_order(found, 1) == in_order(wanted, 1) and second.told == []


def test_batches_are_of_one_length_and_drawn_a_few_at_a_time() -> None:
    """Fails if a local engine's batches mix lengths that need not be mixed, or all requests are
    drawn before the first is asked."""
    sampler, drawn = LocalSampler(tiny.policy(NET).sampler.decoder, RULES), 0  # type: ignore[attr-defined]

    def requests() -> Iterator[Request]:
        nonlocal drawn
        for request in [*ASKED, *ASKED]:
            drawn += 1
            yield request

    lengths, seen = [len(one.example.prompt_ids) for one in [*ASKED, *ASKED]], list[int]()
    for numbers, rollout in sampler.stream(
        requests(), Sampling(1.0, 2), generator=torch.Generator(), batch_prompts=3
    ):
        seen += numbers
        assert len(rollout.mask) == len(numbers) == 3 and drawn in (12, 18)
    windows = [seen[:12], seen[12:]]
    assert [sorted(window) for window in windows] == [list(range(12)), list(range(12, 18))]
    for window in windows:
        assert [lengths[i] for i in window] == sorted(lengths[i] for i in window)
