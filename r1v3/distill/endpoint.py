"""Requests to a server with a rate limit, which may fail in any way: sent until answered.

A request waits for its place under the limits on requests and tokens per minute. What may succeed
later is sent again after a pause, `Retry-After` holds back every request, and what a server has no
room for now (429) uses up no attempt.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from r1v3.config import Endpoint
from r1v3.http import (
    CLIENT_OPTIONS,
    IDENTITY,
    RequestFailed,
    backoff,
    check_address,
    exchange,
    require_httpx,
)

T = TypeVar("T")

MAX_REPLY_BYTES = 64 << 20
# A server that has no room for so long, over all requests, has none at all.
_MOST_REFUSALS = 100
# Who is told to wait longer, such as until tomorrow, stops instead.
_LONGEST_WAIT = 900.0
_MINUTE = 60.0


class Pace:
    """Spacing of requests such that no minute holds more than the limit.

    Each request of `cost` moves the next one `cost / limit` minutes on, so that what is sent is
    spread evenly; providers cut a minute into smaller windows.

    Args:
        per_minute: the limit; None sets none.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._per_minute = per_minute
        self._next = 0.0

    def reserve(self, cost: float, now: float) -> float:
        """Take a place for a request; return the seconds until it."""
        if self._per_minute is None:
            return 0.0
        start = max(self._next, now)
        self._next = start + cost * _MINUTE / self._per_minute
        return start - now

    def correct(self, difference: float) -> None:
        """Move the next place by what a request took more than it had reserved."""
        if self._per_minute is not None:
            self._next += difference * _MINUTE / self._per_minute


def api_key(config: Endpoint) -> str | None:
    """The bearer token, without surrounding space.

    Raises:
        ValueError: the environment variable that should hold it is not set.
    """
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ValueError(
            f"api_key_env names {config.api_key_env}, which is not set: export it first"
        )
    return key


class Client:
    """An open connection to an endpoint, see `connect`.

    Attributes:
        sent: attempts so far.
        failures: attempts that failed so far.
    """

    def __init__(self, config: Endpoint, http: Any, expect_tokens: int) -> None:
        assert config.url is not None
        self._config, self._http, self._base = config, http, config.url.rstrip("/")
        self._requests = Pace(config.requests_per_minute)
        self._tokens = Pace(config.tokens_per_minute)
        self._held_until = 0.0
        self._used: deque[float] = deque([expect_tokens], maxlen=256)
        self.sent = self.failures = 0

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], T],
        prompt_tokens: float = 0.0,
    ) -> T:
        """Send a request until it is answered; return what is read from the reply.

        Args:
            read: reads a reply's JSON object, or raises RequestFailed.
            prompt_tokens: about how many it has, for the limit on tokens; those of the answer are
                taken to be as many as those of the latest ones.

        Raises:
            RequestFailed: no attempt succeeded; the reason is that of the last one.
        """
        data = json.dumps(_without_null({**body, **self._config.body})).encode()
        attempts = refusals = 0
        while True:
            expected = prompt_tokens + sum(self._used) / len(self._used)
            await self._wait_for_place(expected)
            self.sent += 1
            try:
                received = await exchange(
                    self._http,
                    "POST",
                    self._base + path,
                    data,
                    seconds=self._config.timeout_seconds,
                    max_bytes=MAX_REPLY_BYTES,
                )
                reply = _json_object(received)
                found = read(reply)
            except RequestFailed as failure:
                self.failures += 1
                full = failure.status == 429
                attempts += not full
                refusals += full
                if not failure.retry or attempts > self._config.retries:
                    raise
                if refusals > max(_MOST_REFUSALS, self._config.retries):
                    raise
                if (failure.wait_seconds or 0) > _LONGEST_WAIT:
                    asked = f"{failure.reason}, and asks to wait {failure.wait_seconds:.0f} s"
                    raise RequestFailed(asked, retry=True, status=failure.status) from failure
                pause = backoff(max(attempts, refusals) - 1, self._config.backoff_seconds)
                if failure.wait_seconds is not None:
                    pause = failure.wait_seconds
                if failure.wait_seconds is not None or full:
                    self._held_until = max(self._held_until, time.monotonic() + pause)
                else:
                    await asyncio.sleep(pause)
                continue
            used = _usage(reply)
            if used is not None:
                self._tokens.correct(sum(used) - expected)
                self._used.append(used[1])
            return found

    async def _wait_for_place(self, tokens: float) -> None:
        while True:
            if (held := self._held_until - time.monotonic()) > 0:
                await asyncio.sleep(held)
                continue
            now = time.monotonic()
            pause = max(self._requests.reserve(1.0, now), self._tokens.reserve(tokens, now))
            if pause > 0:
                await asyncio.sleep(pause)
            if self._held_until <= time.monotonic():
                return


@asynccontextmanager
async def connect(config: Endpoint, what: str, expect_tokens: int = 0) -> AsyncIterator[Client]:
    """Open a client; `what` it is for is named in errors.

    Args:
        expect_tokens: of an answer, for the limit on tokens, until answers tell.

    Raises:
        ValueError: the address or the key is missing.
        ImportError: httpx is not installed.
    """
    require_httpx(what)
    import httpx

    check_address(f"url of {what}", config.url or "")
    headers = dict(IDENTITY)
    if (key := api_key(config)) is not None:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=config.concurrency)
    async with httpx.AsyncClient(headers=headers, limits=limits, **CLIENT_OPTIONS) as http:
        yield Client(config, http, expect_tokens)


def _without_null(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}


def _json_object(received: bytes) -> dict[str, Any]:
    try:
        found = json.loads(received)
    except (ValueError, RecursionError) as error:
        raise RequestFailed("a reply that is not JSON", retry=True) from error
    if not isinstance(found, dict):
        raise RequestFailed("a reply that is no JSON object", retry=True)
    return found


def _usage(reply: Mapping[str, Any]) -> tuple[int, int] | None:
    """Tokens of prompt and answer as a reply tells them; None where it does not."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if type(prompt) is not int or type(answer) is not int or min(prompt, answer) < 0:
        return None
    return prompt, answer


def usage_of(reply: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of prompt and answer of a reply, None where it does not tell."""
    return _usage(reply) or (None, None)
