"""The table of weights against transformers' own parameters, and its shards against plain torch."""

import math
from pathlib import Path

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from r1v3.model.conversion import Checkpoint, native_shapes, parameter_name, saved_name, weights
from r1v3.model.conversion.match import require_match
from r1v3.model.conversion.slices import interleave
from r1v3.model.conversion.table import RULES
from r1v3.model.megatron.hf_weights import fill, restore
from tests.model.conversion.checkpoints import (
    megatron_shard,
    original_tensors,
    parameters_of,
    tiny_config,
    tiny_model,
    write_native,
    write_original,
)

PADDED_HEADS, PADDED_ROWS = 8, 512


def config_of_the_38b() -> InternVLConfig:
    """InternVL3-38B, the base of Skywork-R1V3."""
    return InternVLConfig(
        vision_config={
            "hidden_size": 3200,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "intermediate_size": 12800,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 5120,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "intermediate_size": 27648,
            "vocab_size": 151674,
        },
        tie_word_embeddings=False,
    )


def test_the_38b_has_the_published_number_of_parameters() -> None:
    """Fails if a weight of InternVL3-38B is left out of the table or has another shape."""
    shapes = native_shapes(config_of_the_38b())
    assert len(shapes) == 1456
    assert sum(math.prod(shape) for shape in shapes.values()) == 38_388_164_992


@pytest.mark.parametrize(
    "vision",
    [{}, {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False}],
    ids=["InternViT-6B", "InternViT-300M"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(vision: dict[str, object], tied: bool) -> None:
    """Fails if a variant of the architecture has parameters that the table does not know."""
    config = tiny_config(**vision)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert native_shapes(config) == expected


def test_original_names_are_those_of_the_remote_code() -> None:
    """Fails if the table names an original tensor that InternVLChatModel does not have."""
    model = tiny_model()
    found = {name for weight in weights(model.config) for name in weight.original}
    assert found == set(original_tensors(parameters_of(model)))


def test_saved_names_are_those_of_save_pretrained(tmp_path: Path) -> None:
    """Fails if a folder that is exported and one that transformers writes differ in names."""
    model = tiny_model()
    with Checkpoint(write_native(model, tmp_path / "native")) as checkpoint:
        assert {saved_name(name) for name in parameters_of(model)} == set(checkpoint)
        assert all(saved_name(parameter_name(name)) == name for name in checkpoint)


def test_no_name_is_used_twice() -> None:
    """Fails if two weights would be read from, or written to, one place."""
    for names in (
        [rule.megatron for rule in RULES],
        [name for rule in RULES for name in rule.native],
        [name for rule in RULES for name in rule.original],
    ):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("write", [write_native, write_original])
def test_shards_are_megatrons_and_give_back_the_tensors(
    tmp_path: Path, ranks: int, write: object
) -> None:
    """Fails if a head, a group, a half of a gate or a padded row goes to the wrong place.

    More ranks than KV groups (2) are among the layouts, and heads (5) that no layout divides.
    """
    model = tiny_model()
    native, compared, restored = parameters_of(model), 0, {}
    with Checkpoint(write(model, tmp_path / "model")) as checkpoint:  # type: ignore[operator]
        sources, _ = require_match(checkpoint, weights(model.config))
        for weight in weights(model.config):
            shards = []
            for rank in range(ranks):
                shape = list(weight.shapes[0])
                if weight.split is not None:
                    whole = sum(shape[weight.split] for shape in weight.shapes)
                    if weight.padded:
                        vocabulary = weight.megatron.startswith("language_model")
                        whole = PADDED_ROWS if vocabulary else whole * PADDED_HEADS // 5
                    shape[weight.split] = whole // ranks
                shard = torch.full(shape, torch.nan)
                fill(shard, weight, sources, checkpoint, tensor_parallel=ranks, rank=rank)
                expected = megatron_shard(
                    native, weight.megatron, ranks, rank, PADDED_HEADS, PADDED_ROWS
                )
                if expected is not None:
                    compared += 1
                    assert torch.equal(shard, expected), (weight.megatron, rank)
                shards.append(shard)
            restored |= dict(restore(weight, torch.stack(shards)))
    assert compared == ranks * (2 * 2 + 3 * 4 + 1)
    assert list(restored) == list(native_shapes(model.config))
    assert all(torch.equal(restored[name], tensor) for name, tensor in native.items())


def test_a_part_that_does_not_divide_is_refused() -> None:
    """Fails if the rest of a division would be dropped."""
    with pytest.raises(ValueError, match="dimension of 7 cannot be divided into 2"):
        interleave([8, 7], 2)


def test_a_parameter_of_another_size_is_refused(tmp_path: Path) -> None:
    """Fails if a model that is not the configuration's could be filled with part of a tensor."""
    model = tiny_model()
    table = {weight.megatron: weight for weight in weights(model.config)}
    with Checkpoint(write_native(model, tmp_path / "model")) as checkpoint:
        sources, _ = require_match(checkpoint, list(table.values()))
        for name, shape in (
            ("language_model.decoder.layers.0.mlp.linear_fc2.weight", (32, 65)),
            ("language_model.decoder.layers.0.mlp.linear_fc2.weight", (31, 64)),
            ("language_model.embedding.word_embeddings.weight", (500, 32)),
            ("vision_model.conv1.bias", (41,)),
        ):
            with pytest.raises(ValueError, match=f"{name}.*{shape[0]}|{name} has {shape[-1]}"):
                fill(
                    torch.empty(shape),
                    table[name],
                    sources,
                    checkpoint,
                    tensor_parallel=1,
                    rank=0,
                )


@pytest.mark.parametrize(
    ("field", "value"), [("use_mean_pooling", False), ("use_mask_token", True)]
)
def test_an_architecture_outside_the_table_is_named(field: str, value: object) -> None:
    """Fails if weights that the table does not have would be lost in silence."""
    with pytest.raises(ValueError, match=f"vision_config.{field} is {value}"):
        weights(tiny_config(**{field: value}))
