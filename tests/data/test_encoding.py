"""From samples to tensors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from r1v3.data.encoding import Example, ImageShape, collate, encode_sample
from r1v3.data.images import load_image, normalize, pixel_values, tile_image
from r1v3.data.sample import make_sample
from r1v3.data.tokenizer import IMAGE_CONTEXT, TURN_END
from tests import tiny

WORDS = tiny.tokenizer()
CONTEXT = WORDS.convert_tokens_to_ids(IMAGE_CONTEXT)
END = WORDS.convert_tokens_to_ids(TURN_END)


def picture(width: int = 20, height: int = 10, shade: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(images: list[bytes], shape: ImageShape = tiny.SHAPE, **fields: object) -> Example:
    thinking = bool(fields.pop("thinking", True))
    sample = make_sample(
        question="How many?", ground_truth="3", data_source="t", index=0, images=images, **fields
    )
    return encode_sample(sample, WORDS, shape, thinking=thinking)


def test_a_picture_takes_as_many_context_tokens_as_its_tiles() -> None:
    """A wide picture has two tiles and a thumbnail; features and slots must agree."""
    example = encoded([picture(64, 32), picture()], ImageShape(32, 2, 4))
    assert example.tiles.shape == (6, 32, 32, 3)
    assert example.tiles.dtype == np.uint8
    assert example.prompt_ids.count(CONTEXT) == 6 * 4
    one = encoded([picture(64, 32)])
    assert len(one.tiles) == 1 and one.prompt_ids.count(CONTEXT) == tiny.TOKENS_PER_TILE


def test_pixels_reach_the_model_as_internvl_normalizes_them() -> None:
    data = picture(33, 21)
    tiles = tile_image(load_image(data), tile_size=32, max_tiles=1)
    assert torch.equal(normalize(encoded([data]).tiles), pixel_values(tiles))


def test_a_response_ends_its_turn() -> None:
    """Without the end-of-turn token the model would learn never to stop."""
    example = encoded([], response="So 3.\n</think>\n\n\\boxed{3}")
    assert example.response_ids[-1] == END
    assert WORDS.decode(example.response_ids[:-1]) == "So 3.\n</think>\n\n\\boxed{3}"
    assert encoded([]).response_ids == ()


@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n"])
def test_a_thought_is_opened_once_whether_the_response_repeats_the_tag_or_not(opening: str) -> None:
    example = encoded([], response=f"{opening}So 3.</think>3")
    whole = WORDS.decode([*example.prompt_ids, *example.response_ids])
    assert whole.endswith("<|im_start|>assistant\n<think>\nSo 3.</think>3<|im_end|>")


def test_without_thinking_the_response_stands_as_it_is() -> None:
    example = encoded([], response="\\boxed{3}", thinking=False)
    whole = WORDS.decode([*example.prompt_ids, *example.response_ids])
    assert whole.endswith("<|im_start|>assistant\n\\boxed{3}<|im_end|>")


@pytest.mark.parametrize("token", [IMAGE_CONTEXT, TURN_END])
def test_a_special_token_in_a_response_is_refused(token: str) -> None:
    """It would end the turn early, or teach the model to write pictures."""
    with pytest.raises(ValueError, match="response contains the special token"):
        encoded([], response=f"So {token} 3.")


def test_prompts_are_padded_on_the_left_and_responses_on_the_right() -> None:
    examples = [
        Example((5, 6, 7), np.zeros((0, 32, 32, 3), np.uint8), (8,)),
        Example((9,), np.full((2, 32, 32, 3), 7, np.uint8), (3, 4)),
    ]
    batch = collate(examples, 0)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 9]]
    assert batch.prompt_mask.tolist() == [[True] * 3, [False, False, True]]
    assert batch.response_ids.tolist() == [[8, 0], [3, 4]]
    assert batch.loss_mask.tolist() == [[True, False], [True, True]]
    assert batch.tiles.tolist() == [0, 2]
    assert batch.pixel_values is not None and batch.pixel_values.shape == (2, 3, 32, 32)


def test_a_padding_token_inside_a_response_still_counts() -> None:
    """The mask follows lengths: the padding id may also be a real token."""
    batch = collate([Example((0, 1), np.zeros((0, 32, 32, 3), np.uint8), (0, 0))], 0)
    assert batch.prompt_mask.all() and batch.loss_mask.all()


def test_text_alone_has_no_pixels_and_given_responses_take_the_place_of_own_ones() -> None:
    examples = [Example((1,), np.zeros((0, 32, 32, 3), np.uint8), (9, 9))]
    batch = collate(examples, 0, responses=[(4,), ()], group_size=2)
    assert batch.pixel_values is None
    assert batch.response_ids.tolist() == [[4], [0]]
    assert batch.loss_mask.tolist() == [[True], [False]]


def test_responses_that_do_not_fit_the_group_are_refused() -> None:
    examples = [Example((1,), np.zeros((0, 32, 32, 3), np.uint8))]
    with pytest.raises(ValueError, match="3 responses do not belong to 1 prompts x 2 samples"):
        collate(examples, 0, responses=[(1,), (2,), (3,)], group_size=2)
