"""config.json of the two layouts: translated back and forth, and through transformers."""

import json
from pathlib import Path

import pytest
from transformers import InternVLConfig

from r1v3.data.encoding import model_image_shape, record_max_tiles
from r1v3.model.conversion import load_config
from r1v3.model.conversion.config import to_native, to_original
from tests.model.conversion.checkpoints import IMAGE_TOKEN_ID, original_config, tiny_model


@pytest.fixture(scope="module")
def original() -> dict:
    return original_config(tiny_model())


def write(folder: Path, config: object, **files: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_an_original_config_comes_back_field_by_field(original: dict) -> None:
    """Fails if a field that the native layout has no word for is lost on the way."""
    assert to_original(to_native(original, IMAGE_TOKEN_ID)) == {
        **{name: value for name, value in original.items() if name != "image_token_id"}
    }


def test_it_comes_back_after_transformers_saved_the_native_one(
    original: dict, tmp_path: Path
) -> None:
    """Fails if transformers drops the kept fields, so that a trained model cannot go back."""
    InternVLConfig.from_dict(to_native(original, IMAGE_TOKEN_ID)).save_pretrained(tmp_path)
    back = to_original(json.loads((tmp_path / "config.json").read_text()))
    for name in ("template", "auto_map", "architectures", "vision_config", "freeze_llm"):
        assert back[name] == original[name]
    assert back["llm_config"].items() >= original["llm_config"].items()


def test_a_translated_config_builds_the_model_it_came_from(original: dict) -> None:
    """Fails if a size, a switch or the rotary embedding is translated wrongly."""
    own, found = tiny_model().config, InternVLConfig.from_dict(to_native(original, IMAGE_TOKEN_ID))
    for part in ("vision_config", "text_config"):
        expected, native = getattr(own, part).to_dict(), getattr(found, part).to_dict()
        different = {name for name in expected if expected[name] != native.get(name)}
        assert different <= {"layer_scale_init_value", "initializer_range", "rope_parameters"}
    assert found.text_config.rope_parameters == {
        "rope_type": "dynamic",
        "rope_theta": 1e6,
        "factor": 2.0,
    }
    assert found.image_token_id == IMAGE_TOKEN_ID and found.image_seq_length == 4
    assert found.tie_word_embeddings is False and found.downsample_ratio == 0.5


def test_missing_fields_have_the_defaults_of_the_remote_code() -> None:
    """Fails if a config that leaves out InternViT-6B's sizes gets transformers' 300M ones."""
    sparse = {
        "ps_version": "v2",
        "vision_config": {"image_size": 448, "num_hidden_layers": 45},
        "llm_config": {"model_type": "qwen2", "hidden_size": 5120, "vocab_size": 151674},
    }
    vision = to_native(sparse, 1)["vision_config"]
    assert (vision["hidden_size"], vision["num_attention_heads"]) == (3200, 25)
    assert vision["use_qk_norm"] and vision["norm_type"] == "rms_norm"
    assert to_native(sparse, 1)["image_seq_length"] == 256


def test_a_native_model_gets_a_complete_original_config() -> None:
    """Fails if a model that never was in the original layout cannot be written in it."""
    native = tiny_model().config.to_dict()
    again = to_native(to_original(native), IMAGE_TOKEN_ID)
    assert again["vision_config"].items() <= native["vision_config"].items()
    for name, value in again["text_config"].items():
        assert native["text_config"][name] == value
    assert to_original(native)["auto_map"]["AutoModel"].endswith("InternVLChatModel")


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("llm_config", "model_type", "internlm2"),
        (None, "ps_version", "v1"),
        ("vision_config", "layer_norm_eps", 1e-5),
    ],
)
def test_what_the_native_model_cannot_be_is_refused(
    original: dict, tmp_path: Path, part: str | None, field: str, value: object
) -> None:
    """Fails if a model would be converted into one that computes something else."""
    wrong = json.loads(json.dumps(original))
    (wrong[part] if part else wrong)[field] = value
    with pytest.raises(ValueError, match=f"cannot be used: .*{field} is {value!r}"):
        load_config(write(tmp_path, wrong))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens", {"<IMG_CONTEXT>": 77, "<img>": 76}),
        (
            "tokenizer",
            {
                "added_tokens": [{"id": 76, "content": "<img>"}]
                + [{"id": 77, "content": "<IMG_CONTEXT>"}]
            },
        ),
        ("tokenizer_config", {"added_tokens_decoder": {"77": {"content": "<IMG_CONTEXT>"}}}),
    ],
)
def test_the_image_token_comes_from_the_tokenizer(
    original: dict, tmp_path: Path, file: str, content: object
) -> None:
    """Fails if image features would be put at another token."""
    known = {name: value for name, value in original.items() if name != "image_token_id"}
    with pytest.raises(ValueError, match="which token <IMG_CONTEXT> is"):
        load_config(write(tmp_path, known))
    assert load_config(write(tmp_path, known, **{file: content})).image_token_id == 77


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llava"}', '{"llm_config": {}}'])
def test_a_config_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    """Fails if another model's folder ends in a traceback."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("own", "processor", "tiles"),
    [
        ({}, None, 1),
        ({}, {"min_patches": 1, "max_patches": 12}, 12),
        ({}, {"max_patches": 6, "crop_to_patches": False}, 6),
        ({}, {"crop_size": 448, "do_resize": True}, 1),
        ({}, [], 1),
        ({"max_dynamic_patch": 4}, {"max_patches": 12}, 4),
        ({"original_config": {"max_dynamic_patch": 9}}, {"max_patches": 12}, 9),
    ],
    ids=str,
)
def test_a_native_model_takes_its_tiles_from_its_processor(
    tmp_path: Path, own: dict, processor: object, tiles: int
) -> None:
    """Fails if a model in transformers' own layout, whose config.json says nothing of tiles, is
    shown every picture as one; or if its config.json does and is not believed."""
    native = json.loads(json.dumps(tiny_model().config.to_dict())) | own
    files = {} if processor is None else {"preprocessor_config": processor}
    assert model_image_shape(load_config(write(tmp_path, native, **files))).max_tiles == tiles


@pytest.mark.parametrize("told", [1, 5, 12])
def test_the_tiles_of_training_survive_the_conversion(told: int) -> None:
    """Fails if a server cuts other tiles than the model was trained with."""
    config = tiny_model().config
    record_max_tiles(config, 3)
    record_max_tiles(config, told)
    assert to_original(config.to_dict())["max_dynamic_patch"] == told
