"""Tiny models against transformers: the same tensors, the same logits, and honest errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from r1v3.data.encoding import collate
from r1v3.model.internvl import (
    build_model,
    count_parameters,
    embed_prompts,
    image_features,
    internvl_config,
    load_model,
    named_part_parameters,
)
from r1v3.model.parts import PARTS, part_of
from tests import tiny


@pytest.fixture(scope="module")
def net() -> InternVLForConditionalGeneration:
    return tiny.model()


@pytest.fixture
def folder(net: InternVLForConditionalGeneration, tmp_path: Path) -> Path:
    """A model folder as transformers itself writes it."""
    net.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(net: InternVLForConditionalGeneration) -> torch.Tensor:
    batch = collate([tiny.an_example(0), tiny.an_example(1)], 0)
    with torch.no_grad():
        return net(
            input_ids=batch.prompt_ids, pixel_values=batch.pixel_values, use_cache=False
        ).logits


def rewrite(folder: Path, change: object) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)  # type: ignore[operator]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_parameter_belongs_to_one_part_and_every_part_has_some(
    net: InternVLForConditionalGeneration,
) -> None:
    parts = {name: part for name, part, _ in named_part_parameters(net)}
    assert set(parts) == {name for name, _ in net.named_parameters()}
    assert set(parts.values()) == set(PARTS)
    assert parts["lm_head.weight"] == "llm"
    assert parts["model.multi_modal_projector.linear_1.weight"] == "connector"
    assert parts["model.vision_tower.embeddings.cls_token"] == "vision"
    counts = count_parameters(net)
    assert sum(counts.values()) == sum(p.numel() for p in net.parameters())
    own = sum(p.numel() for p in net.model.vision_tower.parameters())
    assert counts["vision"] == own


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(ValueError, match="'model.audio.weight' belongs to no part"):
        part_of("model.audio.weight")


def test_the_architecture_is_the_one_of_the_38b(net: InternVLForConditionalGeneration) -> None:
    names = {name for name, _ in net.named_parameters()}
    layer = "model.vision_tower.encoder.layer.0"
    assert f"{layer}.attention.q_norm.weight" in names and f"{layer}.lambda_1" in names
    assert f"{layer}.layernorm_before.bias" not in names  # RMS norm
    assert f"{layer}.attention.q_proj.bias" not in names
    assert "model.language_model.layers.0.self_attn.q_proj.bias" in names
    assert "model.language_model.layers.0.self_attn.o_proj.bias" not in names
    assert not any("vision_tower.layernorm" in name for name in names)  # no final norm
    embeddings = net.get_input_embeddings().weight
    assert embeddings.data_ptr() != net.lm_head.weight.data_ptr()  # untied


def test_a_picture_becomes_as_many_features_as_its_prompt_has_slots(
    net: InternVLForConditionalGeneration,
) -> None:
    features = image_features(net, torch.randn(3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    assert features.shape == (3, tiny.TOKENS_PER_TILE, 32)
    assert net.config.image_seq_length == tiny.TOKENS_PER_TILE


@pytest.mark.parametrize("tiles", [0, 2])
def test_too_few_or_too_many_features_for_the_prompt_are_refused(
    net: InternVLForConditionalGeneration, tiles: int
) -> None:
    """A scatter of too many would drop pictures in silence."""
    prompt = torch.tensor([tiny.an_example(0).prompt_ids])
    features = torch.randn(tiles, tiny.TOKENS_PER_TILE, 32) if tiles else None
    with pytest.raises(ValueError, match=f"4 image tokens for {4 * tiles} image features"):
        embed_prompts(net, prompt, features)


@pytest.mark.parametrize("sizes", [(30, 8), (24, 8)])
def test_an_image_size_that_pixel_shuffle_cannot_halve_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"image size {sizes[0]} must be an even multiple"):
        internvl_config(
            vocab_size=8,
            image_token_id=1,
            image_size=sizes[0],
            patch_size=sizes[1],
            vision={},
            text={},
        )


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = tiny.model(5).state_dict()
    torch.manual_seed(2)
    second, other = tiny.model(5).state_dict(), tiny.model(6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_all_weights_are_finite_float32_and_no_matrix_is_dead() -> None:
    for name, parameter in tiny.model().named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all()
        if parameter.dim() >= 2 and "cls_token" not in name:
            assert parameter.std() > 0, name


def test_what_transformers_saves_loads_with_equal_logits(
    net: InternVLForConditionalGeneration, folder: Path
) -> None:
    assert torch.equal(logits(load_model(folder).eval()), logits(net))


def test_half_precision_weights_load_into_the_wanted_dtype(folder: Path) -> None:
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_tensors_under_the_parameters_own_names_load_as_well(
    net: InternVLForConditionalGeneration, folder: Path
) -> None:
    state = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load_model(folder).eval()), logits(net))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"{folder} has no {missing}"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 200, -1000])
def test_truncated_weights_are_named(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        load_model(folder)


def test_a_missing_tensor_is_named_with_its_file(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop("language_model.lm_head.weight"))
    with pytest.raises(ValueError, match="model.safetensors.*lm_head.weight"):
        load_model(folder)


def test_a_tensor_that_is_not_part_of_the_model_is_named_with_its_file(folder: Path) -> None:
    rewrite(folder, lambda state: state.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="model.safetensors.*extra"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    name = "multi_modal_projector.linear_1.bias"
    rewrite(folder, lambda state: state.update({name: torch.zeros(1)}))
    with pytest.raises(ValueError, match=rf"model.safetensors: {name} has shape \(1,\).*\(32,\)"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"text_config": 3}'])
def test_a_damaged_configuration_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json cannot be used"):
        load_model(folder)


def test_a_configuration_of_another_size_is_a_fault_of_the_pair(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.safetensors.*mlp.*has shape"):
        load_model(folder)


def test_building_from_a_saved_configuration_gives_the_same_model(folder: Path) -> None:
    """`rope_theta` and the image sizes must survive config.json."""
    loaded = load_model(folder)
    again = build_model(loaded.config, 0).eval()
    assert torch.equal(logits(again), logits(tiny.model(0)))
