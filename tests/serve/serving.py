"""A real server on a free port of this process, and the questions that tests ask it."""

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from r1v3.config import Serve, load
from r1v3.serve.app import Endpoint
from r1v3.serve.run import load_endpoint
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets/tiny-internvl"
PICTURE = (ROOT / "assets/example.png").read_bytes()
QUESTION = "Compute the result."
CHAT = "/v1/chat/completions"


class Served:
    """A server and a client of it."""

    def __init__(self, endpoint: Endpoint, port: int) -> None:
        self.endpoint, self.port = endpoint, port
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False
        )

    def chat(self, **changes: Any) -> dict[str, Any]:
        """The answer to a request that must be answered."""
        reply = self.client.post(CHAT, json=body(**changes))
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def events(self, **changes: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, without its end."""
        found = []
        with self.client.stream("POST", CHAT, json=body(stream=True, **changes)) as reply:
            assert reply.status_code == 200
            lines = [line for line in reply.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            found.append(json.loads(line.removeprefix("data: ")))
        return found

    def refusal(self, status: int, **changes: Any) -> dict[str, Any]:
        """The error of a request that must be refused with this status."""
        return error_of(self.client.post(CHAT, json=body(**changes)), status)


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, in the shape that OpenAI's clients read."""
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


def data_address(data: bytes = PICTURE, kind: str = "image/png") -> str:
    """A picture as a data: address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(text: str = QUESTION, *pictures: bytes) -> dict[str, Any]:
    """A user turn with pictures in front of its text."""
    parts = [{"type": "image_url", "image_url": {"url": data_address(one)}} for one in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def body(**changes: Any) -> dict[str, Any]:
    """A request about the shipped picture: greedy, 24 tokens."""
    start = {"model": "tiny-internvl", "messages": [user(QUESTION, PICTURE)]}
    return {**start, "temperature": 0, "max_tokens": 24, **changes}


@contextmanager
def serving(model: Path = MODEL, **settings: Any) -> Iterator[Served]:
    """Serve a model until the block ends."""
    overrides = [f"model={model}", *(f"{k}={json.dumps(v)}" for k, v in settings.items())]
    endpoint = load_endpoint(load(Serve, None, overrides))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(endpoint.application(), log_level="error", access_log=False)
        server = uvicorn.Server(config)
        run = asyncio.Runner()
        thread = threading.Thread(target=lambda: run.run(server.serve(sockets=[listener])))
        thread.start()
        served = Served(endpoint, listener.getsockname()[1])
        try:
            until(lambda: server.started)
            yield served
        finally:
            server.should_exit = True
            served.client.close()
            thread.join()
            run.close()


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until something is true; how long does not matter to what is tested."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)
