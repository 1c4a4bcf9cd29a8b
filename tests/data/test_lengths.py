"""Rows beyond a model's positions: refused with their lengths, or dropped and counted."""

from pathlib import Path

import numpy as np
import pytest

from r1v3.data.encoding import Example
from r1v3.data.lengths import PositionLimit
from tests.tiny import model

FILE = Path("some.parquet")
NO_TILES = np.zeros((0, 8, 8, 3), dtype=np.uint8)
# (prompt, response) of each row, positions, longest sampled response, rows that do not fit.
CASES = [
    ([(5, 3)], 8, None, []),
    ([(5, 4)], 8, None, [0]),
    ([(8, 0)], 8, None, []),
    ([(9, 0)], 8, None, [0]),
    ([(1, 1), (7, 2), (2, 2)], 8, None, [1]),
    ([(7, 2), (2, 2), (1, 9)], 8, None, [0, 2]),
    ([(4, 99)], 8, 4, []),
    ([(5, 0)], 8, 4, [0]),
    ([(1, 0), (2, 0), (3, 0), (4, 0)], 6, 3, [3]),
    ([(100, 28), (100, 29), (128, 0), (1, 127), (1, 128)], 128, None, [1, 4]),
    ([(n, 0) for n in range(1, 21)], 12, 2, list(range(10, 20))),
    ([(3, 1)] * 7, 3, None, list(range(7))),
]


def rows(lengths: list[tuple[int, int]]) -> dict[int, Example]:
    return {
        row: Example((1,) * prompt, NO_TILES, (2,) * response)
        for row, (prompt, response) in enumerate(lengths)
    }


@pytest.mark.parametrize(("lengths", "positions", "sampled", "beyond"), CASES)
def test_rows_beyond_the_positions_are_refused_with_their_lengths(
    lengths: list[tuple[int, int]], positions: int, sampled: int | None, beyond: list[int]
) -> None:
    """Fails if a row is trained at positions that the model has never had, or the row that is in
    the way cannot be found."""
    limit = PositionLimit(positions, "error", sampled)
    if not beyond:
        assert limit.rows(FILE, rows(lengths)) == list(range(len(lengths)))
        return
    with pytest.raises(ValueError) as refused:
        limit.rows(FILE, rows(lengths))
    prompt, response = lengths[beyond[0]]
    response = response if sampled is None else sampled
    message = str(refused.value)
    assert f"{len(beyond)} of {len(lengths)} rows of some.parquet exceed" in message
    assert f"{positions} positions (max_position_embeddings)" in message
    assert f"row {beyond[0]}: prompt {prompt} + " in message
    assert f" {response} = {prompt + response} tokens" in message and "too_long=drop" in message


@pytest.mark.parametrize(("lengths", "positions", "sampled", "beyond"), CASES)
def test_dropped_rows_are_counted(
    lengths: list[tuple[int, int]],
    positions: int,
    sampled: int | None,
    beyond: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if `too_long: drop` loses rows without saying how many, or rows that fit."""
    limit = PositionLimit(positions, "drop", sampled)
    if len(beyond) == len(lengths):
        with pytest.raises(ValueError, match="none is left"):
            limit.rows(FILE, rows(lengths))
        return
    kept = [row for row in range(len(lengths)) if row not in beyond]
    assert limit.rows(FILE, rows(lengths)) == kept
    said = capsys.readouterr().out
    wanted = f"{len(beyond)} of {len(lengths)} rows of some.parquet exceed"
    assert (wanted in said and "are dropped" in said) if beyond else said == ""


def test_the_positions_are_the_language_models() -> None:
    """Fails if the limit is read from another part of the model's configuration."""
    config = model().config
    config.get_text_config().max_position_embeddings = 77
    assert PositionLimit.of(config, "drop", 3) == PositionLimit(77, "drop", 3)
