"""Requests to servers that may fail: every request is answered once, or the reasons are named.

A server whose request fails is taken out and tried again later, with growing pauses; the request
goes to another one. A request that runs much longer than the others is also sent to a second
server, and the first valid answer wins. Nothing waits forever: an attempt has a time limit, a
request a number of attempts, and a pool without a live server a limit on waiting for one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from r1v3.http import RequestFailed, backoff, check_limits

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Job = TypeVar("Job")
Result = TypeVar("Result")

# A request is late when no further job waits for its place, most requests of its kind have been
# answered, and it has run this many times as long as the slowest of them and this many seconds.
LATE_FACTOR, LATE_SECONDS = 2.0, 1.0
# How long the first requests wait for servers whose check has not ended, so that not all of them
# go to the first one that has passed.
_GRACE_SECONDS = 2.0
_TICK = 0.02


@dataclass(frozen=True)
class ServerLimits:
    """Limits on time, attempts and requests.

    Attributes:
        timeout_seconds: of one attempt at one request.
        retries: further attempts at a request after the first, on another server if there is one.
        concurrency: requests under way at a time, over all servers.
        patience_seconds: longest wait while no server is live; a server that restarts must need
            less, loading weights included.
        update_seconds: longest time for a server to load weights.
        pause_seconds: before a failed server is checked again; doubles each time, at most 8 s.

    Raises:
        ValueError: retries or patience_seconds below 0, or another value not above 0.
    """

    timeout_seconds: float = 600.0
    retries: int = 3
    concurrency: int = 64
    patience_seconds: float = 600.0
    update_seconds: float = 1800.0
    pause_seconds: float = 0.5

    def __post_init__(self) -> None:
        not_negative = {"retries": self.retries, "patience_seconds": self.patience_seconds}
        above_zero = {k: v for k, v in vars(self).items() if k not in not_negative}
        check_limits(above_zero=above_zero, not_negative=not_negative)


DEFAULT_LIMITS = ServerLimits()


@dataclass
class Server:
    """One server and its state.

    Attributes:
        live: it has passed its check and has not failed since.
        name: the name of the model it serves.
        step: training step of its weights; None if unknown.
        retry_at: time of the next check (monotonic seconds).
        failures: failed checks and attempts in a row.
        trouble: description of the last failure.
        running: attempts under way.
        checking: whether its check is under way.
    """

    url: str
    live: bool = False
    name: str = ""
    step: int | None = None
    retry_at: float = 0.0
    failures: int = 0
    trouble: str = "not tried yet"
    running: int = 0
    checking: bool = False

    def fail(self, reason: str, pause_seconds: float) -> None:
        """Take the server out for a time that grows with its failures in a row.

        When it goes down, all requests under way on it fail; they count as one failure.
        """
        self.trouble = reason
        if not (self.live or self.checking):
            return
        self.live = False
        self.retry_at = time.monotonic() + backoff(self.failures, pause_seconds)
        self.failures += 1


class NoServers(RuntimeError):
    """Requests are unanswered; the message names every server with its last failure."""


def no_servers(what: str, servers: Sequence[Server]) -> NoServers:
    """Build the error for unanswered requests."""
    lines = "; ".join(f"{s.url}: {s.trouble}" for s in servers)
    return NoServers(f"{what}. Servers and their last failures: {lines}")


@dataclass
class _Answered:
    """Count of the requests of one kind that were answered, and seconds of the slowest."""

    count: int = 0
    slowest: float = 0.0


@dataclass
class Pool(Generic[Task, Answer]):
    """A pool of servers that answers tasks, at most `limits.concurrency` of them at a time.

    Attributes:
        ask: does one task on one server. Like `check`, it raises RequestFailed when it fails; any
            other error ends the run.
        check: checks whether a server can be used, and prepares it.
        failed: attempts that failed so far.
        resent: tasks that were sent to a second server so far, because they were late.
    """

    servers: Sequence[Server]
    ask: Callable[[Server, Task], Awaitable[Answer]]
    check: Callable[[Server], Awaitable[None]]
    limits: ServerLimits
    failed: int = field(default=0, init=False)
    resent: int = field(default=0, init=False)
    _answered: dict[int, _Answered] = field(default_factory=dict, init=False)
    _open: int = field(default=0, init=False)
    _drawn: bool = field(default=False, init=False)
    _slots: asyncio.Semaphore = field(init=False, repr=False)

    async def run(
        self,
        jobs: Iterable[Job],
        work: Callable[[Job], Awaitable[Result]],
        take: Callable[[tuple[int, Result]], None],
    ) -> None:
        """Do all jobs; `take` the number and the result of each as soon as it is done.

        Args:
            jobs: drawn one by one, in another thread, as there is room: never more than
                `limits.concurrency` are held.
            work: does a job with the help of `answer`.

        Raises:
            NoServers: a task failed on every attempt, or no server was live for too long.
        """
        self._answered, self._open, self._drawn = {}, 0, False
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        for server in self.servers:
            server.retry_at = 0.0  # much may have happened since the last run
        watch = asyncio.create_task(self._watch())
        all_of_them = asyncio.create_task(self._do(jobs, work, take))
        try:
            await asyncio.wait([watch, all_of_them], return_when=asyncio.FIRST_COMPLETED)
            if not all_of_them.done():
                await watch  # it only ends by raising
            all_of_them.result()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            for task in (watch, all_of_them):
                task.cancel()
            await asyncio.gather(watch, all_of_them, return_exceptions=True)

    async def _do(
        self,
        jobs: Iterable[Job],
        work: Callable[[Job], Awaitable[Result]],
        take: Callable[[tuple[int, Result]], None],
    ) -> None:
        room, numbered = asyncio.Semaphore(self.limits.concurrency), enumerate(jobs)

        async def one(number: int, job: Job) -> None:
            take((number, await work(job)))
            room.release()

        await self._settle()
        async with asyncio.TaskGroup() as group:
            while True:
                await room.acquire()
                drawn = await asyncio.to_thread(next, numbered, None)
                if drawn is None:
                    break
                group.create_task(one(*drawn))
            self._drawn = True

    async def answer(self, task: Task, kind: int = 0) -> Answer:
        """Return the answer to a task; within the work of `run`.

        Args:
            kind: only tasks of one kind are compared to tell which are late.

        Raises:
            NoServers: as `run`.
        """
        self._open += 1
        async with self._slots:
            answer = await self._answer(task, self._answered.setdefault(kind, _Answered()))
        self._open -= 1
        return answer

    async def ready(self) -> None:
        """Check every server that is out, until one is live.

        Raises:
            NoServers: none was live for `patience_seconds` after the first round of checks.
        """
        since: float | None = None
        while True:
            due = [s for s in self.servers if not s.live and time.monotonic() >= s.retry_at]
            await asyncio.gather(*(self._check(server) for server in due))
            if any(server.live for server in self.servers):
                return
            since = time.monotonic() if since is None else since
            if time.monotonic() - since > self.limits.patience_seconds:
                what = f"no server was live for {self.limits.patience_seconds:g} s"
                raise no_servers(what, self.servers)
            await asyncio.sleep(_TICK)

    async def _settle(self) -> None:
        """Wait until every server is live or out; once one is live, for a short time only."""
        since = time.monotonic()
        while any(
            not s.live and (s.checking or time.monotonic() >= s.retry_at) for s in self.servers
        ):
            late = time.monotonic() - since > _GRACE_SECONDS
            if late and any(server.live for server in self.servers):
                return
            if time.monotonic() - since > self.limits.patience_seconds:
                return
            await asyncio.sleep(_TICK)

    async def _watch(self) -> None:
        """Check servers that are out, each when its pause is over."""
        checks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for server in self.servers:
                    current = checks.get(server.url)
                    if current is not None and current.done():
                        del checks[server.url]
                        current.result()
                    elif current is None and not server.live:
                        if time.monotonic() >= server.retry_at:
                            checks[server.url] = asyncio.create_task(self._check(server))
                await asyncio.sleep(_TICK)
        finally:
            for check in checks.values():
                check.cancel()
            await asyncio.gather(*checks.values(), return_exceptions=True)

    async def _check(self, server: Server) -> None:
        server.checking = True
        try:
            await self.check(server)
        except RequestFailed as failure:
            server.fail(failure.reason, self.limits.pause_seconds)
        else:
            server.live, server.failures = True, 0
        finally:
            server.checking = False

    async def _answer(self, task: Task, others: _Answered) -> Answer:
        reasons: list[str] = []
        tried: set[str] = set()
        while len(reasons) <= self.limits.retries:
            server = await self._free(tried)
            tried.add(server.url)
            try:
                return await self._attempt(task, server, others)
            except RequestFailed as failure:
                reasons.append(failure.reason)
                if not failure.retry:
                    break
        count = f"{len(reasons)} attempt{'s' if len(reasons) > 1 else ''}"
        raise no_servers(f"a request failed after {count} ({'; '.join(reasons)})", self.servers)

    async def _free(self, avoid: set[str]) -> Server:
        """Return the live server with the fewest attempts, not one of `avoid` if possible."""
        since = time.monotonic()
        while not (live := [s for s in self.servers if s.live]):
            if time.monotonic() - since > self.limits.patience_seconds:
                what = f"no server was live for {self.limits.patience_seconds:g} s"
                raise no_servers(f"{what}, {self._open} requests are unanswered", self.servers)
            await asyncio.sleep(_TICK)
        return min(live, key=lambda server: (server.url in avoid, server.running))

    async def _attempt(self, task: Task, server: Server, others: _Answered) -> Answer:
        """Ask a server, and a second one if it is late; return the first valid answer."""
        began = time.monotonic()
        asked = [server]
        attempts = {self._start(server, task)}
        failure: RequestFailed | None = None
        try:
            while attempts:
                done, attempts = await asyncio.wait(
                    attempts, timeout=4 * _TICK, return_when=asyncio.FIRST_COMPLETED
                )
                for attempt in done:
                    try:
                        answer = attempt.result()
                    except RequestFailed as failed:
                        failure = failed
                    else:
                        others.count += 1
                        others.slowest = max(others.slowest, time.monotonic() - began)
                        return answer
                seconds = time.monotonic() - began
                if not done and len(asked) == 1 and self._is_late(seconds, others):
                    free = [s for s in self.servers if s.live and s is not server]
                    if free:
                        asked.append(min(free, key=lambda other: other.running))
                        attempts.add(self._start(asked[1], task))
                        self.resent += 1
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
        assert failure is not None
        raise failure

    def _start(self, server: Server, task: Task) -> asyncio.Task[Answer]:
        """Start an attempt; the server counts as busier at once, before the attempt runs."""

        def ended(_: object) -> None:
            server.running -= 1

        server.running += 1
        attempt = asyncio.create_task(self._ask(server, task))
        attempt.add_done_callback(ended)
        return attempt

    async def _ask(self, server: Server, task: Task) -> Answer:
        try:
            answer = await self.ask(server, task)
        except RequestFailed as failure:
            self.failed += 1
            if failure.retry:
                server.fail(failure.reason, self.limits.pause_seconds)
            else:
                server.trouble = failure.reason
            raise
        server.failures = 0
        return answer

    def _is_late(self, seconds: float, others: _Answered) -> bool:
        if not self._drawn or others.count < max(1, self._open):
            return False
        return seconds > max(LATE_SECONDS, LATE_FACTOR * others.slowest)


def as_they_come(
    work: Callable[[Callable[[Result], None]], Coroutine[Any, Any, None]],
) -> Generator[list[Result], None, None]:
    """Run a coroutine; yield all that it has handed over since the last time, in order.

    Its event loop stands still while the caller deals with what came.

    Args:
        work: called with the function to hand results over.

    Raises:
        Whatever ends `work`, after all that came before.
    """
    came: asyncio.Queue[Result | None] = asyncio.Queue()

    async def start() -> asyncio.Task[None]:
        task = asyncio.create_task(work(came.put_nowait))
        task.add_done_callback(lambda _: came.put_nowait(None))
        return task

    async def next_ones() -> list[Result | None]:
        found = [await came.get()]
        while not came.empty():
            found.append(came.get_nowait())
        return found

    with asyncio.Runner() as runner:
        task, last = runner.run(start()), False
        while not last:
            found = runner.run(next_ones())
            last = found[-1] is None
            if results := [one for one in found if one is not None]:
                yield results
        task.result()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that ended a group of tasks; an error of the set-up before NoServers."""
    flat: list[BaseException] = []
    for error in group.exceptions:
        flat.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((e for e in flat if not isinstance(e, NoServers)), flat[0])
