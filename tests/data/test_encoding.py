"""From samples to tensors."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLConfig

from r1v3.config import Pictures
from r1v3.data.encoding import (
    Example,
    collate,
    encode_all,
    encode_sample,
    model_image_shape,
    record_max_tiles,
)
from r1v3.data.images import load_image, normalize, pixel_values, tile_image
from r1v3.data.sample import Sample, make_sample
from r1v3.data.special_tokens import IMAGE_CONTEXT, TURN_END
from r1v3.data.tiles import ImageShape
from r1v3.model.conversion import load_config
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
    assert np.asarray(example.tiles).shape == (6, 32, 32, 3)
    assert np.asarray(example.tiles).dtype == np.uint8
    assert example.prompt_ids.count(CONTEXT) == 6 * 4
    one = encoded([picture(64, 32)])
    assert len(one.tiles) == 1 and one.prompt_ids.count(CONTEXT) == tiny.TOKENS_PER_TILE


def test_pixels_reach_the_model_as_internvl_normalizes_them() -> None:
    data = picture(33, 21)
    tiles = tile_image(load_image(data), tile_size=32, max_tiles=1)
    assert torch.equal(normalize(np.asarray(encoded([data]).tiles)), pixel_values(tiles))


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


# The tiling that a model's own configuration asks for.


def native(**fields: object) -> InternVLConfig:
    """The configuration of a model that keeps InternVL's fields in either place."""
    config = tiny.model().config
    vars(config).update(fields)
    return config


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("fields", "told", "tiles"),
    [
        ({}, None, (1, 1, True)),
        ({"max_dynamic_patch": 12}, None, (1, 12, True)),
        ({"max_dynamic_patch": 6, "min_dynamic_patch": 2}, None, (2, 6, True)),
        ({"max_dynamic_patch": 24, "use_thumbnail": False}, None, (1, 24, False)),
        ({"max_dynamic_patch": 12, "dynamic_image_size": False}, None, (1, 1, True)),
        ({"max_dynamic_patch": 12, "dynamic_image_size": True}, None, (1, 12, True)),
        ({"max_dynamic_patch": 1}, None, (1, 1, True)),
        ({"max_dynamic_patch": 12}, 4, (1, 4, True)),
        ({"max_dynamic_patch": 12, "dynamic_image_size": False}, 5, (1, 5, True)),
        ({"max_dynamic_patch": 8, "min_dynamic_patch": 3}, 2, (2, 2, True)),
        ({}, 7, (1, 7, True)),
    ],
)
def test_a_model_says_how_many_tiles_it_is_shown(
    kept: bool, fields: dict[str, object], told: int | None, tiles: tuple[int, int, bool]
) -> None:
    """Fails if a model trained on twelve tiles is asked about one, or a setting is ignored."""
    config = native(original_config=fields) if kept and fields else native(**fields)
    shape = model_image_shape(config, told)
    assert (shape.min_tiles, shape.max_tiles, shape.thumbnail) == tiles
    assert shape.tile_size == tiny.IMAGE_SIZE and shape.tokens_per_tile == tiny.TOKENS_PER_TILE


@pytest.mark.parametrize(
    "fields",
    [
        {"max_dynamic_patch": 0}, {"max_dynamic_patch": "12"}, {"max_dynamic_patch": 2.0},
        {"max_dynamic_patch": True}, {"max_dynamic_patch": None},
        {"max_dynamic_patch": 4, "min_dynamic_patch": 0},
        {"max_dynamic_patch": 4, "min_dynamic_patch": 5}, {"min_dynamic_patch": 2},
    ],
)  # fmt: skip
def test_a_tiling_that_makes_no_sense_is_named(fields: dict[str, object]) -> None:
    """Fails if a damaged config.json shows pictures as it happens to be read."""
    with pytest.raises(ValueError, match=r"config\.json: m(ax|in)_dynamic_patch"):
        model_image_shape(native(**fields))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("told", [1, 3, 12])
def test_the_tiles_of_training_are_recorded_in_the_model(
    tmp_path: Path, kept: bool, told: int
) -> None:
    """Fails if a model trained with other tiles than its base is later shown the base's."""
    config = native(**({"original_config": {"max_dynamic_patch": 5}} if kept else {}))
    before = model_image_shape(config).max_tiles
    record_max_tiles(config, before)
    assert "dynamic_image_size" not in config.to_dict()  # nothing to record
    record_max_tiles(config, told)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert model_image_shape(load_config(tmp_path)).max_tiles == told


def test_encoding_keeps_the_minimum_and_leaves_the_thumbnail_out() -> None:
    """Fails if only the greatest number of tiles reaches the pictures."""
    assert len(encoded([picture(32, 32)], ImageShape(32, 12, 4, min_tiles=4)).tiles) == 5
    assert len(encoded([picture(64, 32)], ImageShape(32, 2, 4, thumbnail=False)).tiles) == 2


# Truncated pictures.


def rows_with(truncated: set[int], count: int = 4) -> list[Sample]:
    whole, cut = picture(64, 64), Image.effect_noise((64, 64), 90).convert("RGB")
    buffer = io.BytesIO()
    cut.save(buffer, "JPEG")
    return [
        make_sample(
            question="How many?", ground_truth="3", data_source="t", index=i,
            images=[buffer.getvalue()[:-300] if i in truncated else whole],
        )
        for i in range(count)
    ]  # fmt: skip


def encoded_rows(truncated: set[int], choice: str) -> dict[int, Example]:
    pictures = Pictures.model_validate({"truncated": choice})
    shape = ImageShape(32, 1, 4, pictures=pictures)
    return encode_all(Path("d.parquet"), rows_with(truncated), WORDS, shape)


@pytest.mark.parametrize(
    ("truncated", "row"), [({0}, 0), ({1}, 1), ({3}, 3), ({1, 2}, 1), ({0, 1, 2, 3}, 0)]
)
def test_a_truncated_picture_names_its_row(truncated: set[int], row: int) -> None:
    """Fails if the one bad file of many has to be searched for."""
    with pytest.raises(ValueError, match=rf"^d\.parquet row {row}: image of .* is truncated"):
        encoded_rows(truncated, "error")


@pytest.mark.parametrize("truncated", [{0}, {1}, {3}, {1, 2}, {0, 2, 3}, set()])
def test_rows_with_a_truncated_picture_are_left_out_and_counted(
    truncated: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if rows vanish unsaid, or the others move to other rows."""
    assert list(encoded_rows(truncated, "skip")) == sorted({0, 1, 2, 3} - truncated)
    told = f"{len(truncated)} of 4 samples of d.parquet have a truncated picture and are left out\n"
    assert capsys.readouterr().out == (told if truncated else "")
    assert list(encoded_rows(truncated, "accept")) == [0, 1, 2, 3]


def test_a_file_of_truncated_pictures_alone_is_refused() -> None:
    """Fails if a stage starts on no data."""
    with pytest.raises(ValueError, match="4 of 4 samples .* none is left"):
        encoded_rows({0, 1, 2, 3}, "skip")
