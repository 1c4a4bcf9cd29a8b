"""Requests come and go together; clients leave; the server ends."""

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import PATIENCE
from tests.serve.serving import (
    CHAT,
    MODEL,
    PICTURE,
    QUESTION,
    ROOT,
    Served,
    body,
    error_of,
    serving,
    until,
    user,
)

# Bans the end of the turn, so that a completion is as long as it may be.
ENDLESS = {"logit_bias": {"2": -100}, "max_tokens": 460, "mode": "nothink"}


def in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def raw_request(served: Served, **changes: Any) -> socket.socket:
    """A connection on which a request was sent and nothing was read."""
    data = json.dumps(body(**changes)).encode()
    connection = socket.create_connection(("127.0.0.1", served.port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def metric(served: Served, name: str) -> float:
    text = served.client.get("/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


def test_eight_clients_share_the_steps(served: Served) -> None:
    """Fails if requests are answered one after the other, or one waits for another's end."""
    before = metric(served, "r1v3_decoding_steps_total")
    answers: list[dict[str, Any]] = [{} for _ in range(8)]

    def ask(number: int) -> None:
        length = 100 if number else 20
        answers[number] = served.chat(**{**ENDLESS, "max_tokens": length}, seed=number)

    in_threads(ask, 8)
    lengths = [answer["usage"]["completion_tokens"] for answer in answers]
    assert lengths == [20] + [100] * 7
    assert metric(served, "r1v3_decoding_steps_total") - before < sum(lengths) / 2
    assert metric(served, "r1v3_rows") == metric(served, "r1v3_waiting_requests") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(served: Served, stream: bool) -> None:
    """Fails if an answer that nobody waits for is decoded to its end."""
    cancelled = metric(served, 'r1v3_requests_total{outcome="cancelled"}')
    batcher = served.endpoint.batcher
    with raw_request(served, stream=stream, n=4, **ENDLESS):
        until(lambda: len(batcher.rows) == 4)
        done = batcher.metrics.completion_tokens
    until(lambda: not batcher.rows)
    assert batcher.metrics.completion_tokens - done < 4 * 400
    until(lambda: metric(served, 'r1v3_requests_total{outcome="cancelled"}') == cancelled + 1)
    assert batcher.waiting == 0 and served.chat(max_tokens=1)


def test_a_full_queue_refuses_and_frees_itself() -> None:
    """Fails if requests pile up without end, or places of those who left stay taken."""
    with serving(rows=1, queue=1) as small:
        batcher = small.endpoint.batcher
        first, second = raw_request(small, stream=True, **ENDLESS), raw_request(small, **ENDLESS)
        until(lambda: len(batcher.rows) == 1 and batcher.waiting == 1)
        reply = small.client.post(CHAT, json=body())
        assert error_of(reply, 429)["code"] == "queue_full"
        assert int(reply.headers["Retry-After"]) >= 1
        assert metric(small, "r1v3_waiting_requests") == 1
        second.close()  # it never had a row
        until(lambda: batcher.waiting == 0)
        first.close()
        until(lambda: not batcher.rows)
        assert small.chat(max_tokens=1)
        assert metric(small, 'r1v3_requests_total{outcome="429"}') == 1


def test_an_unfinished_thought_is_told(served: Served) -> None:
    """Fails if a thought that was cut is an empty answer, which kits ask again at full length, or
    is taken for the answer."""
    choice = served.chat(mode="slow", max_tokens=4)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == "…" and choice["message"]["reasoning_content"]
    usage = served.chat(mode="slow", max_tokens=4)["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 4


def test_a_budget_closes_the_thought(served: Served) -> None:
    """Fails if a budget is a plain cut: the thought must end, and an answer must follow."""
    answer = served.chat(thinking_budget=6, max_tokens=60, logit_bias={"2": -20})
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] and message["content"] not in ("", "…")
    assert 6 <= answer["usage"]["completion_tokens_details"]["reasoning_tokens"] < 20


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", ["decoder.join", "_bias", "_draw", "decoder.step"])
def test_an_error_while_decoding_ends_the_requests_only(
    served: Served,
    broken: str,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Fails if one failing step leaves clients waiting for ever, stops the server, or leaves rows
    in the cache that nobody has."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        batcher = served.endpoint.batcher
        owner = batcher.decoder if broken.startswith("decoder") else batcher
        patch.setattr(owner, broken.removeprefix("decoder."), fail)
        if stream:
            with served.client.stream("POST", CHAT, json=body(stream=True, n=2)) as reply:
                last = [line for line in reply.iter_lines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        else:
            error_of(served.client.post(CHAT, json=body(n=2)), 500)
    assert "out of memory" in capfd.readouterr().err
    assert batcher.rows == [] == batcher.decoder.lengths
    assert served.chat(max_tokens=3)["usage"]["completion_tokens"] == 3
    assert served.client.get("/health").status_code == 200


def test_sigterm_answers_what_is_open_and_ends(tmp_path: Path) -> None:
    """Fails if a restart loses answers, takes new ones, or leaves the process behind."""
    command = [sys.executable, "-m", "r1v3", "serve", str(MODEL), "port=0", "threads=1", "rows=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", process.stdout.readline())
            assert found is not None
            address = f"http://127.0.0.1:{found[1]}"
            with httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False) as client:
                answers: list[httpx.Response] = []

                def ask(number: int) -> None:  # the third has no row yet when the signal comes
                    reply = client.post(
                        CHAT, json=body(**{**ENDLESS, "max_tokens": 300}, stream=number == 0)
                    )
                    answers.append(reply)

                def signalled() -> None:
                    until(lambda: "r1v3_rows 2" in client.get("/metrics").text)
                    process.send_signal(signal.SIGTERM)

                thread = threading.Thread(target=signalled)
                thread.start()
                in_threads(ask, 3)
                thread.join()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert [reply.status_code for reply in answers] == [200] * 3
    streamed = [reply.text for reply in answers if reply.text.startswith("data: ")]
    assert len(streamed) == 1 and streamed[0].rstrip().endswith("data: [DONE]")
    whole = [reply.json() for reply in answers if not reply.text.startswith("data: ")]
    assert [answer["usage"]["completion_tokens"] for answer in whole] == [300] * 2
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(found[1])), timeout=1)


def resident() -> int:
    """Memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat_over_2000_requests() -> None:
    """Fails if requests leave something behind: answered, refused, or left by their clients."""
    with serving(rows=8, queue=64) as one:

        def ask(number: int) -> None:
            for i in range(63):
                changes: dict[str, Any] = {"max_tokens": 8, "seed": i, "temperature": 1}
                if i % 5 == 1:
                    one.events(**changes)
                elif i % 5 == 2:
                    one.refusal(400, n=0)
                elif i % 5 == 3:
                    raw_request(one, **{**ENDLESS, "stream": i % 2 == 0}).close()
                else:
                    one.chat(**changes, messages=[user(QUESTION, *[PICTURE] * (1 + i % 3))])

        sizes = []
        for _ in range(4):
            in_threads(ask, 8)
            until(lambda: not one.endpoint.batcher.rows and not one.endpoint.batcher.waiting)
            gc.collect()
            sizes.append(resident())
        assert sizes[-1] - sizes[1] < 8 << 20, sizes


@pytest.mark.slow
def test_rows_join_and_leave_for_a_minute(served: Served) -> None:
    """Fails if rows that move in the cache take another's keys: every answer is one asked alone."""
    settings = [
        {"seed": i, "temperature": 1.0, "max_tokens": 1 + 7 * i % 60, "n": 1 + i % 3}
        for i in range(40)
    ]
    alone = [served.chat(return_token_ids=True, **one) for one in settings]  # type: ignore[arg-type]
    wanted = [[c["token_ids"] for c in one["choices"]] for one in alone]
    wrong: list[int] = []
    start = time.monotonic()

    def ask(number: int) -> None:
        i = number
        while time.monotonic() - start < 30:
            i = (i * 7 + 3 + number) % len(settings)
            answer = served.chat(return_token_ids=True, **settings[i])  # type: ignore[arg-type]
            if [c["token_ids"] for c in answer["choices"]] != wanted[i]:
                wrong.append(i)

    in_threads(ask, 8)
    assert wrong == []
