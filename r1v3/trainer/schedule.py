"""The learning rate of each step."""

import math

from r1v3.config import Optimizer


def learning_rate(step: int, total: int, config: Optimizer) -> float:
    """Return the rate of a step (from 0): linear warm-up, then cosine to zero, or constant."""
    warmup = max(1, round(config.warmup_ratio * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
