"""The endpoint: HTTP requests in, answers or streams of server-sent events out."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from r1v3.config import Serve
from r1v3.serve.batching import Batcher, Delta, Job
from r1v3.serve.errors import Refusal
from r1v3.serve.prompt import Prompts
from r1v3.serve.replies import Replies
from r1v3.serve.schema import read_request

PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CLIENT_GONE = 499
Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Endpoint:
    """The routes over one batcher.

    Args:
        key: the bearer key that clients must send; None asks for none.
    """

    def __init__(
        self, config: Serve, batcher: Batcher, prompts: Prompts, key: str | None = None
    ) -> None:
        self.config, self.batcher, self.prompts, self.key = config, batcher, prompts, key
        self.metrics = batcher.metrics
        self.draining = False
        self._preparing = ThreadPoolExecutor(1, "prompts")
        self._started = int(time.time())

    def application(self) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            Route("/", self.page("index.html", "text/html")),
            Route("/page.css", self.page("page.css", "text/css")),
            Route("/page.js", self.page("page.js", "text/javascript")),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {Refusal: _refuse, HTTPException: _refuse_route, 500: _failed}
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        return Guard(app, self.config.host, self.key)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            self._preparing.shutdown(wait=False, cancel_futures=True)
            self.batcher.close()

    def page(self, name: str, kind: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route of a file of the chat page."""
        data = (PAGE / name).read_bytes()

        async def show(request: Request) -> Response:
            return Response(data, media_type=kind, headers=_PAGE_HEADERS)

        return show

    async def health(self, request: Request) -> Response:
        """200 while requests are answered; 503 where no new one should be sent."""
        ready = self.batcher.alive and not self.draining
        return JSONResponse(
            {"status": "ok" if ready else "draining" if self.draining else "failed"},
            200 if ready else 503,
        )

    async def show_metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        text = self.metrics.text(len(self.batcher.rows), self.batcher.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "r1v3",
            "max_model_len": self.prompts.positions,
        }

    async def models(self, request: Request) -> Response:
        """The model under its name, and under its name with each mode."""
        return JSONResponse(
            {"object": "list", "data": [self._card(n) for n in self.prompts.models]}
        )

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        if name not in self.prompts.models:
            raise Refusal(404, f"no model {name!r:.100}", code="model_not_found")
        return JSONResponse(self._card(name))

    async def chat(self, request: Request) -> Response:
        """Complete a chat."""
        started = time.monotonic()
        try:
            with ExitStack() as held:
                held.enter_context(self.batcher.place())
                asked = read_request(await self._body(request))
                job = await self._in_thread(self.prompts.job, asked)
                replies = Replies(
                    job,
                    asked.model or self.prompts.name,
                    self.batcher.vocabulary,
                    logprobs=bool(asked.logprobs),
                    token_ids=bool(asked.return_token_ids),
                )
                held.callback(self.batcher.cancel, job)
                self.batcher.submit(job)
                if not job.stream:
                    return await self._answer(request, job, replies, started)
                options = asked.stream_options
                usage = options is not None and bool(options.include_usage)
                events = self._events(job, replies, usage, started)
                return Events(events, held.pop_all())
        except (ClientDisconnect, ClientGone):
            self.metrics.requests["cancelled"] += 1
            return Response(status_code=_CLIENT_GONE)
        except Refusal as refusal:
            if refusal.status < 500:  # those are counted as failed
                self.metrics.requests[str(refusal.status)] += 1
            raise

    async def _in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, work, *arguments)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "the body must be sent as Content-Type: application/json")
        limit = int(self.config.max_body_mb * 1e6)
        told = f"the body is larger than {self.config.max_body_mb:g} MB"
        too_large = Refusal(413, told, code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    async def _answer(
        self, request: Request, job: Job, replies: Replies, started: float
    ) -> Response:
        """Wait for all completions, or until the client leaves."""
        gone = asyncio.ensure_future(_disconnection(request.receive))
        try:
            deltas: list[Delta] = []
            while len(deltas) < job.samples:
                next_one = asyncio.ensure_future(job.deltas.get())
                await asyncio.wait({next_one, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not next_one.done():
                    next_one.cancel()
                    raise ClientGone
                delta = next_one.result()
                if delta.error is not None:
                    raise self._failure(delta.error)
                replies.count(delta)
                deltas.append(delta)
        finally:
            gone.cancel()
        self._answered(started)
        return Response(_json(replies.whole(deltas)), media_type="application/json")

    async def _events(
        self, job: Job, replies: Replies, usage: bool, started: float
    ) -> AsyncIterator[bytes]:
        unfinished = job.samples
        complete = False
        try:
            for sample in range(job.samples):
                yield _event(replies.opening(sample))
            first = True
            while unfinished:
                delta = await job.deltas.get()
                if delta.error is not None:
                    yield _event(self._failure(delta.error).body())
                    complete = True
                    return
                if first:
                    self.metrics.streamed += 1
                    self.metrics.first_token_seconds += time.monotonic() - started
                    first = False
                replies.count(delta)
                unfinished -= delta.finish is not None
                if (chunk := replies.chunk(delta)) is not None:
                    yield _event(chunk)
            if usage:
                yield _event(replies.closing())
            complete = True
            self._answered(started)
            yield b"data: [DONE]\n\n"
        finally:
            if not complete:
                self.metrics.requests["cancelled"] += 1

    def _answered(self, started: float) -> None:
        self.metrics.requests["answered"] += 1
        self.metrics.seconds += time.monotonic() - started

    def _failure(self, message: str) -> Refusal:
        self.metrics.requests["failed"] += 1
        return Refusal(500, message)


class Events(StreamingResponse):
    """Server-sent events; `held` is released when the response ends, in whatever way."""

    def __init__(self, events: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


class Guard:
    """Asks for the key, and on loopback for a loopback name: another website whose name points
    here cannot read answers. /health and the page need no key."""

    def __init__(self, app: ASGIApp, host: str, key: str | None) -> None:
        self._app, self._local = app, host in _LOOPBACK
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = None
        if self._local and _host_name(headers.get(b"host", b"")) not in _LOOPBACK:
            refusal = Refusal(403, "this server listens on loopback; use localhost in its address")
        elif self._key is not None and scope["path"].startswith(("/v1", "/metrics")):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                told = "a key is needed: Authorization: Bearer KEY"
                refusal = Refusal(401, told, code="invalid_api_key")
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(refusal.body(), refusal.status)(scope, receive, send)


def _host_name(header: bytes) -> str:
    """The name in a Host header, without port and brackets."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: object) -> bytes:
    """ASCII: a client's text may hold what UTF-8 cannot carry."""
    return json.dumps(value, allow_nan=False).encode("ascii")


def _event(value: object) -> bytes:
    return b"data: " + _json(value) + b"\n\n"


async def _refuse(request: Request, refusal: Refusal) -> Response:
    headers = {"Retry-After": "1"} if refusal.status == 429 else None
    return Response(_json(refusal.body()), refusal.status, headers, "application/json")


async def _refuse_route(request: Request, error: HTTPException) -> Response:
    told = f"{request.method} {request.url.path}: {error.detail}"
    return await _refuse(request, Refusal(error.status_code, told[:300]))


async def _failed(request: Request, error: Exception) -> Response:
    return await _refuse(request, Refusal(500, "the server failed; its log says why"))
