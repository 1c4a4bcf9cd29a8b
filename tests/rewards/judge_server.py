"""Real HTTP servers on the loopback interface that play the judge model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from r1v3.rewards import LLMVerifier
from tests.loopback import LoopbackServer

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Server(LoopbackServer):
    """One HTTP server; `requests` are the decoded bodies it has received."""

    def __init__(self, answer: Answer) -> None:
        requests: list[dict[str, Any]] = []
        headers: list[dict[str, str]] = []
        paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append(body)
                headers.append(dict(self.headers))
                paths.append(self.path)
                try:
                    answer(self, body)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.requests, self.headers, self.paths = requests, headers, paths
        super().__init__(Handler, path="/v1")


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.stop()


def send(handler: BaseHTTPRequestHandler, payload: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload)


def says(text: object) -> Answer:
    payload = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    return lambda handler, body: send(handler, payload)


def client(url: str, **options: Any) -> LLMVerifier:
    fast: dict[str, Any] = {"timeout_seconds": 5.0, "retries": 0, "backoff_seconds": 0.01}
    return LLMVerifier(url, "judge", **{**fast, **options})
