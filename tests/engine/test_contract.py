"""Batches: what belongs together stays together."""

import numpy as np
import pytest
import torch

from r1v3.data.batch import Batch
from r1v3.data.encoding import Example, collate
from tests import tiny


def a_batch() -> Batch:
    """Three prompts of different length with 2, 0 and 1 pictures, two responses each."""
    examples = [
        tiny.an_example(0, tiles=2, words=5),
        tiny.an_example(1, tiles=0, words=2),
        tiny.an_example(2, tiles=1, words=1),
    ]
    responses = [(5, 6, 7, 8), (9,), (10, 11), (12, 13), (14,), (15, 16, 17)]
    return collate(examples, 0, responses=responses, group_size=2)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (0, 1), (1, 2), (1, 3), (2, 3)])
def test_a_slice_holds_the_prompts_pictures_and_responses_of_its_rows(
    start: int, stop: int
) -> None:
    whole, part = a_batch(), a_batch().slice(start, stop)
    assert whole.pixel_values is not None
    tiles = [0, 2, 2, 3]
    pixels = whole.pixel_values[tiles[start] : tiles[stop]]
    if len(pixels):
        assert part.pixel_values is not None and torch.equal(part.pixel_values, pixels)
    else:
        assert part.pixel_values is None  # a vision tower cannot run on no pictures
    assert part.tiles.tolist() == whole.tiles[start:stop].tolist()
    for i in range(stop - start):
        prompt = whole.prompt_ids[start + i][whole.prompt_mask[start + i]]
        assert torch.equal(part.prompt_ids[i][part.prompt_mask[i]], prompt)
        for g in range(2):
            row, here = (start + i) * 2 + g, i * 2 + g
            assert torch.equal(
                part.response_ids[here][part.loss_mask[here]],
                whole.response_ids[row][whole.loss_mask[row]],
            )


def test_a_slice_is_as_narrow_as_its_longest_prompt_and_response() -> None:
    part = a_batch().slice(2, 3)
    assert part.prompt_mask.all()
    assert part.response_ids.shape == (2, 3)
    assert part.prompt_mask[:, -1].all()


def test_a_slice_keeps_context_that_does_not_count() -> None:
    """Forced tokens in the middle of a response are masked, but what follows depends on them."""
    mask = torch.tensor([[True, False, False, True, False]])
    batch = Batch(
        torch.tensor([[1]]),
        torch.tensor([[True]]),
        None,
        torch.tensor([0]),
        torch.tensor([[4, 5, 6, 7, 0]]),
        mask,
    )
    part = batch.slice(0, 1)
    assert part.response_ids.tolist() == [[4, 5, 6, 7]]
    assert part.loss_mask.tolist() == [[True, False, False, True]]


def test_a_slice_without_any_counting_token_is_empty() -> None:
    empty = Example((1, 2), np.zeros((0, 32, 32, 3), np.uint8), ())
    assert collate([empty], 0).slice(0, 1).response_ids.shape == (1, 0)


def test_rows_that_do_not_fit_are_refused() -> None:
    ids, mask = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)
    prompts = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 responses do not belong to 2 prompts x 1 samples"):
        Batch(prompts, prompts.bool(), None, torch.zeros(2), ids, mask)
    with pytest.raises(ValueError, match=r"loss_mask \(3, 1\) must have the shape"):
        Batch(ids, mask, None, torch.zeros(3), ids, mask[:, :1])
