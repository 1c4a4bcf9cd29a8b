"""Many requests at a time, whose answers are kept as they come.

What fails is left for the next run. A server that answers nothing any more, or refuses this key or
model, ends the work at once; what was answered until then is kept.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from r1v3.http import RequestFailed
from r1v3.journal import Journal

Entry = dict[str, Any]

# No other question fares better: wrong key, no right to the model, no such model or path.
_FATAL = (401, 402, 403, 404, 405)
_LEAST_IN_A_ROW = 8


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        run: sends it and makes an entry of the reply; raises RequestFailed.
        refused: makes an entry of a refusal of this very request, by its reason; None where it is
            to be asked again in the next run.
    """

    run: Callable[[], Awaitable[Entry]]
    refused: Callable[[str], Entry] | None = None


class Unusable(RuntimeError):
    """The server cannot be used; the message says why."""


def keep_in(journal: Journal, notify: Callable[[int], None]) -> Callable[[Sequence[Entry]], None]:
    """Return what appends entries to a journal, and then tells `notify` how many they were."""

    def keep(entries: Sequence[Entry]) -> None:
        journal.append(entries)
        notify(len(entries))

    return keep


async def work(
    jobs: Iterator[Job],
    keep: Callable[[Sequence[Entry]], None],
    *,
    concurrency: int,
    what: str,
) -> Counter[str]:
    """Run jobs, `concurrency` of them at a time; count what failed by reason.

    Args:
        jobs: drawn one by one as there is room, so that their pictures need not all be held.
        keep: called with the new entries, in the order in which they came.
        what: the server's part, for errors.

    Raises:
        Unusable: no request can succeed, or many in a row failed.
    """
    failed: Counter[str] = Counter()
    running: dict[asyncio.Task[Entry], Job] = {}
    held: list[Entry] = []  # refusals, until an answer shows that not everything is refused
    answered, in_a_row = False, 0
    most_in_a_row = max(_LEAST_IN_A_ROW, 2 * concurrency)
    drained = False
    try:
        while True:
            while not drained and len(running) < concurrency:
                job = next(jobs, None)
                if job is None:
                    drained = True
                else:
                    running[asyncio.ensure_future(job.run())] = job
            if not running:
                break
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            entries: list[Entry] = []
            reason = ""
            for task in done:
                job = running.pop(task)
                failure = task.exception()
                if failure is None:
                    entries.append(task.result())
                elif not isinstance(failure, RequestFailed):
                    raise failure
                elif failure.status in _FATAL:
                    keep(entries)
                    raise Unusable(f"{what} cannot be used: {failure.reason}")
                elif not failure.retry and job.refused is not None:
                    held.append(job.refused(failure.reason))
                    in_a_row, reason = in_a_row + 1, failure.reason
                else:
                    failed[failure.reason] += 1
                    in_a_row, reason = in_a_row + 1, failure.reason
            if entries:
                answered, in_a_row = True, 0
            if answered:
                entries += held
                held = []
            keep(entries)
            if in_a_row >= most_in_a_row and not answered or in_a_row >= 4 * most_in_a_row:
                raise Unusable(
                    f"{what}: {in_a_row} requests in a row failed, the last one: {reason}; what "
                    "was answered is kept, start again to go on"
                )
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    failed.update("refused" for _ in held)
    return failed
