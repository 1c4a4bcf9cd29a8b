"""Wall-clock time of the parts of a step, on this rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds spent in named parts since they were last taken."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a part, also when it ends with an error."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return metrics `seconds_<part>` and start anew."""
        spent, self._spent = self._spent, {}
        return {f"seconds_{name}": seconds for name, seconds in spent.items()}
