"""The order in which GRPO asks its questions."""

from collections.abc import Sequence
from typing import Any

from r1v3.trainer.randomness import order


class Questions:
    """Endless shuffled passes over the questions; those that were put back come first.

    Args:
        positions: of the questions in the data.
        seed: of the passes.
        stage: of a curriculum; each has passes of its own.

    Attributes:
        drawn: questions taken from the passes so far.
        waiting: positions of the questions that were put back.
    """

    def __init__(self, positions: Sequence[int], seed: int, *, stage: int = 0) -> None:
        self._positions = positions
        self._key: tuple[int | str, ...] = (seed, "grpo", stage) if stage else (seed, "grpo")
        self.drawn = 0
        self.waiting: list[int] = []

    def take(self, size: int) -> list[int]:
        """Return the positions of the next questions."""
        taken, self.waiting = self.waiting[:size], self.waiting[size:]
        new = size - len(taken)
        drawn = order(len(self._positions), self.drawn, new, *self._key)
        taken += [self._positions[i] for i in drawn]
        self.drawn += new
        return taken

    def put_back(self, positions: Sequence[int]) -> None:
        """Let these questions come next, in this order."""
        self.waiting = [*positions, *self.waiting]

    def state(self) -> dict[str, Any]:
        """Return the JSON values to go on from."""
        return {"drawn": self.drawn, "waiting": self.waiting}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.drawn, self.waiting = state["drawn"], list(state["waiting"])
