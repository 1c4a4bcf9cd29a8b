"""Repetition, against counting runs of tokens one by one."""

import pytest
import torch

from r1v3.rollout.repetition import repetition


def counted(ids: list[int], window: int) -> float:
    runs = [tuple(ids[i : i + window]) for i in range(len(ids) - window + 1)]
    return (len(runs) - len(set(runs))) / len(runs) if runs else 0.0


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_share_of_runs_that_came_before(seed: int) -> None:
    """Fails if padding counts as repetition, or a repeat is missed, for any lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (12, 30), generator=generator)
    lengths = torch.randint(0, 31, (12,), generator=generator)
    mask = torch.arange(30)[None] < lengths[:, None]
    for window in (1, 2, 4):
        found = repetition(ids, mask, window)
        for row, length, value in zip(ids.tolist(), lengths.tolist(), found.tolist(), strict=True):
            assert value == pytest.approx(counted(row[:length], window))


def test_short_and_wrong_inputs() -> None:
    """Fails if an answer of few tokens is an error, or a wrong shape is not."""
    assert repetition(torch.ones(2, 3).long(), torch.ones(2, 3).bool()).tolist() == [0.0, 0.0]
    assert repetition(torch.ones(1, 50).long(), torch.ones(1, 50).bool()).item() > 0.95
    with pytest.raises(ValueError, match="must be"):
        repetition(torch.ones(2, 3).long(), torch.ones(2, 4).bool())
