"""A stand-in teacher on the loopback interface: answers by seed, with scripted faults."""

import json
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np

from r1v3.config import Distill
from r1v3.data.compose import to_png
from r1v3.data.sample import Sample, make_sample
from r1v3.data.schema import write_samples
from tests.loopback import LoopbackServer
from tests.rewards.judge_server import send

# Done instead of answering one request.
Fault = Callable[["Teacher", BaseHTTPRequestHandler, dict[str, Any]], None]

TIMEOUT_SECONDS = 0.2


def text_of(body: dict[str, Any]) -> str:
    """All text of a request's turns."""
    parts = []
    for message in body["messages"]:
        content = message["content"]
        for part in content if isinstance(content, list) else [{"text": content}]:
            parts.append(part.get("text", ""))
    return "\n".join(parts)


def sum_of(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+) \+ (\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def solve(body: dict[str, Any]) -> dict[str, Any]:
    """The message that a seed gives: right for most, wrong or badly written for others."""
    a, b = sum_of(text_of(body))
    draw = random.Random(body["seed"])
    kind, total = draw.randrange(10), a + b
    thought = (
        f"The picture shows two numbers, {a} and {b}. Adding them step by step gives {total}. "
        f"Wait, let me check the sum once more by taking {b} away again, which leaves {a}. "
        f"So the answer is {total}."
    )
    answer = f"The sum is \\boxed{{{total}}}"
    if kind == 1:
        answer = f"The sum is \\boxed{{{total + 1}}}"
        thought = thought.replace(f"is {total}.", f"is {total + 1}.")
    elif kind == 2:
        thought += " 所以答案就是这两个数字加起来的总和，没有别的可能了。"
    elif kind == 3:
        thought = "I can't see the image, so I will guess. " + thought
    elif kind == 4:
        thought += " Let me add the numbers again." * 20
    elif kind == 5:
        return {"content": f"<think>\n{thought}\n</think>\n\n{answer}"}
    elif kind == 6:
        return {"content": answer, "reasoning": thought}
    return {"content": answer, "reasoning_content": thought}


def complete(body: dict[str, Any]) -> dict[str, Any]:
    """The reply of a healthy teacher."""
    message = {"role": "assistant", **solve(body)}
    words = sum(len(str(text).split()) for text in message.values())
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": words},
    }


class Teacher(LoopbackServer):
    """One server.

    Attributes:
        faults: done to the next requests, one each.
        asked: requests by seed, answered ones and others. answered: how often each seed was.
        times: of the requests, in monotonic seconds. authorization: the header of the last one.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], dict[str, Any]] = complete) -> None:
        self.reply = reply
        self.faults: deque[Fault] = deque()
        self.asked: Counter[int] = Counter()
        self.answered: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.authorization: str | None = None
        self.paths: Counter[str] = Counter()
        self._lock = threading.Lock()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    teacher.handle(self, body)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(Handler, path="/v1")

    def handle(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.asked[body.get("seed", 0)] += 1
            self.times.append(time.monotonic())
            self.bodies = [*self.bodies[-7:], body]
            self.authorization = handler.headers.get("Authorization")
            self.paths[handler.path] += 1
            fault = self.faults.popleft() if self.faults else None
        if fault is not None:
            fault(self, handler, body)
            return
        self.answer(handler, body)

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        send(handler, json.dumps(self.reply(body)).encode())
        with self._lock:
            self.answered[body.get("seed", 0)] += 1


@contextmanager
def teaching(reply: Callable[[dict[str, Any]], dict[str, Any]] = complete) -> Iterator[Teacher]:
    teacher = Teacher(reply)
    try:
        yield teacher
    finally:
        teacher.stop()


def says(payload: bytes, status: int = 200, **headers: str) -> Fault:
    """A reply of these bytes."""

    def fault(teacher: Teacher, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    return fault


def hang(teacher: Teacher, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """No reply until the client has gone, which closes its side of the connection."""
    handler.rfile.read(1)
    handler.close_connection = True


def reset(teacher: Teacher, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The connection is cut without a reply."""
    handler.close_connection = True
    handler.connection.close()


def cut_short(teacher: Teacher, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The connection is cut in the middle of a reply."""
    payload = json.dumps(complete(body)).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload[: len(payload) // 2])
    handler.close_connection = True


def half_json(teacher: Teacher, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """A whole reply that holds half of the JSON."""
    payload = json.dumps(complete(body)).encode()
    send(handler, payload[: len(payload) // 2])


FAULTS: dict[str, Fault] = {
    "reset": reset,
    "cut short": cut_short,
    "half of the JSON": half_json,
    "garbage": says(b"\xff\x00<html>"),
    "a list": says(b"[]"),
    "no choices": says(b'{"choices": []}'),
    "no text": says(b'{"choices": [{"message": {"content": 3}}]}'),
    "an empty reply": says(b'{"choices": [{"message": {"content": ""}}]}'),
    "500": says(b"oops", 500),
    "429": says(b"slow down", 429),
    "429 with Retry-After": says(b"slow down", 429, Retry_After="0.05"),
    "503 with Retry-After": says(b"busy", 503, Retry_After="0.05"),
}


def question(number: int, domain: str = "addition", picture: bool = True) -> Sample:
    """One question about a picture of its own."""
    a, b = number % 97 + 1, number % 89 + 2
    pixels = np.random.default_rng(number).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    return make_sample(
        question=f"Picture {number} shows a sum. What is {a} + {b}?",
        ground_truth=str(a + b),
        data_source="tests/sums",
        index=number,
        images=[to_png(pixels)] if picture else [],
        domain=domain,
    )


def write_questions(path: Path, count: int) -> Path:
    write_samples(path, [question(i, ("addition", "sums")[i % 3 == 0]) for i in range(count)])
    return path


def settings(folder: Path, url: str, questions: Path, **changes: Any) -> dict[str, Any]:
    """A configuration whose retries are fast; `changes` are merged into its sections."""
    tree: dict[str, Any] = {
        "run": str(folder),
        "questions": [str(questions)],
        "teacher": {
            "url": url,
            "model": "stand-in",
            "answers": 2,
            "concurrency": 4,
            "timeout_seconds": 600,
            "backoff_seconds": 0.01,
        },
        "choice": {"validation": 2},
        "samples": 1,
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree


def config(folder: Path, url: str, questions: Path, **changes: Any) -> Distill:
    return Distill.model_validate(settings(folder, url, questions, **changes))
