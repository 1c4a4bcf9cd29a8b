"""Positions in a flat buffer as blocks of a tensor."""

import math

import pytest
import torch

pytest.importorskip("megatron.core")

from r1v3.engine.megatron.optimizer_blocks import blocks  # noqa: E402


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 1, 4), (2, 3, 2, 2)])
def test_blocks_are_the_elements_in_their_order(shape: tuple[int, ...]) -> None:
    """Fails if an element of a rank's moments is stored at another place, twice or not at all."""
    tensor = torch.arange(math.prod(shape)).view(shape)
    for start in range(tensor.numel() + 1):
        for stop in range(start, tensor.numel() + 1):
            found: list[int] = []
            for offset, size in blocks(shape, start, stop):
                places = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
                assert tensor[places].is_contiguous()
                found += tensor[places].flatten().tolist()
            assert found == list(range(start, stop))


def test_a_shard_is_a_few_blocks() -> None:
    """Fails if a checkpoint describes a part of a matrix row by row."""
    assert list(blocks((1000, 10), 5, 9_995)) == [
        ((0, 5), (1, 5)),
        ((1, 0), (998, 10)),
        ((999, 0), (1, 5)),
    ]
    assert list(blocks((1000, 10), 11, 14)) == [((1, 1), (1, 3))]
