"""Random numbers that depend on seed, purpose and step alone, so that no state is saved."""

import numpy as np
import torch


def stream(*key: int | str) -> np.random.Generator:
    """Return a random generator that depends on its key alone.

    All randomness in training comes from such generators, keyed by seed, purpose and step, so that
    a resumed run repeats an uninterrupted one without saved generator states.
    """
    words = [part if isinstance(part, int) else int.from_bytes(part.encode()) for part in key]
    return np.random.default_rng(words)


def torch_stream(*key: int | str) -> torch.Generator:
    """Return `stream` as a generator of torch."""
    return torch.Generator().manual_seed(int(stream(*key).integers(0, 2**63 - 1)))


def order(count: int, start: int, size: int, *key: int | str) -> list[int]:
    """Return entries `start` to `start + size` of endless shuffled passes over range(count).

    Raises:
        ValueError: count is 0.
    """
    if count == 0:
        raise ValueError("the training data is empty")
    passes = {
        n: stream(*key, n).permutation(count)
        for n in range(start // count, (start + size) // count + 1)
    }
    return [int(passes[i // count][i % count]) for i in range(start, start + size)]
