"""Requests to HTTP servers: the judge of rewards, the servers of rollouts.

Servers are not trusted: a reply is read up to a number of bytes and within a time, proxies of the
environment are not used and redirects are not followed. httpx is an optional package.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx

MAX_BACKOFF_SECONDS = 8.0
# Connections never go through a proxy and never follow a redirect; replies come as they are, so
# that their size is the size that is read.
CLIENT_OPTIONS: dict[str, Any] = {"trust_env": False, "follow_redirects": False}
IDENTITY = {"Accept-Encoding": "identity"}


class RequestFailed(Exception):
    """One attempt failed.

    Attributes:
        retry: whether another attempt may succeed.
        status: of the reply; None where there was none.
        wait_seconds: how long the server asked to be left alone; None where it did not.
    """

    def __init__(
        self,
        reason: str,
        *,
        retry: bool,
        status: int | None = None,
        wait_seconds: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry = retry
        self.status = status
        self.wait_seconds = wait_seconds


def require_httpx(what: str) -> None:
    """Check that httpx is installed.

    Raises:
        ImportError: it is not; names `what` needs it and how to install it.
    """
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs httpx: pip install 'r1v3[rewards]'") from error


def check_address(name: str, url: str) -> None:
    """Raise ValueError unless `url` is an http:// or https:// address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} {url!r} must be an http:// or https:// address")


def check_limits(above_zero: dict[str, float], not_negative: dict[str, float]) -> None:
    """Raise ValueError for the first value, by name, that is out of its range."""
    for name, value in above_zero.items():
        if not value > 0:
            raise ValueError(f"{name} {value!r} must be above 0")
    for name, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{name} {value!r} must be 0 or more")


def backoff(attempt: int, seconds: float) -> float:
    """Pause in seconds before retry number `attempt` (from 0): doubles each time, at most 8 s."""
    return min(seconds * 2 ** min(attempt, 32), MAX_BACKOFF_SECONDS)


def refused(status: int, detail: str = "", retry_after: str | None = None) -> RequestFailed:
    """The failure of a status other than 200; 408, 429 and 5xx are worth another try.

    Args:
        retry_after: the header of that name.
    """
    return RequestFailed(
        f"http {status}{': ' if detail else ''}{detail}",
        retry=status in (408, 429) or status >= 500,
        status=status,
        wait_seconds=None if retry_after is None else seconds_to_wait(retry_after),
    )


def seconds_to_wait(retry_after: str) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or a date (RFC 9110, 10.2.3).

    Never below 0; None for anything else.
    """
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


async def exchange(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    body: bytes | None = None,
    *,
    seconds: float,
    max_bytes: int,
) -> bytes:
    """The body of a 200 reply.

    Args:
        seconds: from the start of the connection to the last byte.
        max_bytes: most that is read.
    Raises:
        RequestFailed: no such reply. The text of a refusal is part of the reason, in one line of
            at most 300 characters.
    """
    import asyncio

    import httpx

    headers = {"Content-Type": "application/json"} if body is not None else {}
    received = bytearray()
    try:
        async with (
            asyncio.timeout(seconds),
            client.stream(method, url, content=body, headers=headers, timeout=None) as response,
        ):
            async for chunk in response.aiter_raw():
                received += chunk
                if len(received) > max_bytes:
                    break
            if response.status_code != 200:
                text = bytes(received[:4096]).decode("utf-8", "replace")
                raise refused(
                    response.status_code,
                    " ".join(text.split())[:300],
                    response.headers.get("retry-after"),
                )
            if len(received) > max_bytes:
                raise RequestFailed(f"a reply of more than {max_bytes} bytes", retry=True)
    except TimeoutError as error:
        raise RequestFailed(f"no answer within {seconds:g} s", retry=True) from error
    except httpx.HTTPError as error:
        detail = str(error) or type(error).__name__
        raise RequestFailed(f"connection: {detail}", retry=True) from error
    return bytes(received)
