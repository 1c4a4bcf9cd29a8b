"""Whether the reward of a reinforcement learning run has collapsed."""

from collections.abc import Sequence

from r1v3.report.figure_style import moving_average

WINDOW = 5
SHARE = 0.5


def collapse_step(rewards: Sequence[float]) -> int | None:
    """Return the first step (from 1) where the reward is below half of the best before; or None.

    Means of five steps around each are compared, so that no single step decides.
    """
    if len(rewards) < WINDOW:
        return None
    best = 0.0
    for step, value in enumerate(moving_average(rewards, WINDOW), start=1):
        best = max(best, float(value))
        if value < SHARE * best:
            return step
    return None
